"""`requant verify SRC RANKS` by running the ranks, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from requant.convert.parallel import Parallel
from requant.convert.placement import Loads
from requant.convert.plan import make_plan
from requant.convert.ranks import split
from requant.convert.recipe import KEEP, default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.shard import as_written, shard
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.errors import RequantError
from requant.verify import launch
from requant.verify.comparison import verify
from requant.verify.launch import ranks_in

from .rank_processes import TOKENS, verdicts

Tensors = dict[str, torch.Tensor]
#: Of the demo's logits, which reach 17.
SAME_LOGITS = 1e-4
LOADS: Loads = {None: [9, 8, 7, 6, 5, 4, 3, 2]}
EXPERTS = "model.layers.2.mlp.experts"

#: name -> source, format it is converted to in the same pass, cut, redundant experts
CUTS: dict[str, tuple[str, str | None, Parallel, int]] = {
    "ep2": ("demo", None, Parallel(1, 2), 0),
    "pp2": ("demo", None, Parallel(1, 1, 2), 0),
    "tp2": ("bf16", None, Parallel(2, 1), 0),
    "int4": ("demo", "int4", Parallel(1, 2), 0),
    "ep4": ("demo", None, Parallel(1, 4), 0),
    "copies": ("demo", None, Parallel(1, 4), 4),
    "tp4": ("bf16", None, Parallel(4, 4), 0),
    "tp4-ep2": ("bf16", None, Parallel(4, 2), 0),
    "tp2-ep4": ("bf16", None, Parallel(2, 4), 0),
    "tp2-pp2": ("bf16", None, Parallel(2, 2, 2), 0),
}


def edit(ranks: Path, rank: int, name: str, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of the file of a rank that holds `name`."""
    for file in (ranks / f"rank-{rank:03}").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors)
            save_file(tensors, file, {"format": "pt"})
            return
    raise AssertionError(f"rank {rank} has no {name}")


def flip_a_bit(ranks: Path) -> None:
    name = f"{EXPERTS}.5.up_proj.weight"
    edit(ranks, 1, name, lambda tensors: tensors[name].view(torch.uint8)[3, 7].bitwise_xor_(1))


def swap_experts(ranks: Path) -> None:
    def change(tensors: Tensors) -> None:
        for part in ("weight", "weight_scale_inv"):
            a, b = (f"{EXPERTS}.{expert}.gate_proj.{part}" for expert in (4, 5))
            tensors[a], tensors[b] = tensors[b], tensors[a]

    edit(ranks, 1, f"{EXPERTS}.4.gate_proj.weight", change)


