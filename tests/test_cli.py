"""The command line's contract: exit codes, and what goes to stdout and to stderr in every mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import requant.convert.run as run
from requant.cli import app
from requant.convert.source import Checkpoint
from tests.helpers import hashes

Source = Callable[[str], Path]

#: Whatever a plan and a conversion tell scripts.
PLAN_KEYS = {"source", "format", "recipe", "files", "tensors", "read_bytes", "written_bytes",
             "identical_tensors", "requantized_tensors"}  # fmt: skip
CONVERT_KEYS = PLAN_KEYS | {"output", "seconds", "peak_rss_bytes", "resumed_files"}
INSPECT_KEYS = {"model_type", "parameters", "active_parameters", "total_bytes", "files", "formats",
                "roles", "kv_cache_bytes_per_token"}  # fmt: skip
VERIFY_KEYS = {"ok", "kl", "top1_agreement", "perplexity_source", "perplexity_output", "tokens",
               "max_kl", "layers", "tensors", "problems"}  # fmt: skip


def invoke(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def check(
    args: list[Any],
    *,
    exit: int = 0,
    human: list[str] | None = None,
    json_keys: set[str] | None = None,
    error: str | None = None,
) -> Any:
    """Run a command in human, json and quiet mode; return the JSON document.

    A command that could not run (`error`) says so in one line on stderr, and on stdout nothing.
    """
    document = None
    for mode in ([], ["--json"], ["-q"]):
        result = invoke(*args, *mode)
        assert result.exit_code == exit, (mode, result.output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        if error is not None:
            assert result.stdout == "" and len(lines) == 1 and error in lines[0], result.output
            continue
        assert lines == []
        if mode == ["-q"]:
            assert result.output == ""
        elif mode == ["--json"]:
            assert result.stderr == "" and result.stdout.count("\n") == 1
            document = json.loads(result.stdout)
            first = document[0] if isinstance(document, list) else document
            assert (json_keys or set()) <= set(first)
        else:
            assert [text for text in human or [] if text not in result.stdout] == []
            assert "\x1b" not in result.stdout and result.stdout.endswith("\n")
    return document


def test_formats_and_recipes() -> None:
    formats = check(["formats"], human=["int4", "fp8-block"], json_keys={"name", "bits_per_weight"})
    recipes = check(["recipes"], human=["int8-channel"], json_keys={"name", "description"})
    assert {f["name"] for f in formats} <= {r["name"] for r in recipes}


def test_a_preset_is_printed_as_it_is() -> None:
    """Brackets are no markup: the text is to be copied and edited."""
    document = check(["recipes", "int4"], human=['[roles]\nattention = "int4"', "[modules]"])
    assert invoke("recipes", "int4").stdout.strip() == document["text"].strip()
    check(["recipes", "int44"], exit=2, error="unknown recipe 'int44': one of bf16")


def test_plan(source: Source) -> None:
    document = check(
        ["plan", source("fp8-block"), "--to", "int4[group_size=64]"],
        human=["int4 (int4[group_size=64])", "9 requantized", "3 files"],
        json_keys=PLAN_KEYS,
    )
    assert document["format"] == "int4[group_size=64]" and "seconds" not in document
    assert "source   " + str(source("fp8-block")) in invoke("plan", source("fp8-block"), "--to",
                                                            "bf16").stdout  # fmt: skip


def test_plan_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = PLAN_KEYS | {"serving"}
    fits = ["plan", "demo", "--to", "int4", "--gpu", "RTX 4090", "--context", "512"]
    document = check(fits, human=["fits on 1x RTX 4090", "KV cache"], json_keys=keys)
    serving = document["serving"]
    assert serving["fits"] and serving["context"] == 512 and serving["batch"] == 1
    written = sum(serving["role_bytes"].values()) + serving["header_bytes"]
    assert written == document["written_bytes"]
    too_small = ["plan", "demo", "--gpu", "1GB", "--context", "512", "--batch", "2000"]
    document = check(too_small, exit=1, human=["does not fit on 1x 1 GB"], json_keys=keys)
    assert not document["serving"]["fits"] and document["serving"]["max_batch"] < 2000
    assert document["requantized_tensors"] == 0  # without a format: as it is


def test_plan_chooses_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["plan", "demo", "--fit", "2x24GB", "--context", "512"]
    keys = PLAN_KEYS | {"serving", "recipe_file", "recipe_text"}
    document = check(args, human=["fits on 2x 24 GB"], json_keys=keys)
    recipe = tmp_path / document["recipe_file"]
    assert recipe.name == "fit-2x-24-GB.toml" and recipe.read_text() == document["recipe_text"]
    assert document["serving"]["fits"]
    again = check(["plan", "demo", "--recipe", recipe], json_keys=PLAN_KEYS)
    assert again["written_bytes"] == document["written_bytes"]
    recipe.write_text("# mine\n")
    check(args, exit=2, error=f"{recipe.name}: is there, and another recipe; give --save FILE")
    check([*args, "--save", tmp_path / "no" / "x.toml"], exit=2, error="cannot write the recipe")
    none = ["plan", "demo", "--fit", "1GB", "--context", "512", "--batch", "100000"]
    assert check(none, exit=1, human=["no mixture of formats fits on 1GB"])["fits"] is False


def test_inspect(source: Source) -> None:
    check(["inspect", source("fp8-block")], human=["deepseek_v3"], json_keys=INSPECT_KEYS)
    check(["inspect", "nowhere"], exit=2, error="nowhere: no such folder")


def test_convert(source: Source, tmp_path: Path) -> None:
    args = ["convert", source("fp8-block"), tmp_path / "out", "--to", "bf16", "--device", "cpu"]
    document = check(args, human=["9 requantized", "peak memory"], json_keys=CONVERT_KEYS)
    assert document["resumed_files"] == document["files"] == 3
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert document["written_bytes"] == written and document["peak_rss_bytes"] > 1e6
    assert "3 of 3 files were finished before" in invoke(*args).stdout


def test_a_recipe_file(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[roles]\nmtp = "bf16"\n[modules]\n"*.q_proj" = "bf16"\n')
    document = check(["plan", source("fp8-block"), "--recipe", path], json_keys=PLAN_KEYS)
    assert document["requantized_tensors"] == 3 and document["recipe"] == str(path)
    path.write_text('[roles]\nmpt = "bf16"\n')
    check(["plan", source("bf16"), "--recipe", path], exit=2, error="[roles] has 'mpt'")


def refused(source: Path, out: Path) -> list[tuple[list[Any], str]]:
    convert = ["convert", source, out]
    return [
        (["plan", source], "give either --to FORMAT or --recipe"),
        (["plan", source, "--to", "bf16", "--recipe", "bf16"], "give either --to FORMAT or"),
        (["plan", source, "--to", ""], "unknown format ''"),
        (["plan", source, "--to", "int8"], "unknown format 'int8'"),
        (["plan", source, "--to", "int4"], "group size 128 does not divide"),
        (["plan", source, "--recipe", "nope"], "unknown recipe 'nope'"),
        (["plan", source, "--to", "bf16", "--context", "9"], "no effect without --gpu or --fit"),
        (["plan", source, "--to", "bf16", "--save", "x"], "--save has no effect without --fit"),
        (["plan", source, "--to", "bf16", "--fit", "24GB"], "--fit chooses the formats"),
        (["plan", source, "--gpu", "RTX 9999"], "RTX 9999"),
        (["plan", "demo", "--gpu", "24GB", "--context", str(1 << 30)], "was made for"),
        ([*convert, "--to", "bf16", "--disk", "1GB"], "--disk has no effect on a source that is"),
        ([*convert, "--to", "bf16", "--keep-source", "x"], "--keep-source has no effect on a"),
        ([*convert, "--to", "bf16", "--no-keep"], "have no effect without --push"),
        (["plan", source, "--recipe", "no.toml"], "no.toml: cannot read the recipe"),
        (["plan", "x" * 300, "--to", "bf16"], "File name too long"),
        (["plan", "a\x1b[2J\nb", "--to", "bf16"], r"a\x1b[2J\nb: no such folder"),
        ([*convert, "--to", "int4"], "group size 128 does not divide"),
        ([*convert, "--to", "bf16", "--max-kl", "1"], "--max-kl has no effect without --verify"),
        ([*convert, "--to", "bf16", "--device", "tpu"], "--device tpu: expected cpu, cuda or"),
        ([*convert, "--to", "bf16", "--device", "meta"], "--device meta: expected cpu, cuda or"),
        ([*convert, "--to", "bf16", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["convert", source, source / "out", "--to", "bf16"], "lies in the source folder"),
        (["convert", source, source / "config.json", "--to", "bf16"], "lies in the source folder"),
        (["verify", "demo", out], "no such folder"),
        (["verify", source, source, "--text", out / "t"], "cannot read the text"),
        (["run", source, "hi", "--seed", "1"], "--seed has no effect with --temperature 0"),
        (["run", "nowhere", "hi"], "nowhere: no such folder"),
        (["run", source, "\udcff"], "the prompt is not UTF-8 text"),
        (["download", "a b", out], "a b: expected a repository's name, org/name"),
        (["download", "demo", source], "already holds something"),
    ]


@pytest.mark.parametrize("case", range(len(refused(Path(), Path()))))
def test_what_cannot_run_exits_2_and_writes_nothing(
    case: int, source: Source, tmp_path: Path
) -> None:
    args, message = refused(source("fp8-block"), tmp_path / "out")[case]
    before = hashes(source("fp8-block"))
    check(args, exit=2, error=message)
    assert hashes(source("fp8-block")) == before and not (tmp_path / "out").exists()


USAGE = [
    [],
    ["bogus"],
    ["plan"],
    ["plan", ".", "--bogus"],
    ["convert", ".", "o", "--to", "bf16", "--workers", "0"],
    ["convert", ".", "o", "--to", "bf16", "--workers", "x"],
    ["verify", ".", ".", "--max-kl", "-1"],
    ["verify", ".", ".", "--max-kl", "nan"],
    ["verify", ".", ".", "--tokens", "1"],
    ["run", ".", "x", "--max-tokens", "0"],
]


@pytest.mark.parametrize("args", USAGE, ids=" ".join)
def test_wrong_usage_exits_2(args: list[str]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and result.stdout == "" or not args
    assert "Usage: " in result.output and "Traceback" not in result.output


def test_version_and_help() -> None:
    assert invoke("--version").stdout.strip().count(".") == 2
    commands = ["inspect", "formats", "recipes", "plan", "convert", "verify", "run", "download"]
    for name in commands:
        result = invoke(name, "--help")
        assert result.exit_code == 0 and "--json" in result.stdout
        assert name in invoke("--help").stdout


def test_a_bug_exits_70_with_its_traceback(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Checkpoint:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Checkpoint, "open", broken)
    for mode in ([], ["--json"], ["-q"]):
        result = invoke("plan", source("bf16"), "--to", "bf16", *mode)
        assert result.exit_code == 70 and result.stdout == ""
        assert "ZeroDivisionError: a bug" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: this is a bug in requant")


def test_an_interrupt_exits_130(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_fill", interrupted)
    args = ["convert", source("bf16"), tmp_path / "out", "--to", "fp32"]
    check(args, exit=130, error="interrupted; repeat the command to continue")
    assert not (tmp_path / "out").exists()


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which `requant` is this package."""
    text = command.replace("requant", f"'{sys.executable}' -m requant", 1)
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_does_not_import_torch() -> None:
    probe = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from requant.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "Usage: " in result.stdout and result.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_goes_away() -> None:
    result = shell("(requant recipes; echo $? >&2) | true")
    assert result.stderr == "0\n"


