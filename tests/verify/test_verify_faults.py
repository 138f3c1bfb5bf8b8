"""Whatever breaks an output, the verdict is no and the report names the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from requant.verify.comparison import verify

from .conftest import CONFIG, FILES, TEXT, Edit, Tensors, change

EXPERT = "model.layers.2.mlp.experts.3"
Damage = Callable[[Edit], Path]


def judge(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    """A verdict that must be no."""
    verdict = verify(source, output, tokens=64, text=TEXT, **options)
    assert not verdict["ok"]
    assert verdict["problems"]
    json.dumps(verdict, allow_nan=False)
    return verdict


def the_problem(verdict: dict[str, Any], name: str) -> str:
    """The one sentence about `name`."""
    (found,) = [p for p in verdict["problems"] if p.startswith(f"{name}: ")]
    return str(found)


def swap(tensors: Tensors, a: str, b: str) -> None:
    """Exchange every tensor under one prefix with that under another."""
    moved = {}
    for name in list(tensors):
        for old, new in ((a, b), (b, a)):
            if name.startswith(old):
                moved[new + name.removeprefix(old)] = tensors.pop(name)
                break
    tensors.update(moved)


def test_zeroed_scales_of_one_expert(source: Path, damaged: Damage) -> None:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith(EXPERT) and name.endswith("weight_scale"):
                tensors[name].zero_()

    verdict = judge(source, damaged(edit))
    for module in ("gate_proj", "up_proj", "down_proj"):
        sentence = the_problem(verdict, f"{EXPERT}.{module}.weight")
        assert "is all zero; the source has a root mean square of 0." in sentence
    assert len([p for p in verdict["problems"] if "zero" in p]) == 3


def test_swapped_gate_and_up(source: Path, damaged: Damage) -> None:
    gate, up = f"{EXPERT}.gate_proj.", f"{EXPERT}.up_proj."
    verdict = judge(source, damaged(lambda tensors: swap(tensors, gate, up)))
    for module, other in ((gate, up), (up, gate)):
        sentence = the_problem(verdict, f"{module}weight")
        assert f"it looks swapped with {other}weight" in sentence
        assert "at least 10 dB is expected" in sentence
    assert {w["name"] for w in verdict["tensors"]["worst"][:2]} == {f"{gate}weight", f"{up}weight"}
    assert verdict["kl"] is not None


def test_swapped_experts(source: Path, damaged: Damage) -> None:
    other = "model.layers.2.mlp.experts.5"
    verdict = judge(source, damaged(lambda tensors: swap(tensors, f"{EXPERT}.", f"{other}.")))
    sentence = the_problem(verdict, f"{EXPERT}.down_proj.weight")
    assert f"it looks swapped with {other}.down_proj.weight" in sentence


def test_swapped_layers(source: Path, damaged: Damage) -> None:
    a, b = "model.layers.1.", "model.layers.2."
    verdict = judge(source, damaged(lambda tensors: swap(tensors, a, b)))
    sentence = the_problem(verdict, f"{a}input_layernorm.weight")
    assert f"it looks swapped with {b}input_layernorm.weight" in sentence
    assert verdict["kl"] > verdict["max_kl"]
    assert any(p.startswith("KL: ") and "layer " in p for p in verdict["problems"])


def test_changed_router_bias(source: Path, damaged: Damage) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def edit(tensors: Tensors) -> None:
        tensors[name][4] += 0.25

    sentence = the_problem(judge(source, damaged(edit)), name)
    assert "router_bias was to be kept bit-identical" in sentence
    assert "1 of 8 values differ" in sentence


def test_a_router_bias_in_bf16(source: Path, damaged: Damage) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(torch.bfloat16)

    sentence = the_problem(judge(source, damaged(edit)), name)
    assert "fp32 in the source, bf16 in the output" in sentence


def test_nan_scale(source: Path, damaged: Damage) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.up_proj.weight_scale"][0, 0] = torch.nan

    verdict = judge(source, damaged(edit))
    sentence = the_problem(verdict, f"{EXPERT}.up_proj.weight")
    assert "32 of 2048 values are NaN or infinite" in sentence
    assert f"(in {EXPERT}.up_proj.weight_scale)" in sentence


def test_infinite_norm_makes_no_kl_and_names_the_layer(source: Path, damaged: Damage) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.input_layernorm.weight"][3] = torch.inf

    verdict = judge(source, damaged(edit))
    assert verdict["kl"] is None
    assert verdict["perplexity_output"] is None
    assert any("layer 1: gives NaN or infinity in the output" in p for p in verdict["problems"])
    assert not any(p.startswith("layer 2") for p in verdict["problems"])
    assert any(p.startswith("KL: not a number") for p in verdict["problems"])


def test_missing_tensor(source: Path, damaged: Damage) -> None:
    def edit(tensors: Tensors) -> None:
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{EXPERT}.up_proj.{part}"]

    verdict = judge(source, damaged(edit))
    sentence = the_problem(verdict, f"{EXPERT}.up_proj.weight")
    assert "missing in the output; bf16 [32, 64] in the source" in sentence
    assert verdict["kl"] is None
    assert verdict["layers"] == []
    assert len(verdict["problems"]) == 1


def test_a_missing_router_bias_is_not_run_without(source: Path, damaged: Damage) -> None:
    """The runner takes the bias for optional: V2 has none."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    verdict = judge(source, damaged(lambda tensors: tensors.pop(name)))
    assert "missing in the output" in the_problem(verdict, name)
    assert verdict["kl"] is None


