"""Reference libraries load what `convert` writes, and `convert` reads what they write: whole
checkpoints on the CPU, unmodified, and every weight equal bit for bit.

What transformers 5.23 cannot load, compressed-tensors' own converter reads here instead: fused
experts in INT8, asymmetric INT4, MXFP8, FP8 blocks or NVFP4 (whose global scale it leaves out), a
mixture of two formats outside the experts, and layers that are no whole FP8 blocks.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from requant.convert.inspect import inspect
from requant.convert.plan import make_plan
from requant.convert.recipe import (
    Recipe,
    default_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
)
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.quant import parse_format
from requant.quant.compressed_tensors import narrow
from tests.convert.loaders import (
    FAMILIES,
    dequantized,
    dequantized_model,
    load_model,
    logits,
    ours,
    quantized,
    save_compressed,
    save_model,
    weights_of,
)
from tests.helpers import CPU, Tensors, load

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

#: Formats of one scheme in compressed-tensors' container.
COMPRESSED = [
    "fp8-channel",
    "fp8-channel[scale=fp32]",
    "fp8-tensor",
    "fp8-tensor[scale=bf16]",
    "fp8-block[container=compressed-tensors]",
    "fp8-block[container=compressed-tensors,scale=bf16]",
    "int8-channel",
    "int8-channel[scale=fp32]",
    "int4",
    "int4[group_size=32]",
    "int4[group_size=-1]",
    "int4[symmetric=false]",
    "int4[symmetric=false,group_size=32,scale=fp16]",
    "nvfp4",
    "mxfp4",
    "mxfp8",
]
#: Recipes whose result is in that container.
PRESETS = [
    "deepseek-int4-experts",
    "blackwell-nvfp4",
    "kimi-style",
    "mxfp4-experts",
    "ampere-int4",
    "w8a8-int8",
]
#: For weights in every role; rows and columns that are no whole blocks.
RAGGED = [
    "fp8-block[container=compressed-tensors]",
    "fp8-channel",
    "fp8-tensor",
    "int8-channel",
    "int4[group_size=32]",
    "int4[group_size=-1,symmetric=false]",
    "nvfp4",
    "mxfp4",
    "mxfp8",
]
#: Formats of fused experts that transformers decompresses.
FUSED = ["fp8-channel", "fp8-tensor", "int4", "int4[group_size=32]", "mxfp4"]
FUSED_PRESETS = ["kimi-style", "mxfp4-experts", "ampere-int4"]
#: What compressed-tensors' presets are here, and what of the activations they store.
WRITTEN: dict[str, tuple[str, set[str]]] = {
    "W4A16": ("int4", set()),
    "W4A16_ASYM": ("int4[symmetric=false]", set()),
    "W8A8": ("int8-channel", set()),
    "FP8_DYNAMIC": ("fp8-channel", set()),
    "FP8": ("fp8-tensor[scale=bf16]", {"input_scale"}),
    "FP8_BLOCK": ("fp8-block[scale=bf16,container=compressed-tensors]", set()),
    "NVFP4A16": ("nvfp4", set()),
    "NVFP4": ("nvfp4", {"input_global_scale"}),
    "MXFP4A16": ("mxfp4", set()),
    "MXFP4": ("mxfp4", set()),
    "MXFP8A16": ("mxfp8", set()),
    "MXFP8": ("mxfp8", set()),
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> Make:
    """`model(family)`: a folder that transformers saved; `ragged` and `demo` are our own."""

    @functools.cache
    def get(family: str) -> Path:
        if family in FAMILIES:
            return save_model(tmp_path_factory.mktemp("model") / family, family)
        return demo_path() if family == "demo" else source("bf16")

    return get


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Make) -> Make:
    """`made(family, format or preset)`: the model converted, made once."""

    @functools.cache
    def get(family: str, text: str) -> Path:
        return to(model(family), tmp_path_factory.mktemp("made") / "out", text)

    return get


def to(source: Path, out: Path, wanted: str | Recipe) -> Path:
    """Convert to a format, a preset or a recipe."""
    if isinstance(wanted, str):
        shipped = "[" not in wanted and wanted in recipe_names()
        wanted = load_recipe(wanted) if shipped else default_recipe(wanted)
    convert(make_plan(Checkpoint.open(source), wanted), out, Runtime(CPU, 1))
    return out


def require_equal(theirs: Tensors, ours: Tensors, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every tensor of ours is theirs, in their dtype, and there are no others."""
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == dtype or name.endswith("e_score_correction_bias"), name
        assert torch.equal(tensor.to(dtype), ours[name].to(dtype)), name


