"""A checkpoint of DeepSeek-V3's widths and formats, filled with random numbers, to measure with.

Source: names, shapes and config keys of the deepseek-ai/DeepSeek-V3 repository on the Hub; file
layout of safetensors 0.8.0's reference writer (F32, BF16, F8_E4M3; then by name; data 8-aligned
and no more), written here and not by requant, so that the source does not follow requant's habits.
True: hidden size, MLA and MLP widths, 128 heads. Smaller: vocabulary, layers, experts, so that the
FP8 matrices are nearly all of it, as in the real one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE_BYTES = 1_000_000_000
CHUNK_BYTES = 1 << 24
BLOCK = 128
HIDDEN, DENSE, EXPERT, VOCAB = 7168, 18432, 2048, 4096
HEADS, Q_LORA, KV_LORA, NOPE, ROPE, VALUE = 128, 1536, 512, 128, 64, 128
#: DeepSeek-V3's own number a layer; a larger checkpoint gets more layers.
MAX_EXPERTS = 256
#: Widest first, as the reference writer stores them.
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
_SCHEME = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}


class Tensor(NamedTuple):
    """One stored tensor; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def make_checkpoint(folder: Path, size_gb: float) -> Path:
    """Write a checkpoint of at least `size_gb` GB into `folder`, or take the one that is there."""
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        layers, experts = _fitting(size_gb * 1e9)
        _write(partial, list(tensors(layers, experts)))
        config = json.dumps(_config(layers, experts), indent=2) + "\n"
        (partial / "config.json").write_text(config)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def tensors(layers: int, experts: int) -> Iterator[Tensor]:
    """One dense and `layers - 1` MoE layers of `experts` routed experts, between two embeddings."""
    yield Tensor("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(f"{prefix}.self_attn")
        if layer == 0:
            yield from _mlp(f"{prefix}.mlp", DENSE)
        else:
            yield Tensor(f"{prefix}.mlp.gate.weight", "BF16", (experts, HIDDEN))
            yield Tensor(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,))
            yield from _mlp(f"{prefix}.mlp.shared_experts", EXPERT)
            for expert in range(experts):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", EXPERT)
        yield Tensor(f"{prefix}.input_layernorm.weight", "BF16", (HIDDEN,))
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", "BF16", (HIDDEN,))
    yield Tensor("model.norm.weight", "BF16", (HIDDEN,))
    yield Tensor("lm_head.weight", "BF16", (VOCAB, HIDDEN))


def _attention(prefix: str) -> Iterator[Tensor]:
    yield from _linear(f"{prefix}.q_a_proj", Q_LORA, HIDDEN)
    yield Tensor(f"{prefix}.q_a_layernorm.weight", "BF16", (Q_LORA,))
    yield from _linear(f"{prefix}.q_b_proj", HEADS * (NOPE + ROPE), Q_LORA)
    yield from _linear(f"{prefix}.kv_a_proj_with_mqa", KV_LORA + ROPE, HIDDEN)
    yield Tensor(f"{prefix}.kv_a_layernorm.weight", "BF16", (KV_LORA,))
    yield from _linear(f"{prefix}.kv_b_proj", HEADS * (NOPE + VALUE), KV_LORA)
    yield from _linear(f"{prefix}.o_proj", HIDDEN, HEADS * VALUE)


def _mlp(prefix: str, width: int) -> Iterator[Tensor]:
    yield from _linear(f"{prefix}.gate_proj", width, HIDDEN)
    yield from _linear(f"{prefix}.up_proj", width, HIDDEN)
    yield from _linear(f"{prefix}.down_proj", HIDDEN, width)


def _linear(module: str, rows: int, cols: int) -> Iterator[Tensor]:
    """The codes, then the float32 scale of each 128x128 block, whole or not."""
    yield Tensor(f"{module}.weight", "F8_E4M3", (rows, cols))
    yield Tensor(f"{module}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-cols // BLOCK)))


def _fitting(nbytes: float) -> tuple[int, int]:
    """The layers and experts a layer, in groups of 8, that take at least `nbytes`."""
    layers, experts = 2, 8
    while sum(tensor.nbytes for tensor in tensors(layers, experts)) < nbytes:
        layers, experts = (layers, experts + 8) if experts < MAX_EXPERTS else (layers + 1, 8)
    return layers, experts


def _write(folder: Path, every: list[Tensor]) -> None:
    """All files and the index. The last scale of each file but the last lies in the next one."""
    total = sum(tensor.nbytes for tensor in every)
    count = max(2, round(total / FILE_BYTES))
    files: list[list[Tensor]] = [[]]
    for tensor in every:
        full = sum(stored.nbytes for stored in files[-1]) >= total / count
        if full and len(files) < count and tensor.name.endswith("weight_scale_inv"):
            files.append([])
        files[-1].append(tensor)
    places: dict[str, str] = {}
    random = np.random.Generator(np.random.SFC64(0))
    for number, content in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):06}.safetensors"
        places |= dict.fromkeys((tensor.name for tensor in content), name)
        _write_file(folder / name, content, random)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, content: list[Tensor], random: np.random.Generator) -> None:
    order = sorted(content, key=lambda tensor: (list(_ITEM_BYTES).index(tensor.dtype), tensor.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in order:
        span = (offset, offset + tensor.nbytes)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in order:
            for begin in range(0, tensor.nbytes, CHUNK_BYTES):
                nbytes = min(CHUNK_BYTES, tensor.nbytes - begin)
                file.write(_values(tensor, nbytes, random).data)
        os.fsync(file.fileno())


def _values(tensor: Tensor, nbytes: int, random: np.random.Generator) -> np.ndarray:
    """`nbytes` bytes of plausible content, as uint8: no NaN, no infinity, scales about 1e-4."""
    if tensor.dtype == "F32":
        return np.power(10, random.uniform(-4.5, -3.5, nbytes // 4)).astype("<f4").view(np.uint8)
    words = random.integers(1 << 64, size=-(-nbytes // 8), dtype=np.uint64)
    if tensor.dtype == "BF16":
        # Magnitudes from 2^-7 to 2: sign, mantissa and the low three bits of the exponent vary.
        words &= np.uint64(0x83FF_83FF_83FF_83FF)
        words |= np.uint64(0x3C00_3C00_3C00_3C00)
        return words.view(np.uint8)[:nbytes]
    codes = words.view(np.uint8)[:nbytes]
    # 0x7F and 0xFF are NaN; one less is the largest number.
    codes -= (codes & 0x7F) == 0x7F
    return codes


def _config(layers: int, experts: int) -> dict[str, Any]:
    """DeepSeek-V3's config.json with this checkpoint's sizes."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "moe_intermediate_size": EXPERT,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_LORA,
        "kv_lora_rank": KV_LORA,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "quantization_config": {**_SCHEME, "weight_block_size": [BLOCK, BLOCK]},
    }
