"""The verdict on trained weights and the built-in held-out text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.verify.comparison import verify

TOKENS = 512
Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.2.mlp.experts.3"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "int4"
    plan = make_plan(Checkpoint.open(demo_path()), default_recipe("int4"))
    convert(plan, out, Runtime(torch.device("cpu"), 1))
    return out


@pytest.fixture
def damaged(int4: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], dict[str, Any]]:
    """The verdict on a copy of the INT4 demo with the file that holds EXPERT edited."""

    def get(edit: Callable[[Tensors], object]) -> dict[str, Any]:
        out = tmp_path / "out"
        shutil.copytree(int4, out)
        checkpoint = Checkpoint.open(out)
        file = out / checkpoint.weights[f"{EXPERT}.gate_proj.weight"].file
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})
        verdict = verify(demo_path(), out, tokens=TOKENS)
        assert not verdict["ok"]
        return verdict

    return get


def test_a_copy_of_the_demo_is_exact(tmp_path: Path) -> None:
    shutil.copytree(demo_path(), tmp_path / "copy")
    verdict = verify(demo_path(), tmp_path / "copy", tokens=TOKENS)
    assert verdict["ok"], verdict["problems"]
    assert verdict["kl"] == verdict["mtp"]["kl"] == 0
    assert verdict["perplexity_source"] < 40


def test_int4_passes(int4: Path) -> None:
    verdict = verify(demo_path(), int4, tokens=TOKENS)
    assert verdict["ok"], verdict["problems"]
    assert 0.002 < verdict["kl"] < 0.05
    assert verdict["top1_agreement"] > 0.85
    assert [layer["layer"] for layer in verdict["layers"]] == [0, 1, 2, 3, 4]


def test_searched_scales_beat_rounding(int4: Path, tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(demo_path()), default_recipe("int4[method=mse]"))
    convert(plan, tmp_path / "mse", Runtime(torch.device("cpu"), 2))
    searched, rounded = (verify(demo_path(), out, tokens=2048) for out in (tmp_path / "mse", int4))
    assert searched["ok"] and rounded["ok"] and searched["kl"] < rounded["kl"]


def test_one_zeroed_expert_is_named(
    damaged: Callable[[Callable[[Tensors], object]], dict[str, Any]],
) -> None:
    name = f"{EXPERT}.down_proj.weight"
    verdict = damaged(lambda tensors: tensors[f"{name}_scale"].zero_())
    (problem,) = [p for p in verdict["problems"] if not p.startswith("KL")]
    assert problem.startswith(f"{name}: is all zero")


def test_swapped_gate_and_up_of_one_expert_are_named(
    damaged: Callable[[Callable[[Tensors], object]], dict[str, Any]],
) -> None:
    def edit(tensors: Tensors) -> None:
        for part in ("weight_packed", "weight_scale"):
            gate, up = f"{EXPERT}.gate_proj.{part}", f"{EXPERT}.up_proj.{part}"
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    problems = damaged(edit)["problems"]
    for module, other in (("gate", "up"), ("up", "gate")):
        (problem,) = [p for p in problems if p.startswith(f"{EXPERT}.{module}_proj.weight: ")]
        assert f"it looks swapped with {EXPERT}.{other}_proj.weight" in problem
