"""Bytes of weights are those of real plans, and what fits is what arithmetic by hand says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from requant.convert.parallel import Parallel
from requant.convert.plan import make_plan
from requant.convert.ranks import split
from requant.convert.recipe import default_recipe, load_recipe, recipe_names
from requant.convert.run import Runtime, convert
from requant.convert.shard import as_written, shard
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.errors import CheckpointError, RequantError
from requant.quant import CODECS, format_name
from requant.serving.fit import Fit
from requant.serving.hardware import Gpus, parse_gpus
from requant.serving.inventory import Inventory
from requant.serving.memory import Demand, activation_bytes, kv_cache_bytes
from requant.serving.report import serving_report, written_by_role
from requant.serving.tables import render, verdict
from tests.convert.sparse import BF16, V2_LITE, V3, linear, plain, write_sparse
from tests.helpers import CPU

GB = 10**9
#: A model whose memory can be worked out by hand: 4 heads of 8, 2 of KV, 3 layers.
TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "vocab_size": 10,
    "max_position_embeddings": 4096,
}


#: Not those of other models' names, nor MXFP8, whose plan looks at all scales for a lossless way.
RECIPES = [name for name in recipe_names() if name not in ("v4-to-fp8", "mxfp8")]


@pytest.mark.parametrize("name", RECIPES)
def test_stacks_come_to_what_a_plan_of_every_weight_does(name: str, small: Checkpoint) -> None:
    recipe = load_recipe(name)
    inventory = Inventory.of(small)
    if name in ("nf4", "bnb-fp4", "int4-gptq", "int4-awq"):
        parallel = Parallel(1, 8)
    else:
        parallel = Parallel(8, 8)
    plan = make_plan(small, recipe)
    summary = split(as_written(plan), parallel).summary()
    sized = inventory.sized(recipe, parallel)
    assert sized is not None
    assert sum(each.nbytes for each in sized) == sum(written_by_role(plan).values())
    rank_bytes = sum(each.rank_bytes for each in sized)
    assert rank_bytes == summary["max_rank_bytes"] == summary["min_rank_bytes"]


def test_stacks_with_edges_apart_come_to_the_same(small: Checkpoint) -> None:
    recipe, parallel = load_recipe("deepseek-int4-experts"), Parallel(4, 8)
    inventory = Inventory.of(small)
    apart = inventory.with_edges(2)
    assert apart.rank_bytes(recipe, parallel) == inventory.rank_bytes(recipe, parallel)
    experts = [s for s in apart.stacks if s.item.weight.role == "routed_expert" and s.edge]
    assert {s.number for s in experts} == {4 * 64}
    assert experts[0].modules == tuple(f"model.layers.{n}.mlp.experts.*" for n in (3, 4, 7, 8))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_roles_add_up_to_what_convert_writes(codec: object, tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(demo_path()), default_recipe(format_name(codec)))  # type: ignore[arg-type]
    report = serving_report(plan, parse_gpus("24GB"), context=64, probe=False)
    assert sum(report["role_bytes"].values()) + report["header_bytes"] == plan.written_bytes
    convert(plan, tmp_path / "out", Runtime(CPU, 2))
    files = (tmp_path / "out").glob("*.safetensors")
    assert sum(f.stat().st_size for f in files) == report["cost"]["written_bytes"]
    found: dict[str, int] = {}
    for weight in Checkpoint.open(tmp_path / "out").weights.values():
        found[weight.role] = found.get(weight.role, 0) + weight.nbytes
    assert found == report["role_bytes"] == report["rank_role_bytes"]
    every = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    # Beside what is promised: what tells of the conversion itself.
    assert 0 <= sum(f.stat().st_size for f in every) - report["cost"]["output_disk_bytes"] < 50_000


def test_deepseek_v3_in_fp8_does_not_fit_on_8_gpus_of_80_gb(v3: Inventory) -> None:
    fit = of_v3(v3, "fp8-block", 8)
    assert not fit.fits and fit.max_context == 0
    assert fit.weights == 87_264_518_336
    assert fit.kv_cache == 131072 * 61 * (512 + 64) * 2 == 9_210_691_584


def test_deepseek_v3_in_fp8_fits_on_16_gpus_of_80_gb(v3: Inventory) -> None:
    fit = of_v3(v3, "fp8-block", 16)
    assert fit.fits and fit.needed < 61 * GB
    assert fit.weights == 44_313_781_120
    assert (fit.max_context, fit.max_batch) == (163840, 3)


def test_deepseek_v3_with_int4_experts_fits_on_8_gpus_of_80_gb(v3: Inventory) -> None:
    fit = of_v3(v3, "deepseek-int4-experts", 8)
    assert fit.fits and fit.needed < 64 * GB
    assert fit.weights == 47_652_519_104


def of_v3(v3: Inventory, recipe: str, count: int) -> Fit:
    parallel = Parallel(count, count)
    weights = v3.rank_bytes(load_recipe(recipe), parallel)
    assert weights is not None
    gpus = Gpus(count, 80 * GB)
    return Fit.of(v3.checkpoint.config, gpus, parallel, Demand(131072), weights)


def test_heads_are_shared_and_latents_are_not() -> None:
    whole = 100 * 3 * 2 * 2 * 8 * 2  # tokens, layers, keys and values, heads, head_dim, bytes
    demand = Demand(100)
    assert kv_cache_bytes(TINY, demand, Parallel(1, 1)) == whole
    assert kv_cache_bytes(TINY, demand, Parallel(2, 1)) == whole // 2
    assert kv_cache_bytes(TINY, demand, Parallel(4, 1)) == whole // 2  # one head at least
    assert kv_cache_bytes(TINY, Demand(100, 3, 1.0), Parallel(2, 1)) == 3 * whole // 4
    assert kv_cache_bytes(TINY, demand, Parallel(1, 1, 3)) == whole // 3
    latent = 100 * 27 * (512 + 64) * 2
    assert kv_cache_bytes(V2_LITE, demand, Parallel(8, 8)) == latent
    assert kv_cache_bytes(V2_LITE, Demand(100, 4), Parallel(2, 8)) == latent  # one copy of four
    with pytest.raises(CheckpointError, match="does not tell the size of the KV cache"):
        kv_cache_bytes({}, demand, Parallel(1, 1))


def test_activations_by_hand() -> None:
    large, lone = 80 * GB, Parallel(1, 1)
    # 10 tokens: 3 hidden, and the dense MLP's 3 x 100, which is more than attention's 4 x 4 x 8.
    assert activation_bytes(TINY, Demand(10), lone, large) == 10 * (96 + 300) * 2 + 10 * 6
    # A step has 8192 tokens at most, 2048 on small GPUs; logits are of each sequence.
    long = Demand(100_000, 2)
    assert activation_bytes(TINY, long, lone, large) == 8192 * (96 + 300) * 2 + 2 * 10 * 6
    assert activation_bytes(TINY, long, lone, 24 * GB) == 2048 * (96 + 300) * 2 + 2 * 10 * 6
    assert activation_bytes(TINY, long, Parallel(4, 1), large) == 8192 * (96 + 128) * 2 + 120 - (
        8192 * (128 - 75) * 2
    )
    experts = 8192 * (3 * 7168 + 8 * (7168 + 3 * 2048)) * 2 + 129280 * 6
    assert activation_bytes(V3, Demand(131072), Parallel(8, 8), large) == experts


def test_the_largest_context_and_batch_are_the_last_that_fit() -> None:
    weights = 2 * GB - 100 * 2**20 - GB - 10**8  # beside the reserve, 100 MiB
    fit = Fit.of(TINY, Gpus(1, 2 * GB), Parallel(1, 1), Demand(1000), weights)
    assert fit.reserve == GB + 10**8 and fit.room + fit.kv_cache + fit.activations == 900 * 10**6
    assert fit.fits and fit.max_context == 4096  # the model's own limit
    most = fit.max_batch
    assert fit._with(batch=most).fits and not fit._with(batch=most + 1).fits
    full = Fit.of(TINY, Gpus(1, 2 * GB), Parallel(1, 1), Demand(1000), 2 * GB)
    assert not full.fits and (full.max_context, full.max_batch) == (0, 0)


def test_what_does_not_fit_comes_with_three_ways_out(small: Checkpoint) -> None:
    plan = make_plan(small, default_recipe("fp8-block"))
    report = serving_report(plan, parse_gpus("4xH100:9.5GB"), 131072, ram=64 * GB, probe=False)
    assert not report["fits"] and "does not fit on 4x H100 SXM:9.5GB" in verdict(report)
    first, second, third = report["alternatives"]
    assert (first["kind"], second["kind"], third["kind"]) == ("format", "ranks", "offload")
    assert first["needed_bytes"] <= 9.5 * GB and first["engines"]
    assert (second["gpus"], second["how"]) == (8, "--gpu '8x H100 SXM:9.5GB'")
    other = make_plan(small, load_recipe(first["how"].split()[1]))
    again = serving_report(other, parse_gpus("4xH100:9.5GB"), 131072, probe=False)
    assert again["fits"] and again["needed_bytes"] == first["needed_bytes"]
    more = serving_report(plan, parse_gpus(second["how"].split("'")[1]), 131072, probe=False)
    assert more["fits"] and more["needed_bytes"] == second["needed_bytes"]
    assert third["how"] == "MTP layers left off the GPUs" and third["gpu_experts"] == 6 * 64
    small_gpus = serving_report(plan, parse_gpus("4xH100:8GB"), 131072, ram=64 * GB, probe=False)
    apart = small_gpus["offload"]
    assert apart["ram_experts"] > 0 and apart["tokens_per_second_bound"] > 0
    assert apart["gpu_experts"] + apart["ram_experts"] == 6 * 64
    assert "routed experts in RAM" in [way["how"] for way in small_gpus["alternatives"]]
    assert render(small_gpus) is not None
    assert render(report) is not None and render(again) is not None


def test_a_shorter_context_is_a_way_out(small: Checkpoint) -> None:
    plan = make_plan(small, default_recipe("bf16"))
    gpus = Gpus(8, 18 * GB)
    report = serving_report(plan, gpus, 163840, batch=8, probe=False)
    ways = {way["kind"]: way for way in report["alternatives"]}
    assert not report["fits"]
    shorter = ways["context"]["max_context"]
    assert ways["context"]["how"] == f"--context {shorter}"
    assert serving_report(plan, gpus, shorter, batch=8, probe=False)["fits"]
    assert not serving_report(plan, gpus, shorter + 1, batch=8, probe=False)["fits"]


def test_ranks_that_cannot_be_had_are_told(small: Checkpoint) -> None:
    plan = make_plan(small, default_recipe("fp8-block"))
    report = serving_report(plan, parse_gpus("3x180GB"), probe=False)
    assert (report["ranks"], report["gpu_count"]) == (2, 3)
    assert "tp=3 ep=3 pp=1 is not legal" in report["note"]
    wide = make_plan(small, default_recipe("int4"))  # its groups do not divide by 32
    report = serving_report(wide, parse_gpus("32x80GB"), probe=False)
    assert (report["tp"], report["ep"]) == (16, 32) and "tp=16 ep=32" in report["note"]


def test_a_plan_that_is_cut_is_taken_as_it_is(small: Checkpoint) -> None:
    plan = make_plan(small, default_recipe("fp8-block"))
    cut = shard(plan, split(as_written(plan), Parallel(2, 4, 2)))
    report = serving_report(cut, parse_gpus("8x80GB"), 1000, probe=False)
    assert (report["tp"], report["ep"], report["pp"]) == (2, 4, 2)
    assert cut.ranks is not None
    assert report["weights_bytes"] == cut.ranks["max_rank_bytes"]
    assert report["kv_cache_bytes"] == -(-1000 * 9 * 576 * 2 * 5 // 9)
    with pytest.raises(RequantError, match="8 ranks for 4 GPUs"):
        serving_report(cut, parse_gpus("4x80GB"), 1000, probe=False)


@pytest.mark.parametrize(
    ("context", "batch", "told"),
    [
        (0, 1, "context 0: expected at least 1"),
        (16, 0, "batch 0: expected at least 1"),
        (10**6, 1, "context 1000000: the model was made for 163840 tokens"),
    ],
)
def test_demands_that_make_no_sense_are_refused(
    context: int, batch: int, told: str, small: Checkpoint
) -> None:
    plan = make_plan(small, default_recipe("fp8-block"))
    with pytest.raises(RequantError, match=told):
        serving_report(plan, parse_gpus("8x80GB"), context, batch, probe=False)


def test_a_dense_model_is_cut_by_heads(tmp_path: Path) -> None:
    specs = {"model.embed_tokens.weight": plain(128, 64), "model.norm.weight": plain(64)}
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    for layer in range(3):
        for leaf, shape in shapes.items():
            specs |= linear(f"model.layers.{layer}.self_attn.{leaf}", *shape, BF16)
        for leaf, shape in {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}.items():
            specs |= linear(f"model.layers.{layer}.mlp.{leaf}_proj", *shape, BF16)
    config = TINY | {"hidden_size": 64, "vocab_size": 128, "intermediate_size": 128}
    plan = make_plan(write_sparse(tmp_path / "model", config, specs), default_recipe("bf16"))
    report = serving_report(plan, parse_gpus("2xL4"), 100, probe=False)
    assert report["rank_role_bytes"]["dense_mlp"] == 3 * 3 * 64 * 64 * 2
    assert report["offload"] is None and report["fits"] and report["ep"] == 1
    # One token reads every byte but the cache of others: here all, the embedding is the head, too.
    read = report["weights_bytes"] + report["kv_cache_bytes"]
    assert report["tokens_per_second_bound"] == round(300e9 / read, 3)


def test_the_cost_is_estimated_from_a_probe() -> None:
    plan = make_plan(Checkpoint.open(demo_path()), default_recipe("int4"))
    cost = serving_report(plan, parse_gpus("24GB"), context=64)["cost"]
    assert cost["estimated_seconds"] >= 0 and cost["ram_bytes"] > 10**8
    assert cost["peak_disk_bytes"] > cost["output_disk_bytes"] > cost["written_bytes"]
    assert cost["read_bytes"] == plan.read_bytes


def test_speed_is_bounded_by_what_a_token_reads(small: Checkpoint) -> None:
    plan = make_plan(small, default_recipe("fp8-block"))
    report = serving_report(plan, parse_gpus("8xH100"), 1000, batch=4, probe=False)
    held = dict(report["rank_role_bytes"])
    unread = held["embedding"] + held["mtp"]  # a row of the one, and none of the other
    read = report["weights_bytes"] - unread - held["routed_expert"] * 7 // 8  # 8 experts of 64
    cache = report["kv_cache_bytes"] // 4
    bound = 3350e9 / (read + cache)
    assert report["tokens_per_second_bound"] == pytest.approx(bound, rel=1e-6)
