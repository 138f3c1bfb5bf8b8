"""Checkpoints that lie: a few hundred here, thousands by `bench/fuzz.py`."""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.source import Checkpoint
from requant.errors import RequantError
from requant.quant.compressed_tensors import stored_scheme

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_spoilt_checkpoints_work_or_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/fuzz.py", "--cases", "400", "--json", "--dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["findings"] == [] and report["ok"] and report["cases"] == 400
    assert min(report["outcomes"][key] for key in ("worked", "refused")) > 50  # both are exercised
    assert report["mutations"] > 200


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        return importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def seeds(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found: list[Path] = fuzz.make_seeds(tmp_path_factory.mktemp("fuzz") / "seeds")
    return found


def refuse(message: str) -> None:
    raise RequantError(message)


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "none": (lambda folder, out: None, "worked"),
    "refusal": (lambda folder, out: refuse(f"{folder}: no"), "refused"),
    "refusal that names nothing": (lambda folder, out: refuse("no"), "message that names nothing"),
    "two lines": (lambda folder, out: refuse(f"{folder}:\nno"), "message of many lines or letters"),
    "another exception": (lambda folder, out: {}["x"], "KeyError"),
    "exit": (lambda folder, out: sys.exit(0), "SystemExit"),
    "hang": (lambda folder, out: time.sleep(5), "hang"),
    "slow": (lambda folder, out: [n * n for n in range(3_000_000)] and None, "slow"),
    "a file beside OUT": (lambda folder, out: (out.parent / "x").touch(), "wrote outside OUT"),
    "a file in the source": (lambda folder, out: (folder / "x").touch(), "wrote outside OUT"),
    "what lies outside": (
        lambda folder, out: (out.mkdir(), (out / "x").write_bytes(b"SECRET: never to be copied")),
        "copied what lies outside",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_harness_sees_what_goes_wrong(
    fault: str,
    fuzz: ModuleType,
    seeds: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do, outcome = FAULTS[fault]

    def use(folder: Path, out: Path, chance: Any) -> None:
        do(folder, out)

    monkeypatch.setattr(fuzz, "use", use)
    # None at all sets no alarm, and makes everything slow.
    monkeypatch.setattr(fuzz, "SECONDS", {"slow": 0, "hang": 0.1}.get(fault, 2))
    verdict = fuzz.one_case(3, 0, seeds, tmp_path / "case")
    assert verdict.outcome == outcome
    assert verdict.finding == (outcome not in ("worked", "refused"))
    assert not (tmp_path / "case").exists()


def test_a_case_depends_on_its_number_alone(
    fuzz: ModuleType, seeds: list[Path], tmp_path: Path
) -> None:
    first, again = (fuzz.one_case(5, 7, seeds, tmp_path / "case") for _ in range(2))
    assert (first.what, first.outcome, first.message) == (again.what, again.outcome, again.message)


def edit_config(**changes: Any) -> Callable[[Path], object]:
    """Set keys of config.json; `quantization` those of its quantization_config."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.get("quantization_config", {}).update(changes.pop("quantization", {}))
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def add_tensor(name: str, *shape: int) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = min(folder.glob("*.safetensors"))
        save_file(load_file(path) | {name: torch.empty(shape)}, path)

    return edit


def group(target: str) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return {"targets": [target], "weights": weights, "format": "pack-quantized"}


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


#: What fuzzing has found: the seed, the edit, and the refusal; None where it is to work.
FOUND: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    "2**40 experts without a byte": (
        "llama4", add_tensor("model.layers.1.mlp.experts.gate_up_proj", 1 << 40, 0, 2), None,
    ),
    "a number for quantization_config": (
        "fused-fp8", edit_config(quantization_config=7), None,
    ),
    "block size of nothing": (
        "fused-fp8", edit_config(quantization={"weight_block_size": [0, 0]}), "weight_block_size",
    ),
    "a pattern that takes for ever": (
        "mixed", edit_config(quantization={"config_groups": {
            "a": group(r"re:(\w+\.?)+!"), "b": group("Linear")}}), "repeats a group",
    ),
    "config_groups a number": (
        "int4", edit_config(quantization={"config_groups": 7}), "reads|group_size|config",
    ),
    "config_groups of lists": (
        "fp8-channel", edit_config(quantization={"config_groups": [[], {}]}), None,
    ),
    "no experts": (
        "plain", add_tensor("model.layers.1.mlp.experts.gate_up_proj", 0, 2, 2), None,
    ),
    "infinite context": (
        "plain", edit_config(max_position_embeddings=float("inf"), num_hidden_layers=1e999), None,
    ),
    "config a FIFO": ("plain", replace("config.json", os.mkfifo), "config.json: not a regular"),
    "config without end": (
        "plain", replace("config.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file",
    ),
    "config of 16 GB": (
        "plain", replace("config.json", lambda p: (p.touch(), os.truncate(p, 1 << 34))),
        "not a regular file of at most",
    ),
}  # fmt: skip


@pytest.fixture
def little_memory(fuzz: ModuleType) -> Iterator[None]:
    before = fuzz.limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("case", FOUND)
def test_found_by_fuzzing(case: str, fuzz: ModuleType, seeds: list[Path], tmp_path: Path) -> None:
    stored, edit, message = FOUND[case]
    origin = next(seed for seed in seeds if seed.name.endswith(stored))
    folder = shutil.copytree(origin, tmp_path / "model")
    edit(folder)
    with fuzz.time_limit():
        if message is None:
            fuzz.use(folder, tmp_path / "out", random.Random(0))
        else:
            with pytest.raises(RequantError, match=message) as refused:
                fuzz.use(folder, tmp_path / "out", random.Random(0))
            assert str(folder) in str(refused.value)


def test_a_weight_narrower_than_its_scales(seeds: list[Path], tmp_path: Path) -> None:
    """FP8 codes one column wide have fewer bytes than their scales."""
    origin = next(seed for seed in seeds if seed.name.endswith("fp8-channel"))
    folder = shutil.copytree(origin, tmp_path / "model")
    path, name = min(folder.glob("*.safetensors")), "model.layers.0.mlp.up_proj.weight"
    narrow = {
        name: torch.zeros(128, 1).to(torch.float8_e4m3fn),
        name + "_scale": torch.ones(128, 1),
    }
    save_file(load_file(path) | narrow, path)
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    (planned,) = (weight for weight in plan.weights if weight.source.name == name)
    assert planned.codec is not None


def test_a_container_that_is_no_name_is_not_handed_on() -> None:
    scheme = group("Linear")
    assert stored_scheme({"config_groups": {"a": scheme}}) is not None
    assert stored_scheme({"config_groups": {"a": scheme | {"format": ["x"]}}}) is None
