"""Whole conversions of the small checkpoint, compared with the codecs applied directly: no tiles,
no plan, and the reference library for reading and writing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import requant.convert.steps as steps
from requant.convert.plan import Plan, make_plan
from requant.convert.recipe import default_recipe, parse_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError, FormatError, RequantError
from requant.quant import CODECS, parse_format
from tests.helpers import (
    CONFIG,
    CPU,
    INDEX,
    KEPT_PATTERNS,
    LINEAR,
    SIDE_FILES,
    Tensors,
    decode,
    encode,
    expected_config,
    hashes,
    held_by,
    kept_tensors,
    load,
    random_weights,
    refused_modules,
    same,
    write_checkpoint,
)

#: 320 columns, so groups of 64.
FORMATS = [c.name + "[group_size=64]" * c.name.startswith("int4") for c in CODECS]
Source = Callable[[str], Path]


def run_plan(plan: Plan, out: Path, workers: int = 1) -> dict[str, Any]:
    return convert(plan, out, Runtime(CPU, workers))


def plan_to(folder: Path, format_text: str) -> Plan:
    """The default recipe; of the small checkpoint, what the format cannot hold goes into BF16."""
    recipe, source = default_recipe(format_text), Checkpoint.open(folder)
    if f"{next(iter(LINEAR))}.weight" in source.weights:
        refused = refused_modules(parse_format(format_text))
        recipe = replace(recipe, modules=dict.fromkeys(refused, parse_format("bf16")))
    return make_plan(source, recipe)


def expect_same(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    assert [name for name in expected if not same(found[name], expected[name])] == []


@pytest.fixture(params=[1, 1 << 14, 1 << 21], ids=["rows", "small", "whole"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a row or block, of a few, and of the whole weight."""
    monkeypatch.setattr(steps, "TILE_ELEMENTS", request.param)
    monkeypatch.setattr(steps, "CHUNK_ELEMENTS", 3 * request.param)
    monkeypatch.setattr(steps, "COPY_BYTES", max(request.param, 1001))


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("stored_as", FORMATS)
def test_every_format_into_every_format(
    stored_as: str, to: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TILE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(steps, "CHUNK_ELEMENTS", 1 << 15)
    monkeypatch.setattr(steps, "COPY_BYTES", 1 << 10)
    folder, out = source(stored_as), tmp_path / "out"
    plan = plan_to(folder, to)
    result = run_plan(plan, out, workers=2)

    stored = load(folder)
    if stored_as == to:
        expected = {name: t for name, t in stored.items() if name not in kept_tensors()}
    else:
        expected = encode(decode(stored, parse_format(stored_as)), parse_format(to))
    found = load(out)
    lossless = [w.source.name for w in plan.weights if w.lossless]
    before, after = decode(stored, parse_format(stored_as)), decode(found, parse_format(to))
    for name in lossless:  # codes handed over: the values are the same, the bytes may not be
        assert same(after[name], before[name]), name
        shape = LINEAR[name.removesuffix(".weight")]
        for part in held_by(parse_format(to), shape).specs(*shape):
            key = name.removesuffix("weight") + part
            del found[key], expected[key]
    expect_same(found, {**expected, **kept_tensors()})

    quantized = expected_config(parse_format(to))
    config = json.loads((out / "config.json").read_text())
    assert config.get("quantization_config") == quantized
    dtypes = {"fp16": "float16", "fp32": "float32"}
    assert config["torch_dtype"] == dtypes.get(to, "bfloat16")
    del config["torch_dtype"]
    config.pop("quantization_config", None)
    assert config == {k: v for k, v in CONFIG.items() if k != "torch_dtype"}

    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert result["written_bytes"] == sum(sizes) == sum(file.nbytes for file in plan.files)
    assert result["read_bytes"] == sum(t.nbytes for t in stored.values())
    copied = len(LINEAR) if stored_as == to else 0
    if stored_as == "bf16" != to:
        copied = len(refused_modules(parse_format(to)))
    elif to == "bf16" != stored_as:
        copied = len(refused_modules(parse_format(stored_as)))
    elif to != stored_as:
        refused = {*refused_modules(parse_format(to))}
        copied = len(refused & {*refused_modules(parse_format(stored_as))})
    changed = len(LINEAR) - copied
    assert result["requantized_tensors"] + result["lossless_tensors"] == changed
    assert result["identical_tensors"] == len(LINEAR) + len(kept_tensors()) - changed
    assert result["files"] == len(sizes) == 3 and result["resumed_files"] == 0


@pytest.mark.parametrize("to", FORMATS)
def test_the_size_of_a_tile_changes_nothing(
    to: str, tile: None, source: Source, tmp_path: Path
) -> None:
    stored_as = "bf16" if to == "fp8-block" else "fp8-block"
    folder, out = source(stored_as), tmp_path / "out"
    run_plan(plan_to(folder, to), out)
    expected = encode(decode(load(folder), parse_format(stored_as)), parse_format(to))
    expect_same(load(out), {**expected, **kept_tensors()})


@pytest.mark.parametrize("to", ["bf16", "int4[group_size=64]"])
def test_the_number_of_workers_changes_no_byte(
    to: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TILE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(steps, "CHUNK_ELEMENTS", 1 << 13)
    folder = source("fp8-block")
    results = []
    for workers in (1, 2, 3):
        run_plan(plan_to(folder, to), tmp_path / str(workers), workers)
        results.append(hashes(tmp_path / str(workers)))
    assert results[0] == results[1] == results[2]


def test_what_lies_beside_the_weights(source: Source, tmp_path: Path) -> None:
    folder, out = source("fp8-block"), tmp_path / "out"
    run_plan(plan_to(folder, "int8-channel"), out)
    for name, content in SIDE_FILES.items():
        assert (out / name).read_bytes() == content
    weights = {path.name for path in folder.glob("*.safetensors")}
    assert set(hashes(out)) == {*SIDE_FILES, *weights, INDEX, "config.json", "requant.json"}
    index = json.loads((out / INDEX).read_text())
    total, places = 0, {}
    for name in sorted(weights):
        with safe_open(out / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            places |= dict.fromkeys(opened.keys(), name)
            total += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
    assert index == {"metadata": {"total_size": total}, "weight_map": places}
    assert list(index["weight_map"]) == sorted(places)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    single = "model.safetensors"
    folder = write_checkpoint(tmp_path / "m", random_weights(), CONFIG, lambda name: single)
    run_plan(plan_to(folder, "fp8-block"), tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {single, "config.json", "requant.json"}


def test_a_file_of_scales_alone_disappears(tmp_path: Path) -> None:
    stored = encode(random_weights(), parse_format("fp8-block"))
    config = {**CONFIG, "quantization_config": parse_format("fp8-block").config([])}
    folder = write_checkpoint(
        tmp_path / "m",
        stored,
        config,
        lambda name: f"{'scales' if name.endswith('_inv') else 'codes'}.safetensors",
    )
    run_plan(plan_to(folder, "bf16"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safe*rs")] == ["codes.safetensors"]


def test_codes_that_no_role_converts_do_not_stay_behind(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.indexer.wk.weight"
    weights = {**random_weights(), name: torch.randn(160, 256).to(torch.bfloat16)}
    codec = parse_format("fp8-block")
    stored, config = encode(weights, codec), {**CONFIG, "quantization_config": codec.config([])}
    folder = write_checkpoint(tmp_path / "m", stored, config)
    run_plan(plan_to(folder, "bf16"), tmp_path / "bf16")
    run_plan(plan_to(folder, "int8-channel"), tmp_path / "int8")
    for out in ("bf16", "int8"):
        found = load(tmp_path / out)
        assert found[name].dtype == torch.bfloat16
        assert f"{name}_scale_inv" not in found
    ignore = json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert ignore == ["lm_head", r"re:.*\.layers\.\d+\.self_attn\.indexer\.wk$"]
    run_plan(plan_to(folder, "fp8-block"), tmp_path / "fp8")
    expect_same(load(tmp_path / "fp8"), stored)


def test_modules_of_a_recipe_end_up_in_the_config(source: Source, tmp_path: Path) -> None:
    text = """
    [roles]
    routed_expert = "int4[group_size=64]"
    shared_expert = "int4[group_size=64]"
    dense_mlp = "bf16"
    mtp = "bf16"
    [modules]
    "*.experts.10.*" = "bf16"
    """
    plan = make_plan(Checkpoint.open(source("bf16")), parse_recipe("mine", text))
    run_plan(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    packed = {
        "model.layers.1.mlp.experts.0.up_proj",
        "model.layers.1.mlp.shared_experts.gate_proj",
    }
    ignore = config["quantization_config"]["ignore"]
    assert r"re:.*\.layers\.\d+\.self_attn\.q_proj$" in ignore
    assert "model.layers.1.mlp.experts.10.up_proj" in ignore
    matched = {m for m in LINEAR if any(matches(pattern, m) for pattern in ignore)}
    assert matched == {*LINEAR} - packed and {*KEPT_PATTERNS} <= {*ignore}
    found = {n.removesuffix(".weight_packed") for n in load(tmp_path / "out") if "packed" in n}
    assert found == packed and config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("stored_as", ["fp8-block", "bf16"])
def test_no_stale_quantization_config(stored_as: str, nested: bool, tmp_path: Path) -> None:
    """A BF16 cast that kept the FP8 config is common; so is the config of a multimodal model."""
    stored = encode(random_weights(), parse_format(stored_as))
    config = {**CONFIG, "quantization_config": parse_format("fp8-block").config([])}
    config = {"text_config": config, "model_type": "vl"} if nested else config
    folder = write_checkpoint(tmp_path / "m", stored, config)
    for to in ("bf16", "fp16", "int8-channel"):
        run_plan(plan_to(folder, to), tmp_path / to)
        written = json.loads((tmp_path / to / "config.json").read_text())
        inner = written["text_config"] if nested else written
        assert inner["torch_dtype"] == ("float16" if to == "fp16" else "bfloat16")
        methods = [c.get("quantization_config", {}).get("quant_method") for c in (written, inner)]
        assert methods[0] == (None if to != "int8-channel" else "compressed-tensors")
        assert methods[1] == (None if nested else methods[0])


def matches(pattern: str, module: str) -> bool:
    """As engines do: exact, or a regular expression from the start of the name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    folder = write_checkpoint(tmp_path / "m", {name: random_weights()[name]}, CONFIG)
    message = (
        rf"{name}: group size 128 does not divide 320 columns \(320 % 128 = 64\); "
        r"use int4\[group_size=32\] or int4\[group_size=64\], or leave this weight in bf16"
    )
    with pytest.raises(FormatError, match=message):
        plan_to(folder, "int4")
    other = name.replace("layers.0", "layers.1")
    both = {weight: random_weights()[name] for weight in (name, other)}
    with pytest.raises(FormatError, match=f"^{name}.*; so it is with 1 more weights$"):
        plan_to(write_checkpoint(tmp_path / "two", both, CONFIG), "int4")
    recipe = parse_recipe("out", '[roles]\nattention="int4"\n[modules]\n"*.kv_a*"="bf16"')
    assert make_plan(Checkpoint.open(folder), recipe).summary()["identical_tensors"] == 1


@pytest.mark.parametrize(
    ("stored_as", "roles"),
    [("bf16", 'attention="int8-block"\nmtp="int8-channel"'), ("int8-block", 'mtp="int8-channel"')],
)
def test_one_checkpoint_holds_one_quantized_format(
    stored_as: str, roles: str, source: Source
) -> None:
    """The second case is what a recipe leaves as it was stored."""
    with pytest.raises(FormatError) as caught:
        make_plan(Checkpoint.open(source(stored_as)), parse_recipe("two", f"[roles]\n{roles}"))
    message = str(caught.value)
    assert message.startswith("recipe two: model.layers.") and "config holds one format" in message
    assert "int8-block" in message and "int8-channel" in message


def spoiled(tmp_path: Path, value: float, module: str, dtype: torch.dtype) -> Path:
    weights = {name: weight.to(dtype) for name, weight in random_weights().items()}
    weights[f"{module}.weight"][100, 7] = value
    return write_checkpoint(tmp_path / "m", weights, CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("to", ["fp16", "fp32", "fp8-block", "int8-channel", "int4[group_size=64]"])
def test_nan_is_never_written(to: str, value: float, tmp_path: Path) -> None:
    module = "model.layers.2.self_attn.q_b_proj"  # in the last of three files
    folder = spoiled(tmp_path, value, module, torch.bfloat16)
    with pytest.raises(FormatError, match=rf"{module}\.weight, rows 0:160: holds NaN or infinity"):
        run_plan(plan_to(folder, to), tmp_path / "out", workers=2)
    left = set(hashes(tmp_path / "out"))
    assert not left & {"config.json", INDEX, "requant.json"}
    assert not [name for name in left if name.endswith(".partial") or "00003-of" in name]
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "out")


def test_a_failure_in_the_first_file_leaves_nothing(tmp_path: Path) -> None:
    folder = spoiled(tmp_path, float("nan"), "model.layers.0.self_attn.q_proj", torch.bfloat16)
    with pytest.raises(FormatError, match="rows 0:160: holds NaN"):
        run_plan(plan_to(folder, "fp32"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match="rows 0:160: holds NaN"):
        run_plan(plan_to(folder, "fp32"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_fp16_overflow(tmp_path: Path) -> None:
    module = "model.layers.1.mlp.experts.10.up_proj"
    folder = spoiled(tmp_path, 70000.0, module, torch.float32)
    with pytest.raises(FormatError, match=rf"{module}\.weight, .* holds 70000, beyond fp16's larg"):
        run_plan(plan_to(folder, "fp16"), tmp_path / "out")
    run_plan(plan_to(folder, "bf16"), tmp_path / "bf16")


def test_a_quantized_weight_without_elements(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {
        name: torch.empty(5, 0).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.empty(1, 0),
    }
    folder = write_checkpoint(tmp_path / "m", stored, CONFIG)
    with pytest.raises(RequantError, match=rf"{name}: is \[5, 0\]; a format needs rows"):
        plan_to(folder, "bf16")