CONVERTED = [("llama", text) for text in COMPRESSED]
CONVERTED += [("deepseek_v3", text) for text in (*COMPRESSED, *PRESETS)]
CONVERTED += [("qwen3_moe", text) for text in ("deepseek-int4-experts", "blackwell-nvfp4")]
CONVERTED += [("ragged", text) for text in RAGGED]
CONVERTED += [("demo", text) for text in ("nvfp4", "mxfp4", "deepseek-int4-experts")]


@pytest.mark.parametrize(("family", "text"), CONVERTED)
def test_compressed_tensors_decompresses_to_our_weights(family: str, text: str, made: Make) -> None:
    """Its converter, with its own matching of modules to schemes, over the whole folder."""
    folder = made(family, text)
    assert len(quantized(folder)) >= 9
    stored, decoded, theirs = load(folder), ours(folder), dequantized(folder)
    assert theirs.keys() == decoded.keys()
    converted = set(quantized(folder))
    for name, tensor in theirs.items():
        expected = decoded[name] if name in converted else stored[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


@pytest.mark.parametrize("text", PRESETS)
@pytest.mark.parametrize("family", ["deepseek_v3", "demo"])
def test_every_module_gets_the_scheme_it_is_stored_in(family: str, text: str, made: Make) -> None:
    """compressed-tensors' own matching, on modules with the checkpoint's names: as engines do."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        apply_quantization_config,
    )

    checkpoint = Checkpoint.open(made(family, text))
    tree = module_tree(checkpoint)
    config = QuantizationConfig.model_validate(checkpoint.quantization_config)
    apply_quantization_config(tree, config)
    schemes = 0
    for name, weight in checkpoint.weights.items():
        if weight.codec is None or len(weight.shape) != 2:
            continue
        module = tree.get_submodule(name.removesuffix(".weight"))
        scheme = getattr(module, "quantization_scheme", None)
        expected = weight.codec.scheme()
        assert (scheme is None) == (expected is None), name
        if scheme is not None and expected is not None:
            form = scheme.format or config.format
            assert form == expected["format"], name
            assert scheme.weights == QuantizationArgs.model_validate(expected["weights"]), name
            parts = BaseCompressor.get_value_from_registry(form).compression_param_names(scheme)
            assert set(parts) == set(weight.parts), name
            schemes += 1
    assert schemes == len(quantized(checkpoint.path)) >= 9


def module_tree(checkpoint: Checkpoint) -> torch.nn.Module:
    """Linear layers and embeddings under a checkpoint's names."""
    tree = torch.nn.Module()
    for name, weight in checkpoint.weights.items():
        if len(weight.shape) != 2 or not name.endswith(".weight"):
            continue
        rows, cols = weight.shape
        *above, leaf = name.removesuffix(".weight").split(".")
        parent = tree
        for step in above:
            if not hasattr(parent, step):
                parent.add_module(step, torch.nn.Module())
            parent = parent.get_submodule(step)
        if weight.kind == "embedding":
            parent.add_module(leaf, torch.nn.Embedding(rows, cols))
        else:
            parent.add_module(leaf, torch.nn.Linear(cols, rows, bias=False))
    return tree


DEQUANTIZED = [("llama", text) for text in COMPRESSED]
DEQUANTIZED += [("deepseek_v3", text) for text in (*FUSED, *FUSED_PRESETS)]
DEQUANTIZED += [("qwen3_moe", text) for text in FUSED]


@pytest.mark.parametrize(("family", "text"), DEQUANTIZED)
def test_transformers_dequantizes_to_our_weights(family: str, text: str, made: Make) -> None:
    folder = made(family, text)
    assert len(quantized(folder)) >= 9
    require_equal(weights_of(dequantized_model(folder)), ours(folder))


#: As it loads them by default; not asymmetric INT4, for which it expects other shapes.
AS_LOADED = [("llama", text) for text in COMPRESSED if "symmetric=false" not in text]
AS_LOADED += [("deepseek_v3", text) for text in (*FUSED_PRESETS, "deepseek-int4-experts")]


@pytest.mark.parametrize(("family", "text"), AS_LOADED)
def test_transformers_runs_what_it_loads(
    family: str, text: str, made: Make, tmp_path: Path
) -> None:
    """Compressed until the first forward. It holds scales in BF16, whatever they are stored in."""
    folder = made(family, text)
    loaded = load_model(folder)
    theirs = logits(loaded)  # decompresses
    mine = ours(folder, scales_in_bf16=True)
    require_equal({name: t for name, t in weights_of(loaded).items() if name in mine}, mine)
    plain = logits(load_model(to(folder, tmp_path / "bf16", "bf16")))
    if text.startswith(("fp8", "int8", "deepseek")):  # rounds activations as well
        distance = float((theirs - plain).abs().max() / plain.std())
        print(f"{family} {text}: largest difference of logits {distance:.2f} of their deviation")
        assert 0 < distance < 0.5
    else:
        assert torch.equal(theirs, plain)


FP8 = [
    "fp8-block",
    "fp8-block[scale=ue8m0]",
    "fp8-block[scale=e8m0]",
    "fp8-block[block_rows=64,block_cols=32]",
    "fp8-tensor[container=fp8]",
    "fp8-from-bf16",
]


@pytest.mark.parametrize("text", FP8)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_fp8_quantizer_dequantizes_to_our_weights(
    family: str, text: str, made: Make
) -> None:
    """DeepSeek's container."""
    pytest.importorskip("accelerate")
    folder = made(family, text)
    assert len(quantized(folder)) >= 9
    require_equal(weights_of(dequantized_model(folder)), ours(folder))


@pytest.mark.parametrize("text", ["fp8-block", "fp8-block[scale=e8m0]"])
def test_fp8_that_transformers_saves_is_read(text: str, made: Make, tmp_path: Path) -> None:
    """It quantizes again what it dequantized, with its own arithmetic. (Its config does not say
    so; the parts do.)"""
    pytest.importorskip("accelerate")
    dequantized_model(made("llama", text)).save_pretrained(tmp_path / "theirs")
    saved = Checkpoint.open(tmp_path / "theirs")
    names = quantized(tmp_path / "theirs")
    assert names == quantized(made("llama", text))
    assert {saved.weights[name].format for name in names} == {text}
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["quantization_config"] = Checkpoint.open(made("llama", text)).quantization_config
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    require_equal(weights_of(dequantized_model(tmp_path / "theirs")), ours(tmp_path / "theirs"))
    require_conversions(tmp_path / "theirs", ours(tmp_path / "theirs"), text, tmp_path)


BNB = ["nf4", "nf4[double_quant=true]", "bnb-fp4", "bnb-fp4[double_quant=true,blocksize=128]"]


def bitsandbytes_weights(model: Any) -> Tensors:
    """A model's tensors, 4-bit layers decoded by bitsandbytes. (Columns are whole blocks: its
    kernel for AVX-512 takes the wrong absmax where they are not.)"""
    import bitsandbytes as bnb

    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.data
        if isinstance(parameter, bnb.nn.Params4bit):
            tensor = bnb.functional.dequantize_4bit(tensor, parameter.quant_state)
        found[name] = tensor
    return found


@pytest.mark.parametrize("text", BNB)
def test_transformers_loads_bitsandbytes_as_our_weights(text: str, made: Make) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    folder = made("llama", text)
    loaded = load_model(folder, device_map="cpu")
    theirs = bitsandbytes_weights(loaded)
    assert {n for n, t in theirs.items() if t.data_ptr() != loaded.get_parameter(n).data_ptr()} == {
        *quantized(folder)
    }
    require_equal(theirs, ours(folder))
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("kind", "text"), [("nf4", "nf4"), ("fp4", "bnb-fp4")])
def test_what_bitsandbytes_saves_is_read(
    kind: str, text: str, double: bool, model: Make, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    loaded = load_model(model("llama"), quantization_config=options, device_map="cpu")
    loaded.save_pretrained(tmp_path / "theirs")
    expected = f"{text}[double_quant=true]" if double else text
    require_formats(tmp_path / "theirs", expected)
    theirs = bitsandbytes_weights(loaded)
    require_equal(theirs, ours(tmp_path / "theirs"))
    require_conversions(tmp_path / "theirs", theirs, expected, tmp_path)


def require_formats(folder: Path, text: str, plain: str = "bf16") -> None:
    """`inspect` names this format for every linear layer and a plain one for the rest."""
    roles = inspect(Checkpoint.open(folder))["roles"]
    formats = {role: set(found["formats"]) for role, found in roles.items()}
    assert formats.pop("attention") == formats.pop("dense_mlp") == {text}
    assert set().union(*formats.values()) == {plain}


def require_conversions(folder: Path, theirs: Tensors, text: str, tmp_path: Path) -> None:
    """To BF16: the library's decompression. To INT4: the source's values where its codes can be
    handed over, else what the codec makes of them. To itself: nothing changes."""
    source, names = Checkpoint.open(folder), quantized(folder)
    stored, plain = load(folder), load(to(folder, tmp_path / "to-bf16", "bf16"))
    assert plain.keys() == ours(folder).keys()
    for name, tensor in plain.items():
        expected = theirs[name].to(torch.bfloat16) if name in names else stored[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    target = default_recipe("int4[group_size=32]")
    int4 = to(folder, tmp_path / "to-int4", target)
    assert quantized(int4) == names
    lossless = {w.source.name for w in make_plan(source, target).weights if w.lossless}
    symmetric = text == "int4" or "-gptq" in text or "-awq" in text  # in what the tests make
    handed_over = symmetric and "symmetric=false" not in text
    assert lossless == ({*names} if handed_over else set())
    codec, values = parse_format("int4[group_size=32]"), Checkpoint.open(int4)
    for name in names:
        shape = source.weights[name].shape[0], source.weights[name].shape[1]
        expected = source.decode(name)
        if name not in lossless:
            expected = codec.decode(codec.encode(expected, shape), shape)
        assert torch.equal(values.decode(name), expected), name
    if not parse_format(text).read_only:
        unchanged = make_plan(source, default_recipe(text)).summary()
        assert unchanged["requantized_tensors"] == unchanged["lossless_tensors"] == 0


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, model: Make) -> Make:
    """`compressed(preset)`: the Llama as compressed-tensors writes it, once."""

    @functools.cache
    def get(preset: str) -> Path:
        return save_compressed(model("llama"), tmp_path_factory.mktemp("theirs") / preset, preset)

    return get


@pytest.mark.parametrize("preset", WRITTEN)
def test_what_compressed_tensors_writes_is_read(
    preset: str, compressed: Make, tmp_path: Path
) -> None:
    folder, (text, activations) = compressed(preset), WRITTEN[preset]
    require_formats(folder, text)
    theirs = {n: t for n, t in dequantized(folder).items() if n.split(".")[-1] not in activations}
    require_equal(theirs, ours(folder))
    require_conversions(folder, theirs, text, tmp_path)
    for name in quantized(folder):
        assert set(Checkpoint.open(folder).weights[name].activations) == activations, name
    left = set(load(tmp_path / "to-int4")) | set(load(tmp_path / "to-bf16"))
    assert not {name for name in left if name.split(".")[-1] in activations}


@pytest.mark.parametrize("preset", ["FP8", "NVFP4", "W8A8", "MXFP4"])
def test_kept_layers_keep_what_tells_of_their_activations(
    preset: str, compressed: Make, tmp_path: Path
) -> None:
    """Attention stays as it is, static scales and all; the MLPs become INT4."""
    folder, (text, activations) = compressed(preset), WRITTEN[preset]
    recipe = parse_recipe("mixed", '[roles]\ndense_mlp = "int4[group_size=32]"')
    out = to(folder, tmp_path / "out", recipe)
    before, after = load(folder), load(out)
    kept = {name for name in before if ".self_attn." in name}
    assert kept == {name for name in after if ".self_attn." in name}
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in kept)
    written = Checkpoint.open(out)
    for name in quantized(out):
        attention = ".self_attn." in name
        assert written.weights[name].format == (text if attention else "int4[group_size=32]")
        assert set(written.weights[name].activations) == (activations if attention else set())
        groups = narrow(written.quantization_config or {}, name.removesuffix(".weight"))
        (scheme,) = groups["config_groups"].values()
        theirs = Checkpoint.open(folder).quantization_config["config_groups"]["group_0"]
        expected = theirs["input_activations"] if attention else None
        assert scheme["input_activations"] == expected, name
    theirs = {n: t for n, t in dequantized(out).items() if n.split(".")[-1] not in activations}
    require_equal(theirs, ours(out))


