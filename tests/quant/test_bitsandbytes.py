"""bitsandbytes writes the same bytes and reads ours, alone and through transformers.

Not a dependency; without it these tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from requant.quant import detect_format, parse_format
from requant.quant.codec import TensorSpec
from requant.quant.nf4 import DTYPES, MAPS, BitsAndBytes

bnb = pytest.importorskip("bitsandbytes")

KINDS = {"nf4": "nf4", "bnb-fp4": "fp4"}
#: Whole blocks, blocks across rows, a short last block, an odd count, more than one nested block.
SHAPES = [(1, 1), (1, 63), (16, 128), (127, 129), (33, 1000), (300, 1407), (576, 200)]
VARIANTS = ["", "double_quant=true", "blocksize=32", "double_quant=true,blocksize=256"]
Parts = dict[str, torch.Tensor]


def codec(name: str, *options: str) -> BitsAndBytes:
    parsed = parse_format(f"{name}[{','.join(filter(None, options))}]")
    assert isinstance(parsed, BitsAndBytes)
    return parsed


def torch_dtype(wanted: BitsAndBytes) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[wanted.dtype])
    return dtype


def their_weight(parts: Parts) -> torch.Tensor:
    """Decoded by bitsandbytes, in the dtype that the quant_state names.

    As one row: with AVX-512 its kernel for the CPU takes the wrong absmax in rows of whole
    sixteens that are not whole blocks, because it counts cols // blocksize blocks a row. Not
    compiled, which its fallback for odd counts would spend seconds on.
    """
    stats = {part: tensor for part, tensor in parts.items() if part != "weight"}
    state = bnb.functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    rows, cols = state.shape
    state.shape = torch.Size((1, rows * cols))
    with torch.compiler.set_stance("force_eager"):
        decoded: torch.Tensor = bnb.functional.dequantize_4bit(parts["weight"], state)
    return decoded.view(rows, cols)


def our_weight(parts: Parts) -> torch.Tensor:
    """Decoded by what `detect` and the JSON make of the parts."""
    names = {torch.uint8: "U8", torch.float32: "F32"}
    header = {part: TensorSpec(names[t.dtype], tuple(t.shape)) for part, t in parts.items()}
    found = detect_format(header, None)
    content = {part: parts[part].numpy().tobytes() for part in found.needs_content}
    completed = found.with_content(content)
    return completed.decode(parts, completed.shape(header))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_bitsandbytes(
    name: str, options: str, shape: tuple[int, int], weight: Any, same: Any
) -> None:
    wanted, source = codec(name, options, "dtype=fp32"), weight(*shape, seed=shape[0]) * 1.1
    packed, state = bnb.functional.quantize_4bit(
        source,
        blocksize=wanted.blocksize,
        compress_statistics=wanted.double_quant,
        quant_type=KINDS[name],
    )
    stored = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    parts = wanted.encode(source, shape)
    assert set(parts) == {"weight", *stored}
    assert same(parts["weight"], packed)
    for part, tensor in stored.items():
        if part == wanted.state_part:
            assert bytes(parts[part].numpy()).rstrip(b" ") == bytes(tensor.numpy())
        else:
            assert same(parts[part], tensor), part


@pytest.mark.parametrize("length", [63, 64])
@pytest.mark.parametrize("name", KINDS)
def test_roundings_next_to_thresholds_are_bitsandbytes(name: str, length: int, same: Any) -> None:
    """A whole block is multiplied by 1 / absmax, a short one divided by absmax: an ulp apart."""
    values = torch.tensor(MAPS[KINDS[name]]).sort().values
    middle = (values[:-1] + values[1:]) / 2
    middle = middle[middle != 0].repeat(5)[: length - 1]
    generator = torch.Generator().manual_seed(length)
    for absmax in torch.rand(100, 1, generator=generator) * 3 + 0.1:
        near = (middle * absmax).view(torch.int32)
        near += torch.randint(-2, 3, near.shape, generator=generator, dtype=torch.int32)
        source = torch.cat((absmax, near.view(torch.float32)))[None]
        packed, _ = bnb.functional.quantize_4bit(source, blocksize=64, quant_type=KINDS[name])
        assert same(codec(name).encode(source, (1, length))["weight"], packed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("name", KINDS)
def test_bitsandbytes_decodes_ours_to_our_values(
    name: str, options: str, dtype: str, shape: tuple[int, int], weight: Any
) -> None:
    """Values, not bits: its kernels differ among themselves in the sign of FP4's second zero."""
    wanted = codec(name, options, f"dtype={dtype}")
    parts = wanted.encode(weight(*shape), shape)
    theirs = their_weight(parts)
    assert theirs.dtype == torch_dtype(wanted) and theirs.shape == shape
    assert torch.equal(theirs, wanted.decode(parts, shape).to(theirs.dtype))


