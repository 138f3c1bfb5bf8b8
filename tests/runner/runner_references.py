"""Tiny random models of transformers, saved as checkpoints: what the runner is compared with.

Weights are scaled so that every term of the model matters: norms are not 1, latents are small (so
that their epsilon counts), the correction bias moves the routing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from requant.convert.source import Checkpoint
from requant.runner.config import ModelConfig
from requant.runner.model import Model

#: Of the largest logit: 2e-5 absolute at the usual 4. Two float32 implementations differ by the
#: order of their sums, some 1e-6; the smallest mistake below moves logits by 1e-4.
TOLERANCE = 5e-6

TOKENS = 48  # beyond YaRN's original context of 16
VOCABULARY = 97
_LATENT_STD = 0.02  # variance 4e-4, where an epsilon of 1e-5 for 1e-6 is 1 %

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "moe_intermediate_size": 18,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 22,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_V3: dict[str, Any] = {
    **_SIZES,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
_V2: dict[str, Any] = {**_SIZES, "norm_topk_prob": False}

#: name -> (family, config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("V3", {**_V3, "rope_parameters": _YARN}),
    "v3-no-q-lora": ("V3", {**_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "v3-biases-tied": ("V3", {**_V3, "attention_bias": True, "tie_word_embeddings": True}),
    "v3-no-mscale": (
        "V3",
        {**_V3, "rope_parameters": {k: v for k, v in _YARN.items() if "mscale" not in k}},
    ),
    "v2-lite": (
        "V2",
        {
            **_V2,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "v2-grouped": (
        "V2",
        {
            **_V2,
            "topk_method": "group_limited_greedy",
            "mlp_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint, and transformers' logits [2, TOKENS, V] for `ids` [2, TOKENS]."""

    path: Path
    ids: torch.Tensor
    logits: torch.Tensor
    next_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    mtp_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def model(self, **options: Any) -> Model:
        """A fresh runner over the checkpoint."""
        return Model(Checkpoint.open(self.path), **options)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


def build(name: str, path: Path) -> Reference:
    """Make, save and run the reference model of a case."""
    torch.manual_seed(7)
    model = _transformers_model(name)
    _randomise(model)
    model.save_pretrained(path)
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    with torch.no_grad():
        return Reference(path, ids, model(ids).logits)


def build_mtp(path: Path) -> Reference:
    """A V3 checkpoint with a multi-token-prediction layer, and what transformers makes of it."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    torch.manual_seed(11)
    model = _transformers_model("v3")
    mtp = modeling_layers.MtpModel(model, 1).eval()
    _randomise(model)
    _randomise(mtp.layers)
    model.save_pretrained(path)
    ids, next_ids = torch.randint(VOCABULARY, (2, 2, TOKENS))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        u = mtp.forward_layer(
            0,
            out.hidden_states[-1],  # after the final norm
            position_ids=torch.arange(1, TOKENS + 1)[None],
            mtp_cache=None,
            input_ids=next_ids,
        )
        reference = Reference(path, ids, out.logits, next_ids, model.lm_head(u))
    tensors = load_file(path / "model.safetensors")
    tensors.update(_mtp_tensors(mtp.layers[0].state_dict(), "model.layers.3."))
    save_file(tensors, path / "model.safetensors")
    edit_config(path, num_nextn_predict_layers=1)
    return reference


def copy(case: Reference, path: Path) -> Reference:
    """The same reference over a copy of its folder, to be edited."""
    shutil.copytree(case.path, path, dirs_exist_ok=True)
    return dataclasses.replace(case, path=path)


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of a checkpoint's config.json; None removes a key."""
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(
    path: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> None:
    """Rewrite a checkpoint's single file."""
    save_file(dict(change(load_file(path / "model.safetensors"))), path / "model.safetensors")


def sizes(**given: Any) -> ModelConfig:
    """A V3 config of the given sizes; the others are as small as they can be."""
    ones = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
        "num_attention_heads kv_lora_rank qk_nope_head_dim v_head_dim n_routed_experts "
        "num_experts_per_tok n_group topk_group routed_scaling_factor rms_norm_eps "
        "max_position_embeddings"
    )
    config = dict.fromkeys(ones.split(), 1) | {"qk_rope_head_dim": 2, "rope_theta": 10000.0}
    config |= {"model_type": "deepseek_v3", "norm_topk_prob": True}
    return ModelConfig.from_config({**config, **given})


def _transformers_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    family, sizes = CASES[name]
    config = getattr(transformers, f"Deepseek{family}Config")(**sizes)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return getattr(transformers, f"Deepseek{family}ForCausalLM")(config).float().eval()


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Fill every parameter and buffer so that no term of the model is negligible."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * torch.randn_like(tensor))
        elif name.endswith("inv_freq"):
            continue
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            tensor.copy_(0.1 * torch.randn_like(tensor))
        elif "embed_tokens" in name:
            tensor.copy_(_LATENT_STD * torch.randn_like(tensor))
        else:
            tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
        rank = {"q_a_proj": 22, "kv_a_proj_with_mqa": 20}.get(name.split(".")[-2])
        if rank and name.endswith("weight"):
            tensor[:rank] *= _LATENT_STD
        elif rank:
            tensor[:rank] *= 0.1 * _LATENT_STD


def _mtp_tensors(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A prediction layer under the names of DeepSeek-V3's files, one tensor per expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if name == "mlp.experts.gate_up_proj":
            for expert, pair in enumerate(tensor):
                gate, up = pair.chunk(2)
                tensors[f"{prefix}mlp.experts.{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}mlp.experts.{expert}.up_proj.weight"] = up.clone()
        elif name == "mlp.experts.down_proj":
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = down.clone()
        else:
            tensors[prefix + name] = tensor.clone()
    return tensors
