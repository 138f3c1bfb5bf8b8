"""Every format into every format, on the demo: the reference of the one decodes what is stored, the
reference of the other encodes it, and `convert` gives the same bytes; or its plan says that the
pair is lossless, and both references read the same values.

References are libraries, or their formulas written out (references.py); all are optional.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from requant.convert.plan import Plan, make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.quant import parse_format
from tests.convert.references import FORMATS, GROUP, decode, encode
from tests.helpers import CPU, Tensors, load, same

#: The pairs whose plan says that no value changes; a format into itself is copied.
LOSSLESS = {
    "bf16": {"fp32"},
    "fp16": {"fp32"},
    "fp8-channel": {"fp32"},
    "fp8-tensor": {"fp8-block"},
    "mxfp8": {"bf16", "fp16", "fp32"},
    "int8-channel": {"fp32"},
    "int4": {"fp32", "int4-awq", "int4-gptq"},
    "mxfp4": {"bf16", "fp16", "fp32", "fp8-block", "fp8-channel", "mxfp8"},
    "int4-awq": {"fp32"},
    "int4-gptq": {"int4-awq"},
}

#: What is compared: every role and shape; and the layers that engines run as one with each.
SAMPLE = {
    "model.layers.4.self_attn.q_a_proj": ["model.layers.4.self_attn.kv_a_proj_with_mqa"],
    "model.layers.4.self_attn.kv_a_proj_with_mqa": ["model.layers.4.self_attn.q_a_proj"],
    "model.layers.1.self_attn.q_b_proj": [],
    "model.layers.2.self_attn.kv_b_proj": [],
    "model.layers.3.self_attn.o_proj": [],
    "model.layers.0.mlp.gate_proj": ["model.layers.0.mlp.up_proj"],
    "model.layers.0.mlp.down_proj": [],
    "model.layers.1.mlp.shared_experts.up_proj": ["model.layers.1.mlp.shared_experts.gate_proj"],
    "model.layers.3.mlp.experts.0.down_proj": [],
    "model.layers.4.mlp.experts.0.gate_proj": ["model.layers.4.mlp.experts.0.up_proj"],
}
MODULES = sorted({module for one, others in SAMPLE.items() for module in (one, *others)})
COUNT = 136  # linear layers of the demo

Folder = Callable[[str], Path]
Values = Callable[[str], Tensors]


def plan_to(folder: Path, name: str) -> Plan:
    """All linear layers, kv_b_proj too, in the format's comparable variant."""
    recipe = replace(default_recipe(FORMATS[name]), modules={})
    return make_plan(Checkpoint.open(folder), recipe)


def parts_of(tensors: Mapping[str, torch.Tensor], module: str) -> Tensors:
    prefix = f"{module}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def expect_same(found: Tensors, expected: Tensors, what: str) -> None:
    assert set(found) == set(expected), what
    assert [part for part in expected if not same(found[part], expected[part])] == [], what


@pytest.fixture(scope="module")
def demo() -> Tensors:
    return load(demo_path())


@pytest.fixture(scope="module")
def linear(demo: Tensors) -> list[str]:
    """The linear layers: those with FP8 scales."""
    suffix = ".weight_scale_inv"
    modules = [name.removesuffix(suffix) for name in demo if name.endswith(suffix)]
    assert len(modules) == COUNT and {*MODULES} <= {*modules}
    return modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """`folder(format)`: the demo in that format, made once."""
    base = tmp_path_factory.mktemp("matrix")

    @functools.cache
    def get(name: str) -> Path:
        if name == "fp8-block":
            return demo_path()
        convert(plan_to(demo_path(), name), base / name, Runtime(CPU, 1))
        return base / name

    yield get
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def values(folder: Folder, demo: Tensors) -> Values:
    """`values(format)`: the modules' float32 weights, as the reference reads them there."""

    @functools.cache
    def get(name: str) -> Tensors:
        stored = load(folder(name))
        shapes = {module: demo[f"{module}.weight"].shape for module in MODULES}
        return {
            module: decode(name, parts_of(stored, module), (rows, cols))
            for module, (rows, cols) in shapes.items()
        }

    return get