def test_a_full_stdout() -> None:
    result = shell("requant recipes --json >/dev/full")
    assert result.returncode == 2
    assert result.stderr == "error: cannot write to stdout: No space left on device\n"


def test_a_terminal_without_unicode() -> None:
    result = shell("requant recipes", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 0 and "int4" in result.stdout and result.stdout.isascii()


def test_a_folder_whose_name_is_not_text(source: Source, tmp_path: Path) -> None:
    link = os.fsencode(tmp_path) + b"/\xff[bold]:smile:"
    os.symlink(source("bf16"), link)
    folder = os.fsdecode(link)
    document = check(["plan", folder, "--to", "bf16"], human=["\\udcff[bold]:smile:"])
    assert document["source"] == folder


def test_the_demo_is_converted_verified_and_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert = ["convert", "demo", out, "--to", "int8-channel", "--device", "cpu"]
    document = json.loads(invoke(*convert, "--verify", "--json").stdout)
    assert CONVERT_KEYS <= set(document) and VERIFY_KEYS <= set(document["verify"])
    assert document["verify"]["ok"]

    verify = ["verify", "demo", out, "--tokens", "32", "--device", "cpu"]
    verdict = check(verify, human=["PASS"], json_keys=VERIFY_KEYS)
    assert set(verdict["layers"][0]) >= {"layer", "relative_error"}
    assert set(verdict["tensors"]) >= {"checked", "identical", "worst"}
    verdict = check([*verify, "--max-kl", "0"], exit=1, human=["FAIL"], json_keys=VERIFY_KEYS)
    assert not verdict["ok"] and verdict["max_kl"] == 0
    result = invoke(*convert, "--verify", "--max-kl", "0", "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["verify"]["ok"]

    run = ["run", out, "The function", "--max-tokens", "4", "--device", "cpu"]
    text = check(run, human=["The function"], json_keys={"text", "tokens", "seconds"})["text"]
    assert (
        invoke("run", out, "--max-tokens", "4", stdin="The function").stdout.strip()
        == ("The function" + text).strip()
    )
    assert invoke("run", out, stdin=b"\xff").exit_code == 2


def test_the_demo_is_downloaded(tmp_path: Path) -> None:
    keys = {"source", "output", "files", "written_bytes"}
    result = invoke("download", "demo", tmp_path / "a", "--json")
    assert result.exit_code == 0 and keys <= set(json.loads(result.stdout))
    assert invoke("download", "demo", tmp_path / "b").output.startswith(
        f"{len(hashes(tmp_path / 'b'))} files written to"
    )
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_shard_and_merge(tmp_path: Path) -> None:
    plan = check(["plan", "demo", "--tp", 1, "--ep", 2], human=["tp=1 ep=2 pp=1", "rank 0"],
                 json_keys=PLAN_KEYS | {"ranks"})  # fmt: skip
    ranks = plan["ranks"]
    assert sum(ranks["rank_bytes"]) == ranks["source_bytes"] + ranks["replicated_bytes"]
    done = check(["shard", "demo", tmp_path / "ranks", "--tp", 1, "--ep", 2],
                 human=["tp=1 ep=2"], json_keys=CONVERT_KEYS | {"ranks"})  # fmt: skip
    sizes = [path.stat().st_size for path in (tmp_path / "ranks").rglob("*.safetensors")]
    assert done["written_bytes"] == plan["written_bytes"] == sum(sizes)
    check(["merge", tmp_path / "ranks", tmp_path / "whole"], json_keys=CONVERT_KEYS)
    check(["inspect", tmp_path / "ranks"], json_keys=INSPECT_KEYS)
    demo = Path(check(["plan", "demo", "--to", "bf16"])["source"])
    for path in demo.iterdir():
        assert (tmp_path / "whole" / path.name).read_bytes() == path.read_bytes(), path.name


def test_convert_and_cut_in_one_pass(tmp_path: Path) -> None:
    check(["convert", "demo", tmp_path / "once", "--to", "bf16", "--ranks", 2], human=["tp=2 ep=2"])
    check(["convert", "demo", tmp_path / "whole", "--to", "bf16"])
    check(["shard", tmp_path / "whole", tmp_path / "twice", "--ranks", 2])
    for path in (tmp_path / "once").rglob("*.safetensors"):
        assert (
            path.read_bytes()
            == (tmp_path / "twice" / path.relative_to(tmp_path / "once")).read_bytes()
        )


def test_experts_by_their_load(tmp_path: Path) -> None:
    config = json.loads(
        (Path(check(["plan", "demo", "--to", "bf16"])["source"]) / "config.json").read_text()
    )
    loads = list(range(config["n_routed_experts"], 0, -1))
    (tmp_path / "loads.json").write_text(json.dumps(loads))
    placed = ["--tp", 1, "--ep", 2, "--expert-placement", tmp_path / "loads.json"]
    plan = check(["plan", "demo", *placed, "--redundant-experts", 2])
    assert plan["ranks"]["redundant_experts"] == 2
    check(["shard", "demo", tmp_path / "ranks", *placed, "--redundant-experts", 2])
    check(["merge", tmp_path / "ranks", tmp_path / "whole"])


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["shard", "demo", "OUT"], "give --ranks, or --tp, --ep or --pp"),
        (["shard", "demo", "OUT", "--ranks", 2], "is not legal: model.layers.0.self_attn.q_b_proj"),
        (["shard", "demo", "OUT", "--ranks", 3, "--ep", 2], "ranks 3, ep 2"),
        (["shard", "demo", "OUT", "--ranks", 2, "--layout", "other"], "expected hf or deepseek"),
        (["shard", "demo", "OUT", "--ep", 2, "--layout", "deepseek"], "takes --ranks and nothing"),
        (["shard", "demo", "OUT", "--ep", 2, "--tp", 1, "--redundant-experts", 1], "load"),
        (["plan", "demo"], "give either --to FORMAT or --recipe"),
        (["plan", "demo", "--to", "bf16", "--replicate", "attention"], "no effect without --ranks"),
        (["shard", "demo", "OUT", "--ep", 2, "--replicate", "norm"], "norm"),
        (["convert", "demo", "OUT", "--to", "int4", "--ranks", 2], "is not legal"),
        (["merge", "demo", "OUT"], "ranks.json"),
        (["merge", "/no/where", "OUT"], "/no/where"),
    ],
)  # fmt: skip
def test_cuts_that_are_refused(args: list[Any], error: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check([out if arg == "OUT" else arg for arg in args], exit=2, error=error)
    assert not out.exists()