def test_every_place_of_the_double_quantization_is_bitsandbytes(same: Any) -> None:
    """Blocks whose absmax sit on either side of every step of its table of 65536 places: the
    mean is 4, so that absmax - mean is exact, and the nested absmax 2, so that its reciprocal is.
    """
    wanted = codec("nf4", "double_quant=true", "dtype=fp32")
    steps = torch.arange(-(1 << 15), 1 << 15) / (1 << 14)
    absmax = 4 + torch.cat((steps, -steps))
    absmax = absmax.view(-1, 256)
    absmax[:, 0], absmax[:, 1] = 2.0, 6.0
    source = torch.zeros(absmax.numel(), 64)
    source[:, 0] = absmax.flatten()
    packed, state = bnb.functional.quantize_4bit(
        source, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    parts = wanted.encode(source, (len(source), 64))
    assert len(parts["weight.absmax"].unique()) > 240
    assert same(parts["weight.absmax"], state.absmax)
    assert same(parts["weight.nested_absmax"], state.state2.absmax)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (50, 62)])
def test_linear4bit_is_decoded_as_by_itself(
    name: str, double_quant: bool, shape: tuple[int, int], weight: Any
) -> None:
    """A state_dict of bitsandbytes' own layer."""
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, quant_type=KINDS[name], compress_statistics=double_quant
    )
    values = weight(*shape).to(torch.float16)
    layer.weight = bnb.nn.Params4bit(
        values, requires_grad=False, quant_type=KINDS[name], compress_statistics=double_quant
    )
    parts = dict(layer.to("cpu").state_dict())
    expected = their_weight(parts)
    assert expected.dtype == torch.float16
    assert torch.equal(our_weight(parts).to(torch.float16), expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in BF16, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def converted(source: Path, target: Path, wanted: BitsAndBytes) -> dict[str, torch.Tensor]:
    """Write the checkpoint with its linear layers, but the head, in the format; give what they
    decode to."""
    tensors, decoded = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[1])
        parts = wanted.encode(tensor.to(torch.float32), shape)
        decoded[name] = wanted.decode(parts, shape)
        tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = wanted.config(["lm_head"])
    (target / "config.json").write_text(json.dumps(config))
    return decoded


@pytest.mark.parametrize(
    "wanted",
    [codec("nf4"), codec("nf4", "double_quant=true"), codec("bnb-fp4", "double_quant=true")],
    ids=["nf4", "nf4-double", "fp4-double"],
)
def test_transformers_loads_what_we_write(llama: Path, tmp_path: Path, wanted: Any) -> None:
    from transformers import AutoModelForCausalLM

    decoded = converted(llama, tmp_path, wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    layers = dict(model.named_modules())
    assert len(decoded) == 14 and isinstance(layers["lm_head"], torch.nn.Linear)
    for name, ours in decoded.items():
        layer = layers[name.removesuffix(".weight")]
        assert isinstance(layer, bnb.nn.Linear4bit), name
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(theirs, ours.to(torch.bfloat16)), name
    ids = torch.arange(12)[None]
    assert torch.isfinite(model(ids).logits).all()


def test_what_transformers_saves_is_read(llama: Path, tmp_path: Path) -> None:
    """Quantized by transformers, saved, and decoded by us."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=options, device_map="cpu"
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    parts = {
        "weight" + key.removeprefix(name): value
        for key, value in tensors.items()
        if key.startswith(name)
    }
    assert len(parts) == 6
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    wanted = codec("nf4", "double_quant=true")
    assert config.keys() == wanted.config([]).keys()
    theirs = their_weight(dict(parts))
    assert torch.equal(our_weight(parts).to(theirs.dtype), theirs)
    source = load_file(llama / "model.safetensors")[name].to(torch.float32)
    again = wanted.encode(source, (64, 128))
    assert torch.equal(again["weight"], parts["weight"])