@pytest.fixture(scope="module")
def gptqmodel(
    folder: Folder, values: Values, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Tensors]:
    """What gptqmodel encodes of each format's values, and what it decodes of the two formats that
    it knows: (format, module) -> its parts, or its `weight` in float16. One process for all."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    from tests.quant.test_gptqmodel import Jobs

    jobs, keys = Jobs(), []
    for name in FORMATS:
        for module in SAMPLE:
            weight = values(name)[module]
            gptq = {"method": "gptq", "sym": True, "version": 1, "group_size": GROUP}
            if name in ("int4-gptq", "int4-awq"):
                how = gptq if name == "int4-gptq" else {"method": "awq", "group_size": GROUP}
                parts = parts_of(load(folder(name)), module)
                keys.append((f"{name} decoded", module))
                jobs.add(parts, do="decode", shape=tuple(weight.shape), **how)
            if name != "int4-gptq":
                keys.append((name, module))
                jobs.add({"weight": weight}, do="quantize", desc_act=False, **gptq)
    jobs.run(tmp_path_factory.mktemp("gptqmodel"))
    return dict(zip(keys, jobs.answers, strict=True))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_format_into_every_format(
    source: str,
    target: str,
    demo: Tensors,
    linear: list[str],
    folder: Folder,
    values: Values,
    out: Path,
    request: pytest.FixtureRequest,
) -> None:
    plan = plan_to(folder(source), target)
    convert(plan, out, Runtime(CPU, 1))

    copied, lossless = source == target, target in LOSSLESS.get(source, ())
    planned = {weight.source.module: weight for weight in plan.weights}
    assert {planned[module].codec is None for module in linear} == {copied}
    assert {planned[module].lossless for module in linear} == {lossless}

    written, opened = load(out), Checkpoint.open(out)
    assert {opened.weights[f"{m}.weight"].codec for m in linear} == {parse_format(FORMATS[target])}
    encoded = {f"{module}.{part}" for module in linear for part in parts_of(written, module)}
    others = {name for name in demo if name.rpartition(".")[0] not in linear}
    expect_same({n: written[n] for n in {*written} - encoded}, {n: demo[n] for n in others}, target)

    before = load(folder(source)) if copied else {}
    for module, fused in SAMPLE.items():
        parts = parts_of(written, module)
        if copied:
            expect_same(parts, parts_of(before, module), module)
            continue
        weights = [values(source)[name] for name in (module, *fused)]
        if lossless:
            rows, cols = weights[0].shape
            assert torch.equal(decode(target, parts, (rows, cols)), weights[0]), module
            continue
        if target == "int4-gptq":
            answer = request.getfixturevalue("gptqmodel")[source, module]
            expected = {part: tensor for part, tensor in answer.items() if part != "weight"}
        else:
            expected = encode(target, weights)
        expect_same(parts, expected, module)


@pytest.mark.parametrize("name", ["int4-gptq", "int4-awq"])
def test_what_is_written_out_is_gptqmodels(
    name: str, values: Values, gptqmodel: dict[tuple[str, str], Tensors]
) -> None:
    """Its float16 products are the float32 ones of references.py, rounded once."""
    for module in SAMPLE:
        theirs = gptqmodel[f"{name} decoded", module]["weight"]
        assert same(values(name)[module].to(torch.float16), theirs), module


def test_the_sample_has_what_is_special(linear: list[str]) -> None:
    """Every role and shape, rows that end inside a block, scales in another file than their codes,
    fused layers in two files, and all layers that are fused with those of the sample."""
    weights = Checkpoint.open(demo_path()).weights
    everything = [weights[f"{module}.weight"] for module in linear]
    sample = [weights[f"{module}.weight"] for module in SAMPLE]
    assert {w.role for w in sample} == {w.role for w in everything}
    assert {w.shape for w in sample} == {w.shape for w in everything}
    assert any(w.shape[0] % 128 for w in sample)
    assert any(len({part.location.file for part in w.parts.values()}) > 1 for w in sample)
    assert any(
        weights[f"{other}.weight"].file != w.file for w in sample for other in SAMPLE[w.module]
    )
    for weight in sample:
        companions = {w.module for w in everything if w.fused_set == weight.fused_set}
        assert {weight.module, *SAMPLE[weight.module]} == (
            companions if weight.fused_set else {weight.module}
        )
