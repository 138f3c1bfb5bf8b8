"""What the tests of the file layer and the command line share: a small DeepSeek-style checkpoint,
written by the reference library, in any format and with scales away from their weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from requant.convert.patterns import natural_key
from requant.errors import FormatError
from requant.quant import Codec, parse_format

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
    "vocab_size": 64,
}

#: The linear layers, by module. 160 and 576 rows and 320 columns end in partial 128 x 128 blocks.
LINEAR: dict[str, tuple[int, int]] = {
    "model.layers.0.self_attn.q_proj": (160, 256),
    "model.layers.0.self_attn.kv_a_proj_with_mqa": (576, 320),
    "model.layers.0.mlp.down_proj": (160, 320),
    "model.layers.1.self_attn.o_proj": (1, 64),
    "model.layers.1.mlp.experts.0.up_proj": (160, 256),
    "model.layers.1.mlp.experts.10.up_proj": (160, 256),
    "model.layers.1.mlp.shared_experts.gate_proj": (128, 128),
    "model.layers.2.self_attn.q_b_proj": (160, 256),
    "model.layers.2.mlp.experts.0.down_proj": (129, 192),
}

#: Plain matrices that stay as they are: formats must name these as not converted.
KEPT_MODULES = [
    "lm_head",
    "model.layers.1.mlp.gate",
    "model.layers.2.eh_proj",
    "model.layers.2.mlp.gate",
    "model.layers.2.shared_head.head",
]

#: The same as compressed-tensors' configs say it.
KEPT_PATTERNS = [
    "lm_head",
    r"re:.*\.layers\.\d+\.mlp\.gate$",
    r"re:.*\.layers\.\d+\.eh_proj$",
    r"re:.*\.layers\.\d+\.shared_head\.head$",
]

SIDE_FILES = {
    "LICENSE": b"MIT\n",
    "README.md": b"# model\n",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "generation_config.json": b'{"top_p":0.95}',
    "modeling_deepseek.py": b"raise SystemExit('never run')\n",
    "tokenizer.json": bytes(range(256)),
    "figures/accuracy.png": b"\x89PNG",
    "inference/configs/config.json": b"{}",
}


def random_weights(seed: int = 0) -> Tensors:
    """The linear weights, normal, BF16, each row on its own power of two."""
    generator = torch.Generator().manual_seed(seed)
    weights: Tensors = {}
    for module, (rows, cols) in LINEAR.items():
        exponents = torch.randint(-8, 0, (rows, 1), generator=generator)
        values = torch.randn(rows, cols, generator=generator) * torch.exp2(exponents)
        weights[f"{module}.weight"] = values.to(torch.bfloat16)
    return weights


def kept_tensors(seed: int = 1) -> Tensors:
    """Everything that no conversion may touch, in various dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def plain(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    return {
        "model.embed_tokens.weight": plain(64, 256),
        "model.norm.weight": plain(256),
        "lm_head.weight": plain(64, 256),
        "model.layers.0.input_layernorm.weight": plain(256).to(torch.float32),
        "model.layers.0.self_attn.q_proj.bias": plain(160).to(torch.float32),
        "model.layers.1.mlp.gate.weight": plain(11, 256),
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.randn(11, generator=generator),
        "model.layers.1.tables": torch.arange(6).reshape(2, 3),
        "model.layers.1.steps": torch.tensor(7),
        "model.layers.1.nothing": torch.empty(0, 5),
        "model.layers.2.eh_proj.weight": plain(64, 128),
        "model.layers.2.embed_tokens.weight": plain(64, 256),
        "model.layers.2.enorm.weight": plain(64),
        "model.layers.2.mlp.gate.weight": plain(11, 256),
        "model.layers.2.shared_head.head.weight": plain(64, 256),
    }


def held_by(codec: Codec, shape: tuple[int, ...]) -> Codec:
    """The codec, or BF16 for a shape that it refuses."""
    try:
        codec.specs(*shape)
    except FormatError:
        return parse_format("bf16")
    return codec


def refused_modules(codec: Codec) -> list[str]:
    """The linear layers that a format cannot hold."""
    return [module for module, shape in LINEAR.items() if held_by(codec, shape) != codec]


def encode(weights: Tensors, codec: Codec) -> Tensors:
    """Stored parts of every weight, by the codec alone: no tiles, no files."""
    parts: Tensors = {}
    for name, weight in weights.items():
        shape = weight.shape[0], weight.shape[1]
        encoded = held_by(codec, shape).encode(weight.to(torch.float32), shape)
        parts |= {name.removesuffix("weight") + part: t for part, t in encoded.items()}
    return parts


def decode(stored: Mapping[str, torch.Tensor], codec: Codec) -> Tensors:
    """The float32 weights of `encode`'s result, by the codec alone."""
    weights: Tensors = {}
    for module, shape in LINEAR.items():
        held = held_by(codec, shape)
        parts = {part: stored[f"{module}.{part}"] for part in held.specs(*shape)}
        weights[f"{module}.weight"] = held.decode(parts, shape)
    return weights


def file_of(name: str) -> str:
    """One file a layer, but scales lie in the file after their weight's."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
    away = "_scale" in name or name.endswith("weight_shape")
    return f"model-0000{(layer + away) % 3 + 1}-of-00003.safetensors"


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    place: Callable[[str], str] = file_of,
) -> Path:
    """Write a checkpoint with safetensors' own writer; an index unless it is model.safetensors."""
    folder.mkdir(parents=True)
    files: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        files.setdefault(place(name), {})[name] = tensor.contiguous()
    for file, content in files.items():
        save_file(content, folder / file, {"format": "pt"})
    if list(files) != ["model.safetensors"]:
        weight_map = {name: place(name) for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_source(folder: Path, format_text: str, seed: int = 0) -> Path:
    """The small checkpoint in a format, with side files."""
    codec = parse_format(format_text)
    stored = encode(random_weights(seed), codec)
    config = dict(CONFIG)
    quantization = expected_config(codec)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_checkpoint(folder, {**stored, **kept_tensors()}, config)
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def expected_config(codec: Codec) -> dict[str, Any] | None:
    """The quantization_config of the small checkpoint in a format."""
    if codec.quant_method == "compressed-tensors":
        assert not refused_modules(codec)
        return codec.config(KEPT_PATTERNS)
    return codec.config(sorted([*KEPT_MODULES, *refused_modules(codec)], key=natural_key))


def load(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, by the reference reader."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(*flat)


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