def test_half_an_mtp_layer_is_named(source: Path, damaged: Damage) -> None:
    verdict = judge(source, damaged(lambda tensors: tensors.pop("model.layers.3.hnorm.weight")))
    assert "missing" in the_problem(verdict, "model.layers.3.hnorm.weight")


def test_absent_mtp_layer_leaves_the_main_model_measured(source: Path, damaged: Damage) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.3.")]:
            del tensors[name]

    verdict = judge(source, damaged(edit))
    assert verdict["kl"] <= verdict["max_kl"]
    assert verdict["mtp"] is None
    assert len(verdict["layers"]) == 3


def test_extra_tensor(source: Path, damaged: Damage) -> None:
    name = "model.layers.1.self_attn.q_a_proj.bias"
    verdict = judge(source, damaged(lambda tensors: tensors.update({name: torch.ones(32)})))
    assert "fp32 [32] in the output, missing in the source" in the_problem(verdict, name)


def test_wrong_shape(source: Path, damaged: Damage) -> None:
    name = "model.layers.0.self_attn.q_a_layernorm.weight"
    verdict = judge(source, damaged(lambda t: t.update({name: t[name][:16]})))
    assert the_problem(verdict, name).endswith("is [16] in the output, [32] in the source")
    assert verdict["kl"] is None


def test_wrong_weight_shape(source: Path, damaged: Damage) -> None:
    name = f"{EXPERT}.up_proj.weight_shape"
    verdict = judge(source, damaged(lambda t: t.update({name: torch.tensor([32, 60])})))
    assert the_problem(verdict, name).endswith("tells [32, 60], the weight is [32, 64]")


def test_truncated_file(source: Path, damaged: Damage) -> None:
    out = damaged(lambda tensors: None)
    with (out / FILES[0]).open("r+b") as file:
        file.truncate((out / FILES[0]).stat().st_size - 100)
    verdict = judge(source, out)
    assert verdict["kl"] is None
    assert verdict["format"] is None
    assert f"{FILES[0]}: the header describes" in verdict["problems"][0]


def test_index_that_names_an_absent_tensor(source: Path, damaged: Damage) -> None:
    out = damaged(lambda tensors: None)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost.weight"] = FILES[0]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "places model.ghost.weight in" in judge(source, out)["problems"][0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_bad_json(source: Path, damaged: Damage, name: str) -> None:
    out = damaged(lambda tensors: None)
    (out / name).write_text("{")
    assert f"{name}: not valid JSON" in judge(source, out)["problems"][0]


def test_interrupted_conversion(source: Path, damaged: Damage) -> None:
    out = damaged(lambda tensors: None)
    (out / "config.json").unlink()
    assert "config.json: no such file" in judge(source, out)["problems"][0]


def test_absent_tokenizer(source: Path, damaged: Damage) -> None:
    out = damaged(lambda tensors: None)
    (out / "tokenizer.json").unlink()
    assert "missing in the output" in the_problem(judge(source, out), "tokenizer.json")


