"""Checkpoints in the layouts that models are published in: read, inspected, converted, and back.

What weights mean comes from layouts.py, which does not use requant's codecs, from transformers' own
models and from the reference libraries' dequantization.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import requant.convert.lossless as lossless
import requant.convert.steps as steps
from requant.convert.forms import PlannedWeight
from requant.convert.inspect import inspect
from requant.convert.names import fused_set
from requant.convert.plan import Plan, make_plan
from requant.convert.recipe import Recipe, default_recipe, load_recipe, parse_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError, FormatError
from requant.quant import format_name, parse_format
from requant.quant.plain import Plain
from tests.convert.layouts import (
    ACT_ORDER_CT,
    FP8_CONFIG,
    INT4_CT,
    LAYOUTS,
    Layout,
    ct_config,
    ct_group,
    deepseek_v4,
    dense,
    fp4_values,
    kimi,
    words,
)
from tests.helpers import CPU, Tensors, load, same, write_checkpoint

TARGETS = ["bf16", "fp8-block", "int4[group_size=32]"]
PRESETS = ["ampere-int4", "blackwell-nvfp4", "deepseek-int4-experts", "fp8-from-bf16",
           "kimi-style", "mxfp4-experts", "v4-to-fp8", "w8a8-int8"]  # fmt: skip
Build = Callable[[str], tuple[Layout, Path]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build(layout)`: what a layout means, and where it lies. Read only."""

    @functools.cache
    def get(name: str) -> tuple[Layout, Path]:
        layout = LAYOUTS[name]()
        return layout, layout.write(tmp_path_factory.mktemp("layout") / name)

    return get


def recipe_of(text: str) -> Recipe:
    """A preset, a format, or the lines of [roles]."""
    if text in PRESETS:
        return load_recipe(text)
    return (
        parse_recipe("test", f"[roles]\n{text}")
        if "=" in text.split("[")[0]
        else (default_recipe(text))
    )


def to(folder: Path, text: str, out: Path, workers: int = 1) -> tuple[Plan, dict[str, Any]]:
    plan = make_plan(Checkpoint.open(folder), recipe_of(text))
    return plan, convert(plan, out, Runtime(CPU, workers))


def module_of(name: str) -> str:
    return name.removesuffix(".weight")


def expected_parts(planned: PlannedWeight, values: Tensors) -> Tensors:
    """decode-then-encode of a whole weight, by the codec alone."""
    codec, shape = planned.codec, planned.source.shape
    assert codec is not None
    summary = None
    if codec.two_pass:
        summary = codec.summarize([codec.measure(values[w.name]) for w in planned.companions])
    return codec.encode(values[planned.source.name], (shape[0], shape[1]), summary)


def expect_converted(plan: Plan, out: Path, values: Tensors) -> None:
    """What was copied has its bytes, what is lossless its values, the rest is encoded anew."""
    written, stored, before = Checkpoint.open(out), load(out), load(plan.source.path)
    assert set(written.weights) == set(plan.source.weights)
    wrong = []
    for planned in plan.weights:
        name = planned.source.name
        if planned.codec is None:
            pieces = {**planned.source.parts, **planned.source.activations}.values()
            good = all(same(stored[p.name], before[p.name]) for p in pieces if p.name in before)
            good &= name not in values or same(written.decode(name), values[name])
        elif planned.lossless:
            good = same(written.decode(name), values[name])
        else:
            parts = expected_parts(planned, values)
            good = all(same(stored[planned.stored_name(p)], t) for p, t in parts.items())
        wrong += [] if good else [name]
    assert wrong == []


