"""A tiny random DeepSeek-V3 with a prediction layer, in two files, and conversions of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
#: Bytes are tokens; 256 of them are four sequences of 64.
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 4
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model: layer 0 dense, 1 and 2 MoE, 3 for multi-token prediction."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (256, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (256, 64),
    }

    def mlp(prefix: str, width: int) -> None:
        found[f"{prefix}.gate_proj.weight"] = found[f"{prefix}.up_proj.weight"] = (width, 64)
        found[f"{prefix}.down_proj.weight"] = (64, width)

    for layer in range(4):
        base = f"model.layers.{layer}"
        attention = f"{base}.self_attn"
        found[f"{base}.input_layernorm.weight"] = (64,)
        found[f"{base}.post_attention_layernorm.weight"] = (64,)
        found[f"{attention}.q_a_proj.weight"] = (32, 64)
        found[f"{attention}.q_a_layernorm.weight"] = (32,)
        found[f"{attention}.q_b_proj.weight"] = (64, 32)
        found[f"{attention}.kv_a_proj_with_mqa.weight"] = (48, 64)
        found[f"{attention}.kv_a_layernorm.weight"] = (32,)
        found[f"{attention}.kv_b_proj.weight"] = (64, 32)
        found[f"{attention}.o_proj.weight"] = (64, 32)
        if layer == 0:
            mlp(f"{base}.mlp", 96)
            continue
        found[f"{base}.mlp.gate.weight"] = (8, 64)
        found[f"{base}.mlp.gate.e_score_correction_bias"] = (8,)
        mlp(f"{base}.mlp.shared_experts", 32)
        for expert in range(8):
            mlp(f"{base}.mlp.experts.{expert}", 32)
    found["model.layers.3.eh_proj.weight"] = (64, 128)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        found[f"model.layers.3.{norm}.weight"] = (64,)
    return found


def random_tensor(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=random)
    if name.endswith("e_score_correction_bias"):
        return noise * 0.1
    if len(shape) == 1:
        return (1 + 0.1 * noise).to(torch.bfloat16)
    # Embeddings are small, so that every layer matters.
    return (noise * (0.5 if "embed" in name else 0.8 * shape[1] ** -0.5)).to(torch.bfloat16)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in BF16."""
    folder = tmp_path_factory.mktemp("source")
    random = torch.Generator().manual_seed(5)
    tensors = {name: random_tensor(name, shape, random) for name, shape in shapes().items()}
    first = {n: t for n, t in tensors.items() if ".0." in n or ".1." in n}
    parts = (first, {n: t for n, t in tensors.items() if n not in first})
    places: dict[str, str] = {}
    for file, part in zip(FILES, parts, strict=True):
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model in a format, converted when first asked for."""
    done: dict[str, Path] = {}

    def get(format_text: str) -> Path:
        if format_text not in done:
            out = tmp_path_factory.mktemp("converted") / "out"
            plan = make_plan(Checkpoint.open(source), default_recipe(format_text))
            convert(plan, out, Runtime(torch.device("cpu"), 1))
            done[format_text] = out
        return done[format_text]

    return get


@pytest.fixture
def damaged(converted: Callable[[str], Path], tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the INT4 conversion whose tensors `edit` has changed, moved or deleted."""

    def get(edit: Edit) -> Path:
        out = tmp_path / "out"
        shutil.copytree(converted("int4[group_size=32]"), out)
        change(out, edit)
        return out

    return get


def change(folder: Path, edit: Edit) -> None:
    """Edit the tensors of a checkpoint, and write it again with an index that fits."""
    tensors: Tensors = {}
    for file in FILES:
        tensors |= load_file(folder / file)
        (folder / file).unlink()
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / FILES[0], {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, FILES[0])}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