#: Ours, for gptqmodel to load; not asymmetric version 1, which it loads from nobody but itself.
GPTQMODEL = [
    "int4-gptq",
    "int4-gptq[group_size=32,version=2]",
    "int4-gptq[group_size=-1,symmetric=false,version=2]",
    "int4-awq",
    "int4-awq[group_size=32]",
]
#: What gptqmodel is to save, and what it is here.
SAVED: dict[str, dict[str, Any]] = {
    "int4-gptq": {"group_size": 128, "format": "gptq"},
    "int4-gptq[group_size=32,version=2]": {"group_size": 32, "format": "gptq_v2"},
    "int4-gptq[group_size=32,symmetric=false]": {"group_size": 32, "format": "gptq", "sym": False},
    "int4-gptq[group_size=32,act_order=true]": {"group_size": 32, "desc_act": True},
    "int4-awq[group_size=32]": {"group_size": 32, "format": "gemm"},
}


@pytest.fixture(scope="module")
def gptqmodel(
    tmp_path_factory: pytest.TempPathFactory, model: Make, made: Make
) -> dict[str, tuple[Path, Tensors]]:
    """`ours <format>`, `theirs <format>` -> the folder, and what gptqmodel decodes of it in FP16.
    All in one process, whose start takes most."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    place = tmp_path_factory.mktemp("gptqmodel")
    jobs: dict[str, dict[str, Any]] = {}
    for text in GPTQMODEL:
        method = str(parse_format(text).quant_method)
        jobs[f"ours {text}"] = {"method": method, "folder": str(made("llama", text))}
    for text, options in SAVED.items():
        job = {"save": options, "source": str(model("llama")), "folder": str(place / text)}
        jobs[f"theirs {text}"] = {**job, "method": str(parse_format(text).quant_method)}
    (place / "folders.json").write_text(json.dumps(list(jobs.values())))
    driver = Path(__file__).with_name("gptqmodel_folders.py")
    ran = subprocess.run(
        [sys.executable, str(driver), str(place)],
        cwd=place,  # gptqmodel leaves a folder of logs
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {
        name: (Path(job["folder"]), load_file(place / f"{number}.safetensors"))
        for number, (name, job) in enumerate(jobs.items())
    }


def require_half_equal(folder: Path, theirs: Tensors) -> None:
    """The quantized weights, in FP16."""
    checkpoint = Checkpoint.open(folder)
    assert sorted(theirs) == sorted(quantized(folder)) and len(theirs) == 14
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.decode(name).to(torch.float16), tensor), name


@pytest.mark.parametrize("text", GPTQMODEL)
def test_gptqmodel_loads_our_weights(text: str, gptqmodel: dict[str, tuple[Path, Tensors]]) -> None:
    require_half_equal(*gptqmodel[f"ours {text}"])


@pytest.mark.parametrize("text", SAVED)
def test_what_gptqmodel_saves_is_read(
    text: str, gptqmodel: dict[str, tuple[Path, Tensors]], tmp_path: Path
) -> None:
    folder, theirs = gptqmodel[f"theirs {text}"]
    if text.startswith("int4-awq"):  # AutoAWQ says so, gptqmodel `gptq` of the format `gemm`
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "awq"
        (folder / "config.json").write_text(json.dumps(config))
    require_formats(folder, text, plain="fp16")
    require_half_equal(folder, theirs)
    require_conversions(folder, ours(folder), text, tmp_path)
    assert (folder / "quantize_config.json").is_file()
    assert not (tmp_path / "to-bf16" / "quantize_config.json").exists()