def expect_valid_config(plan: Plan) -> None:
    """compressed-tensors parses the config, and finds for each module the scheme it is stored in;
    no other module that could be a Linear is targeted."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    config = plan.config["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    schemes = {t: s for s in parsed.config_groups.values() for t in s.targets}
    linear = torch.nn.Linear(1, 1, device="meta")
    for planned in plan.weights:
        name, codec = planned.source.name, planned.written_codec
        if codec is None or planned.source.kind == "embedding":
            continue
        targets = match_targets(module_of(name), linear, schemes)
        if is_match(module_of(name), linear, parsed.ignore):
            targets = []
        if isinstance(codec, Plain):
            assert targets == [], name
            continue
        assert len({id(schemes[t]) for t in targets}) == 1, (name, targets)
        scheme = codec.scheme()
        assert scheme is not None
        found, meant = schemes[targets[0]].weights, scheme["weights"]
        assert found is not None
        for key in ("num_bits", "type", "strategy", "symmetric", "group_size", "block_structure"):
            value = getattr(found, key)
            assert (value.value if hasattr(value, "value") else value) == meant.get(key), name


def role(name: str) -> str:
    """The role by the layouts' own naming."""
    rules = {
        r"mtp\.|model\.layers\.2\.": "mtp",
        r"vision_tower|mm_projector|.*(indexer|compressor)\.": "other",
        r".*\.experts\.": "routed_expert",
        r".*\.shared_experts\.": "shared_expert",
        r".*\.engram\.embed": "embedding",
        r".*(self_attn|attn)\.": "attention",
        r".*\.mlp\.": "dense_mlp",
    }
    return next(role for rule, role in rules.items() if re.match(rule, name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads(layout: str, build: Build) -> None:
    made, folder = build(layout)
    checkpoint = Checkpoint.open(folder)
    quantized = {
        name: format_name(w.codec)
        for name, w in checkpoint.weights.items()
        if w.codec is not None and not isinstance(w.codec, Plain)
    }
    assert quantized == made.formats
    assert {name: checkpoint.weights[name].role for name in made.formats} == {
        name: role(name) for name in made.formats
    }
    assert set(made.values) <= set(checkpoint.weights)
    wrong = [n for n, value in made.values.items() if not same(checkpoint.decode(n), value)]
    assert wrong == []
    facts = inspect(checkpoint)
    experts = {int(m[1]) + 1 for m in (re.search(r"\.experts\.(\d+)\.", n) for n in quantized) if m}
    assert facts["experts"] == max(experts, default=0)
    count = sum(v.numel() for n, v in made.values.items() if checkpoint.weights[n].role != "mtp")
    assert facts["parameters"] == count  # logical: packed codes count as what they hold
    assert facts["total_bytes"] == sum(t.nbytes for t in made.tensors.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_converts(layout: str, target: str, build: Build, tmp_path: Path) -> None:
    made, folder = build(layout)
    plan, result = to(folder, target, tmp_path / "out")
    expect_converted(plan, tmp_path / "out", made.values)
    counts = [result[f"{kind}_tensors"] for kind in ("identical", "lossless", "requantized")]
    assert sum(counts) == len(plan.weights)
    linear = [w for w in plan.weights if w.source.kind in ("attention", "dense_mlp",
              "shared_expert", "routed_expert")]  # fmt: skip
    kv_b = [w for w in linear if w.source.name.endswith("kv_b_proj.weight")]
    names = {format_name(w.written_codec) for w in linear if w.written_codec and w not in kv_b}
    kept = {"fp8-block", "fp8-block[scale=ue8m0]"} if target == "fp8-block" else {target}
    assert names <= kept
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    text = config.get("text_config", {})
    assert "quantization_config" not in text
    native = target == "fp8-block" and layout.startswith("deepseek-v4")
    assert {**config, **text}.get("expert_dtype") == ("fp8" if native and not text else None)
    if target == "bf16":
        assert "quantization_config" not in config
    elif target == "fp8-block":
        assert config["quantization_config"]["weight_block_size"] == [128, 128]
    else:
        expect_valid_config(plan)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", ["deepseek-v3", "deepseek-v3.2"])
def test_presets(layout: str, preset: str, build: Build, tmp_path: Path) -> None:
    """MTP layer and indexer included."""
    made, folder = build(layout)
    recipe = load_recipe(preset)
    plan, _ = to(folder, preset, tmp_path / "out")
    expect_converted(plan, tmp_path / "out", made.values)
    written = {w.source.name: w.written_codec for w in plan.weights if w.written_codec}
    for name, codec in written.items():
        if plan.source.weights[name].kind in ("attention", "dense_mlp", "shared_expert",
                                              "routed_expert"):  # fmt: skip
            wanted = recipe.target(plan.source.weights[name])
            assert wanted is not None and codec.name == wanted.name
    if plan.config.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        expect_valid_config(plan)
    else:
        assert preset in ("fp8-from-bf16", "v4-to-fp8")
    fp8 = any("fp8-block" in format_name(c) for c in recipe.roles.values() if c)
    indexer = [c for n, c in written.items() if ".indexer.w" in n and "weights_proj" not in n]
    assert {c.name for c in indexer} <= {"fp8-block" if fp8 else "bf16"}


#: layout, steps, formats of the experts (or of every quantized weight) after each step
CHAINS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "FP4 to FP8": ("deepseek-v4", [("v4-to-fp8", "fp8-block[container=deepseek-v4]")]),
    "V4 to MXFP4": ("deepseek-v4", [('routed_expert = "mxfp4"', "mxfp4")]),
    "V4 of U8 to F4": (
        "deepseek-v4-u8",
        [
            (f'{role} = "mxfp4[container=deepseek-v4,codes={code}]"', "")
            for role, code in (("routed_expert", "f4"), ("routed_expert", "u8"))
        ],
    ),
    "gpt-oss": ("gpt-oss", [('routed_expert = "mxfp4"', "mxfp4")]),
    "Kimi to GPTQ and back": (
        "kimi-k2.5",
        [
            ('routed_expert = "int4-gptq[group_size=32]"', "int4-gptq[group_size=32]"),
            ('routed_expert = "int4[group_size=32,scale=bf16]"', "int4[group_size=32]"),
        ],
    ),
    "V3.1 to E8M0 and back": (
        "deepseek-v3.1",
        [
            ("fp8-block[scale=e8m0]", "fp8-block[scale=e8m0]"),
            ("fp8-block[scale=ue8m0]", "fp8-block[scale=ue8m0]"),
        ],
    ),
    "V3.2 to E8M0 and back": (
        "deepseek-v3.2",
        [
            ("fp8-block[scale=e8m0]", "fp8-block[scale=e8m0]"),
            ("fp8-block[scale=ue8m0]", "fp8-block[scale=ue8m0]"),
        ],
    ),
    "V3 to compressed-tensors and back": (
        "deepseek-v3",
        [
            ("fp8-block[container=compressed-tensors]", "fp8-block[container=compressed-tensors]"),
            ("fp8-block", "fp8-block"),
        ],
    ),
    "V3.2 to compressed-tensors and back": (
        "deepseek-v3.2",
        [
            ("fp8-block[container=compressed-tensors]", "fp8-block[container=compressed-tensors]"),
            ("fp8-block[scale=ue8m0]", "fp8-block[scale=ue8m0]"),
        ],
    ),
    "MiniMax to compressed-tensors and back": (
        "minimax-mxfp8",
        [("mxfp8", "mxfp8"), ("mxfp8[container=minimax]", "mxfp8[container=minimax]")],
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_lossless_and_back(chain: str, build: Build, tmp_path: Path) -> None:
    layout, steps = CHAINS[chain]
    made, folder = build(layout)
    for number, (text, form) in enumerate(steps):
        source, out = Checkpoint.open(folder), tmp_path / str(number)
        plan = make_plan(source, recipe_of(text), require_lossless=True)
        result = convert(plan, out, Runtime(CPU, 1))
        assert result["requantized_tensors"] == 0 and result["not_lossless"] == []
        assert result["lossless_tensors"] >= 3
        changed = {format_name(w.codec) for w in plan.weights if w.codec and w.repack}
        assert not form or form in changed
        expect_converted(plan, out, made.values)
        folder = out
    if "back" in chain:
        start, end = load(build(layout)[1]), load(folder)
        assert set(start) == set(end)
        assert [n for n in start if not same(start[n], end[n])] == []


def test_modelopt_to_compressed_tensors_and_back(build: Build, tmp_path: Path) -> None:
    """Codes and local scales keep their bytes, the global scale is a reciprocal."""
    made, folder = build("modelopt-file")
    _, there = to(folder, 'dense_mlp = "nvfp4"', tmp_path / "ct")
    expect_valid_config(make_plan(Checkpoint.open(folder), recipe_of('dense_mlp = "nvfp4"')))
    assert there["lossless_tensors"] == 6 and len(there["dropped_tensors"]) == 6
    assert all(name.endswith("input_scale") for name in there["dropped_tensors"])
    plan, back = to(tmp_path / "ct", 'dense_mlp = "nvfp4[container=modelopt]"', tmp_path / "mo")
    assert back["lossless_tensors"] == 6 and back["dropped_tensors"] == []
    assert plan.config["quantization_config"]["quant_method"] == "modelopt"
    start, middle, end = load(folder), load(tmp_path / "ct"), load(tmp_path / "mo")
    for name, tensor in start.items():
        if name.endswith("weight_scale_2"):
            torch.testing.assert_close(end[name], tensor, rtol=2**-23, atol=0)
            ct = middle[name.replace("weight_scale_2", "weight_global_scale")]
            torch.testing.assert_close(1 / ct, tensor[None], rtol=2**-23, atol=0)
        elif not name.endswith("input_scale"):
            assert same(end[name], tensor), name
    for name in made.formats:
        decoded = Checkpoint.open(tmp_path / "ct").decode(name)
        torch.testing.assert_close(decoded, made.values[name], rtol=2**-22, atol=0)


def test_v4_configs(build: Build, tmp_path: Path) -> None:
    """expert_dtype follows the experts; the native config stays native."""
    _, folder = build("deepseek-v4")
    plan, _ = to(folder, "v4-to-fp8", tmp_path / "fp8")
    assert plan.config["expert_dtype"] == "fp8"
    assert plan.config["quantization_config"]["weight_block_size"] == [128, 128]
    assert plan.config["quantization_config"]["quant_method"] == "fp8"
    written = Checkpoint.open(tmp_path / "fp8").weights
    stored = {format_name(w.codec) for w in written.values() if w.codec and "fp8" in w.format}
    assert stored == {"fp8-block[container=deepseek-v4]"}  # the indexer's layers too
    plan, _ = to(folder, 'attention = "bf16"', tmp_path / "kept")
    assert plan.config["expert_dtype"] == "fp4"
    assert plan.config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert "layers.0.attn.wq_a" in plan.config["quantization_config"]["modules_to_not_convert"]
    plan, _ = to(folder, 'routed_expert = "mxfp4"', tmp_path / "ct")
    assert "expert_dtype" not in plan.config
    expect_valid_config(plan)


def test_v41_engram_tables_stay(build: Build, tmp_path: Path) -> None:
    made, folder = build("deepseek-v4.1")
    name = "layers.1.engram.embed.weight"
    form = "fp8-block[block_cols=32,block_rows=1,scale=e8m0,container=deepseek-v4]"
    assert set(re.split(r"[\[\],]", made.formats[name])) == set(re.split(r"[\[\],]", form))
    plan, _ = to(folder, 'attention = "bf16"', tmp_path / "out")
    assert plan.config["quantization_config"]["weight_block_size"] == [32, 32]
    assert plan.config["quantization_config"]["expert_dtype"] == "fp4"
    expect_converted(plan, tmp_path / "out", made.values)
    assert Checkpoint.open(tmp_path / "out").weights[name].format == made.formats[name]


def test_not_lossless_says_why(build: Build, tmp_path: Path) -> None:
    wide = deepseek_v4(span=20).write(tmp_path / "wide")
    plan = make_plan(Checkpoint.open(wide), load_recipe("v4-to-fp8"))
    reasons = {entry["tensor"]: entry["reason"] for entry in plan.summary()["not_lossless"]}
    assert all(".experts." in name for name in reasons) and len(reasons) == 18
    assert "span 20 powers of two, and FP8 holds 14" in reasons["layers.0.ffn.experts.0.w1.weight"]
    with pytest.raises(FormatError, match=r"is not lossless: the FP4 scales in block .* 17 more"):
        make_plan(Checkpoint.open(wide), load_recipe("v4-to-fp8"), require_lossless=True)

    huge = kimi()
    module = "language_model.model.layers.1.mlp.experts.1.up_proj"
    huge.tensors[f"{module}.weight_scale"][3, 2] = 2.0**17
    folder = huge.write(tmp_path / "huge")
    recipe = recipe_of('routed_expert = "int4-gptq[group_size=32]"')
    summary = make_plan(Checkpoint.open(folder), recipe).summary()
    assert [entry["tensor"] for entry in summary["not_lossless"]] == [f"{module}.weight"]
    assert "131072 has no exact float16" in summary["not_lossless"][0]["reason"]
    assert (summary["lossless_tensors"], summary["requantized_tensors"]) == (5, 1)

    _, folder = build("ct-act-order")
    for target in ("int4[group_size=32,symmetric=false]", "int4-gptq[group_size=32]"):
        entries = make_plan(Checkpoint.open(folder), recipe_of(target)).summary()["not_lossless"]
        assert len(entries) == 7 and all("act-order" in e["reason"] for e in entries)

    with pytest.raises(FormatError, match=r"fp8-block -> int4 .*it rounds; so it is with"):
        make_plan(Checkpoint.open(build("deepseek-v3")[1]), recipe_of('routed_expert = "int4"'),
                  require_lossless=True)  # fmt: skip


def test_act_order_in_order_is_lossless(tmp_path: Path) -> None:
    """weight_g_idx that says what every reader assumes anyway."""
    made = dense(
        lambda m, module, r, c: m.int4(module, r, c, 32, False, torch.arange(c) // 32),
        ACT_ORDER_CT,
    )
    folder = made.write(tmp_path / "m")
    plan, result = to(folder, "int4[group_size=32,symmetric=false]", tmp_path / "out")
    assert result["lossless_tensors"] == 7
    expect_converted(plan, tmp_path / "out", made.values)
    expect_valid_config(plan)


@pytest.mark.parametrize("row", [None, 3, 200, 511])
def test_scales_decide_wherever_they_are(
    row: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at some rows at a time: 2^73 is beyond FP16."""
    monkeypatch.setattr(lossless, "_PROBE_ELEMENTS", 128 * 64)
    name = "model.layers.0.mlp.up_proj.weight"
    exponents = torch.full((512, 2), 127, dtype=torch.uint8)
    if row is not None:
        exponents[row, 1] = 200
    codes = torch.zeros(512, 32, dtype=torch.uint8)
    tensors = {f"{name}_packed": codes, f"{name}_scale": exponents}
    source = Checkpoint.open(
        write_checkpoint(tmp_path / "m", tensors, {}, lambda _: "model.safetensors")
    )
    kept = lossless.keeps_values(source, source.weights[name], parse_format("fp16"))
    assert kept.lossless is (row is None)


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_never_promises_codes_that_it_cannot_hand_over(seed: int, tmp_path: Path) -> None:
    """Weights of few groups: some have a zero point of 0, which GPTQ's version 1 cannot hold."""
    group = ct_group(["Linear"], 4, "int", "group", group_size=32, symmetric=False)
    made = Layout({"quantization_config": ct_config("pack-quantized", group, ignore=[])})
    made.random.manual_seed(seed)
    for layer, (rows, cols) in enumerate([(1, 32), (2, 64), (8, 32), (8, 64), (16, 64)]):
        made.int4(f"model.layers.{layer}.mlp.down_proj", rows, cols, 32, symmetric=False)
    target = "int4-gptq[group_size=32,symmetric=false,scale=bf16]"
    plan, result = to(made.write(tmp_path / "m"), target, tmp_path / "out")
    expect_converted(plan, tmp_path / "out", made.values)
    assert result["lossless_tensors"] + len(result["not_lossless"]) == 5
    assert all("zero points of 0" in entry["reason"] for entry in result["not_lossless"])


def test_static_activations_stay_where_weights_are_copied(build: Build, tmp_path: Path) -> None:
    """Scales of activations and the words that say they are there go together."""
    made, folder = build("fp8-static")
    plan, result = to(folder, 'attention = "bf16"', tmp_path / "hf")
    config = plan.config["quantization_config"]
    assert config["activation_scheme"] == "static" and config["weight_block_size"] is None
    kept = [f"model.layers.0.self_attn.{p}_proj" for p in "koqv"]
    assert config["modules_to_not_convert"] == ["lm_head", *kept]
    assert result["dropped_tensors"] == [f"{module}.activation_scale" for module in kept]
    expect_converted(plan, tmp_path / "hf", made.values)
    plan, _ = to(folder, 'attention = "fp8-block"', tmp_path / "moved")
    expect_valid_config(plan)

    made, folder = build("ct-fp8-static")
    plan, result = to(folder, 'attention = "int4[group_size=32]"', tmp_path / "ct")
    expect_converted(plan, tmp_path / "ct", made.values)
    expect_valid_config(plan)
    groups = plan.config["quantization_config"]["config_groups"].values()
    (static,) = (g for g in groups if g["weights"]["num_bits"] == 8)
    assert static["input_activations"]["dynamic"] is False
    assert len(result["dropped_tensors"]) == 4
    assert f"{module_of(next(iter(made.formats)))}.input_scale" in result["dropped_tensors"]

    for layout in ("modelopt-config", "modelopt-file"):
        made, folder = build(layout)
        recipe = parse_recipe(
            "one", '[roles]\nmtp="bf16"\n[modules]\n"model.layers.1.mlp.*" = "bf16"'
        )
        plan = make_plan(Checkpoint.open(folder), recipe)
        convert(plan, tmp_path / layout, Runtime(CPU, 1))
        config = plan.config["quantization_config"]
        assert config["quant_algo"] == "NVFP4" and config["quant_method"] == "modelopt"
        assert "model.layers.1.mlp.down_proj" in config["ignore"]
        assert "model.layers.0.mlp.down_proj" not in config["ignore"]
        assert "exclude_modules" not in config
        expect_converted(plan, tmp_path / layout, made.values)


def test_the_cache_keeps_its_scheme(tmp_path: Path) -> None:
    """k_scale and v_scale are copied, so the config must still name their scheme."""
    made = LAYOUTS["ct-mixed"]()
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False,
              "symmetric": True}  # fmt: skip
    made.config["quantization_config"] = {
        **made.config["quantization_config"], "kv_cache_scheme": scheme,
    }  # fmt: skip
    scales = {f"model.layers.0.self_attn.{p}_proj.{p}_scale": torch.tensor(0.3) for p in "kv"}
    made.tensors |= scales
    plan, result = to(made.write(tmp_path / "m"), "int4[group_size=32]", tmp_path / "out")
    assert plan.config["quantization_config"]["kv_cache_scheme"] == scheme
    assert result["dropped_tensors"] == []
    stored = load(tmp_path / "out")
    assert all(same(stored[name], scale) for name, scale in scales.items())
    expect_valid_config(plan)


def test_a_quantized_lm_head_is_not_ignored(tmp_path: Path) -> None:
    made = dense(lambda m, module, r, c: m.int4(module, r, c, 32), INT4_CT)
    made.tensors.pop("lm_head.weight")
    made.int4("lm_head", 64, 64, 32)
    folder = made.write(tmp_path / "m")
    plan, _ = to(folder, 'attention = "bf16"', tmp_path / "out")
    expect_converted(plan, tmp_path / "out", made.values)
    expect_valid_config(plan)
    plan, _ = to(folder, "bf16", tmp_path / "plain")
    expect_converted(plan, tmp_path / "plain", made.values)
    assert "quantization_config" not in plan.config


def test_nvfp4_beside_fp8_of_modelopt(tmp_path: Path) -> None:
    """MIXED_PRECISION: two formats and one config, which only compressed-tensors can say."""

    def linear(made: Layout, module: str, rows: int, cols: int) -> None:
        if "self_attn" in module:
            made.fp8_tensor(module, rows, cols, "weight_scale", "fp8-tensor", "input_scale")
        else:
            made.modelopt_nvfp4(module, rows, cols, 0.003)

    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
              "config_groups": {"group_0": group}}  # fmt: skip
    made = dense(linear, config)
    folder = made.write(tmp_path / "m")
    plan, _ = to(folder, 'dense_mlp = "nvfp4"', tmp_path / "out")
    expect_valid_config(plan)
    stored = Checkpoint.open(tmp_path / "out")
    for name, value in made.values.items():  # the reciprocal of a global scale is rounded
        torch.testing.assert_close(stored.decode(name), value, rtol=2**-22, atol=0)


def test_what_engines_undo_by_other_means_is_refused(tmp_path: Path) -> None:
    """Rotated weights, and those that were scaled against their inputs: plain decoding of them
    gives other values than the model's."""
    made = dense(lambda m, module, r, c: m.int4(module, r, c, 32), INT4_CT)
    made.config["quantization_config"] = {**INT4_CT, "transform_config": {"config_groups": {}}}
    source = Checkpoint.open(made.write(tmp_path / "rotated"))
    assert make_plan(source, recipe_of("int4[group_size=32]")).summary()["lossless_tensors"] == 0
    with pytest.raises(FormatError, match=r"rotated: its weights are rotated \(transform_config\)"):
        make_plan(source, recipe_of("bf16"))

    made = LAYOUTS["modelopt-config"]()
    made.plain("model.layers.0.mlp.up_proj.pre_quant_scale", 64)
    with pytest.raises(FormatError, match=r"up_proj\.weight: stored as .*pre_quant_scale BF16"):
        Checkpoint.open(made.write(tmp_path / "awq"))


def test_layers_that_engines_fuse_have_one_format(build: Build) -> None:
    for layout, stays, left, right in (
        ("kimi-k2.5", "bf16", "q_a_proj", "kv_a_proj_with_mqa"),
        ("gpt-oss", "bf16", "q_proj", "k_proj"),
        ("deepseek-v4", "fp8-block", "wq_a", "wkv"),
        ("minimax-mxfp8", "mxfp8", "w1", "w3"),
    ):
        source = Checkpoint.open(build(layout)[1])
        recipe = parse_recipe("half", f'[modules]\n"*.{left}" = "int4[group_size=32]"')
        with pytest.raises(FormatError) as caught:
            make_plan(source, recipe)
        message = str(caught.value)
        assert message.startswith("recipe half: ") and "engines run both as one layer" in message
        assert f".{left}.weight" in message and f".{right}.weight" in message
        assert "int4[group_size=32]" in message and stays in message


def test_engine_notes(build: Build) -> None:
    plan = make_plan(Checkpoint.open(build("fp8-static")[1]), recipe_of("fp8-block"))
    notes = plan.summary()["engine_notes"]
    assert any("96 rows are not a multiple of 128" in note for note in notes)
    assert any("96 columns are not a multiple of 128" in note for note in notes)
    source = Checkpoint.open(build("deepseek-v3")[1])
    assert make_plan(source, recipe_of("fp8-block")).summary()["engine_notes"] == []
    notes = make_plan(source, recipe_of('attention = "int4"')).summary()["engine_notes"]
    assert len(notes) == 1 and "kv_b_proj" in notes[0] and "take MLA's kv_b_proj apart" in notes[0]


def test_fused_nvfp4_layers_share_a_global_scale_over_files(tmp_path: Path) -> None:
    """Every tensor of a set lies in another file."""
    from compressed_tensors.quantization.utils import generate_gparam

    made = dense(lambda m, module, r, c: m.plain(f"{module}.weight", r, c), None)
    for number, name in enumerate(made.values):
        made.tensors[name] *= 2**number
        made.values[name] = made.tensors[name].to(torch.float32)

    def place(name: str) -> str:
        return f"model-{list(made.tensors).index(name)}.safetensors"

    plan, _ = to(made.write(tmp_path / "m", place), "nvfp4", tmp_path / "out")
    expect_converted(plan, tmp_path / "out", made.values)
    expect_valid_config(plan)
    stored = load(tmp_path / "out")
    scales: dict[str, set[float]] = {}
    for name in (n for n in made.values if "_proj" in n):
        scale = float(stored[f"{module_of(name)}.weight_global_scale"])
        scales.setdefault(fused_set(name) or name, set()).add(scale)
        together = [n for n in made.values if (fused_set(n) or n) == (fused_set(name) or name)]
        amax = max(float(made.values[n].abs().max()) for n in together)
        assert scale == float(generate_gparam(torch.tensor(-amax), torch.tensor(amax)))
    assert [len(found) for found in scales.values()] == [1, 1, 1, 1]


def saved(model: Any, folder: Path, **options: Any) -> Tensors:
    """A tiny model as transformers saves it."""
    torch.manual_seed(0)
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    return load(folder)


def transformers_models() -> dict[str, tuple[Any, dict[str, Any], str, bool, bool]]:
    """model, save options, experts' prefix, whether stored [in, out], whether interleaved."""
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        Llama4ForCausalLM,
        Llama4TextConfig,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )  # fmt: skip

    common = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
              "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 3,
              "num_experts_per_tok": 1, "tie_word_embeddings": False}  # fmt: skip
    fused = {"save_original_format": False}
    qwen = {**common, "num_experts": 3, "moe_intermediate_size": 96, "decoder_sparse_step": 1}
    return {
        "gpt-oss": (GptOssForCausalLM(GptOssConfig(**common, intermediate_size=96)), {},
                    "model.layers.0.mlp.experts", True, True),
        "llama4": (Llama4ForCausalLM(Llama4TextConfig(**common, intermediate_size=96,
                   intermediate_size_mlp=128, interleave_moe_layer_step=1)), {},
                   "model.layers.0.feed_forward.experts", True, False),
        "qwen3-moe": (Qwen3MoeForCausalLM(Qwen3MoeConfig(**qwen)), fused,
                      "model.layers.0.mlp.experts", False, False),
        "mixtral": (MixtralForCausalLM(MixtralConfig(**common, intermediate_size=96)), fused,
                    "model.layers.0.mlp.experts", False, False),
    }  # fmt: skip


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensors]]:
    """Folders that transformers wrote, with the true weight of every expert's projection."""
    found = {}
    for name, (model, options, prefix, turned, alternate) in transformers_models().items():
        folder = tmp_path_factory.mktemp("fused") / name
        for index, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
        stored = saved(model, folder, **options)
        gate_up = stored[f"{prefix}.gate_up_proj"].to(torch.float32)
        down = stored[f"{prefix}.down_proj"].to(torch.float32)
        if turned:
            gate_up, down = gate_up.mT, down.mT
        gate, up = gate_up.chunk(2, 1)
        if alternate:
            gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        values: Tensors = {
            f"{prefix}.{expert}.{leaf}.weight": whole[expert].contiguous()
            for leaf, whole in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items()
            for expert in range(3)
        }
        if alternate:
            bias = stored[f"{prefix}.gate_up_proj_bias"].to(torch.float32)
            for expert in range(3):
                values[f"{prefix}.{expert}.gate_proj.bias"] = bias[expert, 0::2].contiguous()
                values[f"{prefix}.{expert}.up_proj.bias"] = bias[expert, 1::2].contiguous()
        for key, tensor in stored.items():
            if ".experts." not in key:
                values[key] = tensor.to(torch.float32)
        found[name] = folder, values
    return found


