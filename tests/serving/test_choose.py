"""The chosen recipe loads, plans and fits, always the same, and nothing that fits is better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe, load_recipe
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.quant import format_name, parse_format
from requant.quant.plain import Plain
from requant.serving.choose import choose
from requant.serving.hardware import Gpus, parse_gpus
from requant.serving.inventory import Inventory
from requant.serving.memory import Demand
from requant.serving.quality import NOISE, PLAIN_NOISE, damage, noise
from requant.serving.report import serving_report

GB = 10**9


def test_errors_are_those_of_normally_distributed_weights() -> None:
    weights = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    energy = weights.square().sum()
    for name, said in {**NOISE, "bf16": PLAIN_NOISE}.items():
        codec = parse_format(name)
        decoded = codec.decode(codec.encode(weights, (512, 4096)), (512, 4096))
        found = float((decoded - weights).square().sum() / energy)
        assert said == pytest.approx(found, rel=0.02), name
        assert noise(codec) == said


def test_options_that_change_no_error_do_not_count() -> None:
    assert noise(parse_format("fp8-block[container=compressed-tensors]")) == NOISE["fp8-block"]
    four = parse_format("int4[symmetric=false,method=mse]")
    assert noise(four) == NOISE["int4[method=mse]"]


@pytest.mark.parametrize(
    "gpus",
    ["8x5GB", "8x5.5GB", "4xH100:9GB", "2xB200:14GB", "8xA6000:5.5GB", "8xMI300X:7GB", "3x14GB"],
)
def test_the_recipe_loads_plans_and_fits(gpus: str, small: Checkpoint, tmp_path: Path) -> None:
    made = parse_gpus(gpus)
    choice = choose(small, made, Demand(8192))
    again = choose(small, made, Demand(8192))
    assert choice is not None and again is not None and choice.text == again.text
    file = tmp_path / "fit.toml"
    file.write_text(choice.text)
    recipe = load_recipe(str(file))
    report = serving_report(make_plan(small, recipe), made, 8192, probe=False)
    assert report["fits"] and report["weights_bytes"] == choice.fit.weights
    assert report["engines"] == list(choice.engines) and choice.engines
    assert recipe.description == f"fits {made}, context 8192, batch 1"


def test_no_simple_recipe_that_fits_is_better(small: Checkpoint) -> None:
    made = parse_gpus("8x5.5GB")
    choice = choose(small, made, Demand(8192))
    assert choice is not None
    inventory, room, worse = Inventory.of(small), choice.fit.room, 0
    for name in ("int4", "int4[group_size=32]", "mxfp4"):
        sized = inventory.sized(default_recipe(name), choice.fit.parallel)
        assert sized is not None
        if sum(each.rank_bytes for each in sized) <= room:
            worse += 1
            assert damage(inventory, sized) > choice.damage
    assert worse
    # Nor is there room for two more layers of experts in FP8: 0.352 GB each, INT4's are 0.198.
    assert choice.fit.room - choice.fit.weights < 2 * (0.353 - 0.198) * GB
    assert '"model.layers.3.mlp.experts.*" = "fp8-block' in choice.text


def test_more_room_never_costs_quality(small: Checkpoint) -> None:
    costs = []
    for memory in (44, 47, 50, 53, 56, 59, 62):
        choice = choose(small, Gpus(8, memory * GB // 10), Demand(8192))
        costs.append(float("inf") if choice is None else choice.damage)
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0.0


def test_what_fits_is_kept_as_it_is(small: Checkpoint) -> None:
    choice = choose(small, parse_gpus("8xH200"), Demand(8192))
    assert choice is not None and choice.damage == 0.0
    assert {format_name(c) for c in choice.recipe.roles.values() if c} == {"fp8-block"}
    plan = make_plan(small, choice.recipe)
    assert plan.summary()["identical_tensors"] == len(plan.weights)


def test_bits_go_where_every_token_passes(small: Checkpoint) -> None:
    choice = choose(small, parse_gpus("8xH100:5.2GB"), Demand(8192))
    assert choice is not None
    names = {role: format_name(codec) for role, codec in choice.recipe.roles.items() if codec}
    assert names["routed_expert"].startswith("int4")
    assert all(names[role].startswith("fp8") for role in ("attention", "shared_expert"))


def test_fp4_only_where_it_is_multiplied(small: Checkpoint) -> None:
    ada = choose(small, parse_gpus("8xL4:5.2GB"), Demand(8192))
    blackwell = choose(small, parse_gpus("8xRTX 5090:5.2GB"), Demand(8192))
    assert ada is not None and blackwell is not None
    assert '"nvfp4' not in ada.text and '"nvfp4' in blackwell.text


def test_nothing_fits_on_too_little(small: Checkpoint) -> None:
    assert choose(small, parse_gpus("2x8GB"), Demand(8192)) is None


def test_the_demo_fits_anywhere() -> None:
    choice = choose(Checkpoint.open(demo_path()), parse_gpus("RTX 3060"), Demand(512))
    assert choice is not None and choice.damage == 0.0
    assert not any(isinstance(codec, Plain) for codec in choice.recipe.roles.values())
