"""Several processes, one result: who does what, who speaks, and what is left when one dies."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from requant.cli import app
from requant.convert import processes
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, PART_NAME, Journal
from requant.convert.plan import Plan, make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from tests.convert.team import launched, meet_first, slowly, tell, together, wait_until
from tests.helpers import CPU, SIDE_FILES, hashes, load, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "PROCESSES.md").read_text("utf-8")
FILES = 8
TO = "int4[group_size=64]"


@pytest.fixture(scope="session")
def many(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small FP8 checkpoint in many files; scales lie in other files than their weights."""
    tensors = load(source("fp8-block"))
    config = json.loads((source("fp8-block") / "config.json").read_text())
    places = {
        name: f"model-{number % FILES + 1:05}-of-{FILES:05}.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    folder = tmp_path_factory.mktemp("many") / "model"
    write_checkpoint(folder, tensors, config, places.__getitem__)
    (folder / "LICENSE").write_bytes(SIDE_FILES["LICENSE"])
    return folder


@pytest.fixture(scope="session")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of what one undisturbed process writes, in this one."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(planned(many), out, Runtime(CPU, 2))
    return hashes(out)


def planned(folder: Path, to: str = TO) -> Plan:
    return make_plan(Checkpoint.open(folder), default_recipe(to))


def weights(out: Path) -> dict[str, int]:
    """The finished weight files, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("count", [2, 4])
def test_all_take_part_and_the_bytes_are_the_same(
    count: int, many: Path, whole: dict[str, str], out: Path, tmp_path: Path
) -> None:
    arguments = [many, out, "--to", TO, "--workers", 2, "--json"]
    codes, children = together(count, arguments, tmp_path, meet_first, tell)
    assert codes == [0] * count, children[0].stderr
    assert hashes(out) == whole
    assert all(child.wrote for child in children)
    names = sorted(name for child in children for name in child.wrote)
    assert names == sorted(weights(out)) and len(names) == FILES
    # One process speaks, and says one thing.
    document = json.loads(children[0].stdout)
    assert document["files"] == FILES and document["resumed_files"] == 0
    assert children[0].stdout.count("\n") == 1
    assert [child.stdout for child in children[1:]] == [""] * (count - 1)


def test_more_processes_than_files(source: Callable[[str], Path], out: Path) -> None:
    folder = source("bf16")
    convert(planned(folder, "fp8-block"), out.parent / "whole", Runtime(CPU, 1))
    codes, children = together(5, [folder, out, "--to", "fp8-block", "-q"], out.parent, tell)
    assert codes == [0] * 5 and hashes(out) == hashes(out.parent / "whole")
    assert sum(len(child.wrote) for child in children) == 3


def test_a_finished_conversion_is_left_as_it_is_by_all(many: Path, out: Path) -> None:
    convert(planned(many), out, Runtime(CPU, 2))
    before = hashes(out)
    codes, children = together(2, [many, out, "--to", TO, "--json"], out.parent, tell)
    assert codes == [0, 0] and hashes(out) == before
    assert json.loads(children[0].stdout)["resumed_files"] == FILES
    assert not children[0].wrote and not children[1].wrote


@pytest.mark.parametrize("victims", [{0}, {0, 1, 2, 3}], ids=["the first", "all"])
def test_killed_in_the_middle_and_continued_by_other_numbers(
    victims: set[int], many: Path, whole: dict[str, str], out: Path, tmp_path: Path
) -> None:
    arguments = [many, out, "--to", TO, "--workers", 1, "--json"]
    kept: dict[str, int] = {}
    for count in (2, 1, 4):
        with launched(count, lambda rank: arguments, tmp_path, slowly) as children:
            wait_until(partial(more_than, len(kept), out))
            for rank in victims & set(range(count)):
                children[rank].signal(signal.SIGKILL)
            codes = [child.wait() for child in children]
        for rank, child in enumerate(children):
            assert codes[rank] == (-signal.SIGKILL if rank in victims else 2), child.stderr
            assert rank in victims or is_alone(child.stderr)
        # Nothing looks complete, and what was finished is final.
        left = hashes(out)
        assert not {"config.json", MANIFEST_NAME} & set(left)
        with pytest.raises(CheckpointError):
            Checkpoint.open(out)
        assert all(left[name] == whole[name] for name in weights(out))
        assert kept.items() <= weights(out).items()
        kept = recorded(out)
    assert len(kept) < FILES
    codes, children = together(2, arguments, tmp_path, tell)
    assert codes == [0, 0] and hashes(out) == whole
    assert kept.items() <= weights(out).items()
    assert json.loads(children[0].stdout)["resumed_files"] == len(kept) > 0
    written = sorted(name for child in children for name in child.wrote)
    assert written == sorted(weights(out).keys() - kept.keys())


def test_the_first_goes_on_alone_and_leaves_the_end_to_the_next_run(
    many: Path, whole: dict[str, str], out: Path, tmp_path: Path
) -> None:
    """Unless the launcher stops it. The other one may have been about to write."""
    arguments = [many, out, "--to", TO, "--workers", 1]
    with launched(2, lambda rank: arguments, tmp_path, meet_first, slowly) as children:
        wait_until(partial(more_than, 0, out))
        children[1].signal(signal.SIGKILL)
        assert children[0].wait() == 2 and is_alone(children[0].stderr)
    assert not {"config.json", MANIFEST_NAME} & set(hashes(out))
    assert convert(planned(many), out, Runtime(CPU, 1))["resumed_files"] >= len(weights(out)) - 1
    assert hashes(out) == whole


def more_than(count: int, out: Path) -> bool:
    """Whether so many weight files are finished, and journals know them."""
    return len(recorded(out)) > count


def recorded(out: Path) -> dict[str, int]:
    """The weight files that journals know, and when each was written."""
    try:
        text = "".join(path.read_text() for path in out.glob(".requant-journal*.jsonl"))
    except FileNotFoundError:  # the first process has taken a journal over; its own knows all of it
        return recorded(out)
    return {name: time for name, time in weights(out).items() if f'"{name}"' in text}


def is_alone(stderr: str) -> bool:
    """Whether a process says, once and in one line, that another one is gone."""
    said = "error: another process of this run is gone"
    return stderr.count("error: ") == stderr.count(said) == 1 and "Traceback" not in stderr


def test_one_that_outlives_the_first_keeps_out_claimed(
    many: Path, whole: dict[str, str], out: Path, tmp_path: Path
) -> None:
    arguments = [many, out, "--to", TO, "--workers", 1]
    with launched(2, lambda rank: arguments, tmp_path, slowly) as (leader, orphan):
        wait_until(lambda: (out / PART_NAME.format(1)).exists() and weights(out))
        orphan.signal(signal.SIGSTOP)
        leader.signal(signal.SIGKILL)
        leader.wait()
        before = hashes(out)
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="another requant is writing to it"):
                convert(planned(many), out, Runtime(CPU, 1), overwrite=overwrite)
        assert hashes(out) == before
        orphan.signal(signal.SIGCONT)
        assert orphan.wait() == 2
    assert convert(planned(many), out, Runtime(CPU, 1))["resumed_files"] > 0
    assert hashes(out) == whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_journals_of_others_alone_do_not_lock_out(
    overwrite: bool, many: Path, whole: dict[str, str], out: Path
) -> None:
    """The first process failed, and removed its own, before another made its."""
    out.mkdir()
    Journal(out, planned(many).key, 1).close()
    convert(planned(many), out, Runtime(CPU, 2), overwrite=overwrite)
    assert hashes(out) == whole


@pytest.mark.parametrize("reason", ["another is writing", "something else", "in the source"])
def test_when_the_first_cannot_claim_out_it_says_so_once(
    reason: str, many: Path, out: Path, tmp_path: Path
) -> None:
    messages = {"another is writing": "another requant is writing to it",
                "something else": "already holds something else",
                "in the source": "lies in the source folder"}  # fmt: skip
    target = many / "out" if reason == "in the source" else out
    out.mkdir()
    journal = Journal(out, planned(many).key) if reason == "another is writing" else None
    if reason == "something else":
        (out / "notes.txt").write_text("mine")
    before = hashes(out)
    codes, children = together(3, [many, target, "--to", TO, "--json"], tmp_path)
    if journal is not None:
        journal.close()
    assert codes == [2, 2, 2] and hashes(out) == before
    assert messages[reason] in children[0].stderr and children[0].stderr.count("\n") == 1
    assert [child.stderr for child in children[1:]] == ["", ""]
    assert [child.stdout for child in children] == [""] * 3


def test_different_recipes_are_refused(many: Path, out: Path, tmp_path: Path) -> None:
    def arguments(rank: int) -> list[object]:
        return [many, out, "--to", "bf16" if rank else TO]

    with launched(2, arguments, tmp_path, tell) as children:
        codes = [child.wait() for child in children]
    assert codes == [2, 2]
    assert "process 1 of this run plans something else than process 0" in children[1].stderr
    assert "Traceback" not in children[0].stderr
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: a launcher such as torchrun sets it to a number"),
        ({"WORLD_SIZE": "2"}, "cannot reach the other processes of this run"),
    ],
)
def test_an_environment_that_makes_no_sense(
    variables: dict[str, str], message: str, many: Path, out: Path, monkeypatch: Any
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["convert", str(many), str(out), "--to", "bf16"])
    assert result.exit_code == 2 and message in result.stderr and not out.exists()


def test_workers_do_not_wait_for_a_launcher_that_was_killed(
    many: Path, out: Path, monkeypatch: Any
) -> None:
    """It was there before them, so nobody is going to answer."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "ANSWERING", timedelta(milliseconds=100))
    monkeypatch.setattr(processes, "JOINING", timedelta(seconds=1))
    result = CliRunner().invoke(app, ["convert", str(many), str(out), "--to", "bf16"])
    assert result.exit_code == 2 and not out.exists()
    assert "cannot reach the other processes of this run" in result.stderr
    assert "timed out after 100ms" in result.stderr


def commands() -> list[str]:
    """The lines of the page that launch something, continued ones joined."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split()[:1] in (["torchrun"], ["accelerate"])]


@pytest.mark.slow
@pytest.mark.parametrize("out_name", sorted({shlex.split(c)[-3] for c in commands()}))
def test_commands_of_the_page_give_the_bytes_of_one_process(out_name: str, tmp_path: Path) -> None:
    """Those that share OUT run at the same time, as on several hosts."""
    from requant.demo import demo_path

    shared = [shlex.split(line) for line in commands() if shlex.split(line)[-3] == out_name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = {"node0.example": "127.0.0.1", "29500": port}
    runs = [
        subprocess.Popen(
            [names.get(word, word) for word in words] + ["--json"],
            cwd=tmp_path, env={**os.environ, "PATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for words in shared
    ]  # fmt: skip
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), said
    documents = [line for stdout, _ in said for line in stdout.splitlines()]
    assert len(documents) == 1 and json.loads(documents[0])["files"] == 4
    convert(planned(demo_path(), "int4"), tmp_path / "whole", Runtime(CPU, 2))
    assert hashes(tmp_path / out_name) == hashes(tmp_path / "whole")
    assert JOURNAL_NAME not in hashes(tmp_path / out_name)