FUSED = ["gpt-oss", "llama4", "qwen3-moe", "mixtral"]


@pytest.mark.parametrize("family", FUSED)
def test_fused_experts_of_transformers(
    family: str, fused: Mapping[str, tuple[Path, Tensors]], tmp_path: Path
) -> None:
    folder, values = fused[family]
    source = Checkpoint.open(folder)
    experts = [n for n in values if re.search(r"experts\.\d+\..*weight", n)]
    assert len(experts) == 9
    assert {source.weights[n].role for n in experts} == {"routed_expert"}
    assert [n for n in values if not same(source.decode(n), values[n])] == []
    assert inspect(source)["experts"] == 3
    for target in ("bf16", "int4[group_size=32]", "nvfp4", "fp8-channel"):
        plan, result = to(folder, target, tmp_path / target)
        expect_converted(plan, tmp_path / target, values)
        converted = result["lossless_tensors"] + result["requantized_tensors"]
        assert (converted == 0) == (target == "bf16")
        assert not [n for n in load(tmp_path / target) if "gate_up_proj" in n]
        if target != "bf16":
            expect_valid_config(plan)


@pytest.mark.parametrize("family", FUSED)
def test_tiles_and_workers_change_nothing_in_views(
    family: str,
    fused: Mapping[str, tuple[Path, Tensors]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, values = fused[family]
    for target in ("bf16", "int4-gptq[group_size=32]", "nvfp4"):
        stored = []
        for number, (elements, tall, copied, workers) in enumerate(
            [(1 << 20, 1024, 1 << 23, 1), (1, 8, 101, 2), (640, 24, 999, 2)]
        ):
            monkeypatch.setattr(steps, "TILE_ELEMENTS", elements)
            monkeypatch.setattr(steps, "CHUNK_ELEMENTS", 2 * elements)
            monkeypatch.setattr(steps, "TALL_ROWS", tall)
            monkeypatch.setattr(steps, "COPY_BYTES", copied)
            out = tmp_path / f"{target}-{number}"
            plan, _ = to(folder, target, out, workers)
            stored.append(load(out))
        expect_converted(plan, out, values)
        for other in stored[1:]:
            assert set(other) == set(stored[0])
            assert [n for n in other if not same(other[n], stored[0][n])] == []


@pytest.mark.parametrize("family", FUSED)
def test_experts_that_transformers_would_not_find(
    family: str, fused: Mapping[str, tuple[Path, Tensors]], tmp_path: Path
) -> None:
    """transformers itself says whose names it knows; where it does not, `plan` says so."""
    from transformers import AutoModelForCausalLM

    folder, _ = fused[family]
    plan, result = to(folder, "bf16", tmp_path / "out")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    notes = [note for note in result["engine_notes"] if "experts are written one by one" in note]
    assert bool(found["missing_keys"]) == bool(notes) == (family != "qwen3-moe")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("half", [32, 64])
def test_square_experts_are_read_as_their_neighbours(
    half: int, turned: bool, tmp_path: Path
) -> None:
    """Where 2I or I is hidden_size, one of the two tensors does not tell how both are stored."""
    made = Layout({"model_type": "unknown", "hidden_size": 64})
    prefix = "model.layers.0.mlp.experts"
    for leaf, rows, cols in (("gate_up_proj", 2 * half, 64), ("down_proj", 64, half)):
        stored = made.floats(2, rows, cols).to(torch.bfloat16)
        name = f"{prefix}.{leaf}"
        made.tensors[name] = stored.mT.contiguous() if turned else stored
        for expert in range(2):
            names = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
            parts = stored[expert].to(torch.float32).chunk(len(names))
            for one, part in zip(names, parts, strict=True):
                made.values[f"{prefix}.{expert}.{one}.weight"] = part.contiguous()
    source = Checkpoint.open(made.write(tmp_path / "m"))
    assert set(source.weights) == set(made.values)
    assert [n for n, v in made.values.items() if not same(source.decode(n), v)] == []


def fused_fp8(half: int) -> Layout:
    """transformers' fused save of a block-FP8 model: codes and scales of all experts in one."""
    made = Layout({"model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 1,
                   "num_experts": 2, "torch_dtype": "bfloat16",
                   "quantization_config": FP8_CONFIG})  # fmt: skip
    prefix = "model.layers.0.mlp.experts"
    for leaf, rows, cols in (("gate_up_proj", 2 * half, 256), ("down_proj", 256, half)):
        whole = Layout({})
        for expert in range(2):
            whole.fp8_block(str(expert), rows, cols)
            value = whole.values[f"{expert}.weight"]
            names = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
            for name, part in zip(names, value.chunk(len(names)), strict=True):
                made.values[f"{prefix}.{expert}.{name}.weight"] = part.contiguous()
        for suffix, part in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
            pair = [whole.tensors[f"{expert}.{part}"] for expert in range(2)]
            joined = torch.stack([t.view(torch.uint8) for t in pair]).view(pair[0].dtype)
            made.tensors[f"{prefix}.{leaf}{suffix}"] = joined
    return made


def test_fused_fp8(tmp_path: Path) -> None:
    made = fused_fp8(128)
    folder = made.write(tmp_path / "m")
    source = Checkpoint.open(folder)
    assert {w.format for w in source.weights.values()} == {"fp8-block"}
    assert [n for n, v in made.values.items() if not same(source.decode(n), v)] == []
    for target in TARGETS:
        plan, _ = to(folder, target, tmp_path / target)
        expect_converted(plan, tmp_path / target, made.values)


def test_a_block_over_gate_and_up_is_refused(tmp_path: Path) -> None:
    """192 rows are two blocks, whose first has 96 rows of gate and 32 of up."""
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale_inv: .*128 rows.*the 96 rows"):
        Checkpoint.open(fused_fp8(96).write(tmp_path / "m"))


def test_the_references_are_those_of_the_libraries() -> None:
    """What layouts.py calls the value of a weight, by transformers and compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = Layout({})
    blocks = made.integers(0, 256, 3, 64, 2, 16).to(torch.uint8)
    exponents = made.powers(-10, 4, 3, 64, 2)
    theirs = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert torch.equal(theirs.mT, fp4_values(blocks.flatten(2), exponents))
    codes = made.integers(0, 16, 5, 20)
    assert torch.equal(unpack_from_int32(words(codes), 4, torch.Size((5, 20))), codes - 8)
    made.fp8_block("m", 256, 128, scale="e8m0", part="scale")
    made.v4_fp4("n", 64, 128, torch.int8)
    dequantize = Fp8Dequantize(None)
    for module in ("m", "n"):
        codes, scale = made.tensors[f"{module}.weight"], made.tensors[f"{module}.scale"]
        value = dequantize._dequantize_one(codes, scale, torch.float32)
        assert torch.equal(value, made.values[f"{module}.weight"])