def test_changed_tokenizer(source: Path, damaged: Damage) -> None:
    out = damaged(lambda tensors: None)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = the_problem(judge(source, out), "tokenizer.json")
    assert "differs from the source's in model" in sentence


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rope_theta", 20000.0, "20000.0"),
        ("routed_scaling_factor", 1.0, "routed_scaling_factor is 1.0 in the output, 1.5"),
        ("architectures", ["Other"], "architectures is ['Other'] in the output"),
        ("model_type", "other", "model_type is 'other'"),
        ("num_experts_per_tok", 0, "num_experts_per_tok is 0, expected a positive integer"),
    ],
)
def test_changed_config(source: Path, damaged: Damage, key: str, value: Any, told: str) -> None:
    out = damaged(lambda tensors: None)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, key: value}))
    assert any("config.json: " in p and told in p for p in judge(source, out)["problems"])


def test_undeclared_quantization(
    source: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted("int8-channel"), out)
    (out / "config.json").write_text(json.dumps(CONFIG))
    (sentence,) = judge(source, out)["problems"]
    assert "quant_method is None" in sentence
    assert "'compressed-tensors'" in sentence


def test_quantization_declared_for_plain_weights(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(source, out)
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    (out / "config.json").write_text(json.dumps(config))
    (sentence,) = judge(source, out)["problems"]
    assert "quant_method is 'fp8', but every weight is in plain floats" in sentence


def test_a_broken_mtp_layer_is_named(source: Path, damaged: Damage, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.3.self_attn.o_proj.weight_scale"].mul_(-1)
        tensors["model.layers.3.mlp.shared_experts.down_proj.weight_scale"].mul_(-3)

    verdict = judge(source, damaged(edit))
    assert "SQNR -6.0 dB as int4" in the_problem(verdict, "model.layers.3.self_attn.o_proj.weight")
    assert verdict["kl"] < verdict["mtp"]["kl"]
    between = (verdict["kl"] + verdict["mtp"]["kl"]) / 2
    problems = judge(source, tmp_path / "out", max_kl=between)["problems"]
    assert problems[-1].startswith("KL of the MTP layers: ")
    assert "layer 3 changes most" in problems[-1]
    assert not any(problem.startswith("KL: ") for problem in problems)


def test_many_problems_are_shortened(source: Path, damaged: Damage) -> None:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name].mul_(3)

    verdict = judge(source, damaged(edit))
    # 7 or 8 attention and 27 expert matrices in each of three layers, 8 in the dense one.
    assert len(verdict["problems"]) == 101
    assert verdict["problems"][-1].startswith("and ")
    assert verdict["problems"][-1].endswith(" more")


def test_identical_files_with_one_bit_flipped(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(source, out)

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"].view(torch.int16)[7, 7] ^= 1

    change(out, edit)
    sentence = the_problem(judge(source, out), "lm_head.weight")
    assert "1 of 16384 values differ" in sentence


def test_a_zero_that_changed_its_sign_is_not_identical(source: Path, tmp_path: Path) -> None:
    name, folders = "model.layers.3.enorm.weight", (tmp_path / "a", tmp_path / "b")
    for folder, zero in zip(folders, (0.0, -0.0), strict=True):
        shutil.copytree(source, folder)
        change(folder, lambda tensors, zero=zero: tensors[name][:2].fill_(zero))  # type: ignore[misc]
    sentence = the_problem(judge(*folders), name)
    assert "0 of 64 values differ (only in their bits)" in sentence


def test_a_weight_that_is_all_zero_in_the_source_only(source: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.up_proj.weight"
    shutil.copytree(source, tmp_path / "a")
    change(tmp_path / "a", lambda tensors: tensors[name].zero_())
    assert "the source is all zero" in the_problem(judge(tmp_path / "a", source), name)


def test_an_infinite_source_is_named_as_such(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "a")

    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.input_layernorm.weight"][3] = torch.inf

    change(tmp_path / "a", edit)
    problems = judge(tmp_path / "a", tmp_path / "a")["problems"]
    assert "layer 1: gives NaN or infinity in the source and in the output" in problems
    assert not any(problem.startswith(("layer 2", "layer 3")) for problem in problems)