def spoil_heads(ranks: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    edit(ranks, 3, name, lambda tensors: tensors[name][:9].mul_(-1))


def spoil_a_copy(ranks: Path) -> None:
    """A tensor that every rank of a stage has: attention where only experts are spread."""
    name = "model.layers.3.self_attn.o_proj.weight"
    edit(ranks, 2, name, lambda tensors: tensors[f"{name}_scale_inv"].mul_(1.5))


def spoil_a_scale(ranks: Path) -> None:
    name = f"{EXPERTS}.6.down_proj.weight_scale"
    edit(ranks, 1, name, lambda tensors: tensors[name].neg_())


def leave_not_a_number(ranks: Path) -> None:
    name = f"{EXPERTS}.5.up_proj.weight"
    edit(ranks, 1, name, lambda tensors: tensors[name].view(torch.uint8)[3, 7].fill_(0x7F))


def truncate(ranks: Path) -> None:
    file = max((ranks / "rank-001").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1000)


#: name -> cut, damage
DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bit": ("ep2", flip_a_bit),
    "swap": ("ep2", swap_experts),
    "nan": ("ep2", leave_not_a_number),
    "truncated": ("ep2", truncate),
    "scale": ("int4", spoil_a_scale),
    "heads": ("tp2-ep4", spoil_heads),
    "copy": ("ep4", spoil_a_copy),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources, cuts and damaged cuts, by name."""
    place = tmp_path_factory.mktemp("ranks")
    how = Runtime(torch.device("cpu"), 1)
    made = {"demo": demo_path(), "bf16": place / "bf16"}
    convert(make_plan(Checkpoint.open(made["demo"]), default_recipe("bf16")), made["bf16"], how)
    for name, (source, form, parallel, copies) in CUTS.items():
        recipe = KEEP if form is None else default_recipe(form)
        plan = make_plan(Checkpoint.open(made[source]), recipe)
        loads = LOADS if copies else None
        made[name] = place / name
        convert(shard(plan, split(as_written(plan), parallel, loads, copies)), made[name], how)
    for name, (of, damage) in DAMAGE.items():
        made[name] = place / name
        shutil.copytree(made[of], made[name])
        damage(made[name])
    return made


@pytest.fixture(scope="module")
def found(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The verdict on every cut, by as many processes as it has ranks."""
    results: dict[str, dict[str, Any]] = {}
    for count in (2, 4):
        cuts = {name: name for name in CUTS} | {name: of for name, (of, _) in DAMAGE.items()}
        names = [name for name, of in cuts.items() if CUTS[of][2].ranks == count]
        jobs = [(folders[CUTS[cuts[name]][0]], folders[name]) for name in names]
        place = tmp_path_factory.mktemp("processes") / str(count)
        results |= zip(names, verdicts(count, jobs, place), strict=True)
    return results


@pytest.mark.parametrize("name", [name for name in CUTS if name != "int4"])
def test_ranks_give_the_unsharded_logits(name: str, found: dict[str, dict[str, Any]]) -> None:
    verdict = found[name]
    assert verdict["ok"], verdict
    assert verdict["logits"] < SAME_LOGITS
    assert verdict["kl"] < 1e-9 and verdict["mtp"]["kl"] < 1e-9
    assert verdict["tokens"] == TOKENS and verdict["max_kl"] == 1e-5
    tensors, parallel = verdict["tensors"], CUTS[name][2]
    assert tensors["checked"] == tensors["identical"] == sum(r["checked"] for r in verdict["ranks"])
    assert [rank["rank"] for rank in verdict["ranks"]] == list(range(parallel.ranks))
    assert [layer["layer"] for layer in verdict["layers"]] == [0, 1, 2, 3, 4]
    for layer in verdict["layers"]:
        assert len(layer["ranks"]) == parallel.stage_size
        assert layer["relative_error"] == max(layer["ranks"].values()) < 1e-6


def test_quantized_ranks_are_within_the_limit(
    found: dict[str, dict[str, Any]], folders: dict[str, Path]
) -> None:
    """And give what the same weights give in one process, joined as they are read."""
    verdict = found["int4"]
    assert verdict["ok"], verdict
    assert 0.002 < verdict["kl"] < verdict["max_kl"]
    joined = verify(folders["demo"], folders["int4"], tokens=TOKENS)
    assert verdict["kl"] == pytest.approx(joined["kl"], rel=1e-3)
    assert joined["ranks"] == [] and "ranks" not in joined["layers"][0]


@pytest.mark.parametrize(
    ("name", "rank", "layer", "tensors"),
    [
        ("bit", 1, 2, [f"{EXPERTS}.5.up_proj.weight"]),
        ("swap", 1, 2, [f"{EXPERTS}.{expert}.gate_proj.weight" for expert in (4, 5)]),
        ("nan", 1, 2, [f"{EXPERTS}.5.up_proj.weight"]),
        ("scale", 1, 2, [f"{EXPERTS}.6.down_proj.weight"]),
        ("heads", 3, 1, ["model.layers.1.self_attn.o_proj.weight"]),
        ("copy", 2, 3, ["model.layers.3.self_attn.o_proj.weight"]),
    ],
)
def test_damage_is_told_by_rank_and_first_layer(
    name: str, rank: int, layer: int, tensors: list[str], found: dict[str, dict[str, Any]]
) -> None:
    verdict = found[name]
    assert not verdict["ok"]
    problems = verdict["problems"]
    many = f"{len(tensors)} weights differ" if len(tensors) > 1 else "1 weight differs"
    assert problems[0] == f"rank {rank}: {many} from the source's, first in layer {layer}"
    for tensor in tensors:
        assert any(problem.startswith(f"rank {rank}: {tensor}: ") for problem in problems)
    blamed = {problem.split(":")[0] for problem in problems if problem.startswith("rank")}
    assert blamed == {f"rank {rank}"}
    for report in verdict["ranks"]:
        guilty = report["rank"] == rank
        assert report["wrong"] == (len(tensors) if guilty else 0)
        assert report["first_layer"] == (layer if guilty else None)


@pytest.mark.parametrize(("name", "layer"), [("swap", 2), ("nan", 2), ("heads", 1), ("copy", 3)])
def test_the_first_layer_that_runs_differently_is_told(
    name: str, layer: int, found: dict[str, dict[str, Any]]
) -> None:
    told = [p for p in found[name]["problems"] if "the first whose hidden state differs" in p]
    assert len(told) == 1 and told[0].startswith(f"layer {layer}: ")


def test_a_swap_is_recognised(found: dict[str, dict[str, Any]]) -> None:
    problems = " ".join(found["swap"]["problems"])
    assert f"it looks swapped with {EXPERTS}.5.gate_proj.weight" in problems


def test_a_truncated_file_names_its_rank(found: dict[str, dict[str, Any]]) -> None:
    verdict = found["truncated"]
    assert not verdict["ok"] and verdict["kl"] is None and verdict["ranks"] == []
    assert "rank-001" in verdict["problems"][0] and "truncated" in verdict["problems"][0]


def run_verify(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "requant", "verify", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_starts_a_process_for_each_rank(folders: dict[str, Path]) -> None:
    done = run_verify("demo", folders["bit"], "--tokens", TOKENS, "--json")
    assert done.returncode == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert [rank["wrong"] for rank in verdict["ranks"]] == [0, 1]
    assert done.stderr == ""


def test_an_error_is_told_once(folders: dict[str, Path]) -> None:
    done = run_verify(folders["ep2"] / "absent", folders["ep2"])
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "no such folder" in errors[0]


def test_the_number_of_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    assert ranks_in(folders["tp4"]) == 4
    assert ranks_in(folders["demo"]) == ranks_in(tmp_path) == 1
    (tmp_path / "ranks.json").write_text("[]")
    assert ranks_in(tmp_path) == 1  # verify tells what is wrong with it


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Wait for shells with these scripts as if they were the processes of ranks."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    started: list[subprocess.Popen[bytes]] = []

    def run(*scripts: str) -> int:
        started.extend(subprocess.Popen(["sh", "-c", script]) for script in scripts)
        return launch._wait(started)

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("scripts", "code"),
    [(("exit 0", "exit 0"), 0), (("exit 1", "exit 0"), 1), (("exit 2", "exit 70"), 70),
     (("sleep 60", "exit 2"), 2)],
    ids=str,
)  # fmt: skip
def test_the_exit_status_is_the_gravest(
    scripts: tuple[str, ...], code: int, shell: Callable[..., int]
) -> None:
    assert shell(*scripts) == code


def test_a_process_that_was_killed_is_an_error(shell: Callable[..., int]) -> None:
    with pytest.raises(RequantError, match="rank 1 was killed by signal 9"):
        shell("sleep 60", "kill -9 $$")
