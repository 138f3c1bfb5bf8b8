"""Trainable DeepSeek-V3 with one multi-token-prediction layer, small enough for two CPU cores.

The mathematics is that of `inference/model.py` in github.com/deepseek-ai/DeepSeek-V3 and of the
DeepSeek-V3 technical report (section 2.2 for MTP). Modules carry the names of the published
checkpoint, so the state dict needs no renaming; only the routed experts are held fused.
Shapes: B sequences, S tokens, T = B * S, H heads, D hidden, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """The shape of the model, under the names of config.json."""

    vocab_size: int = 1024
    hidden_size: int = 256
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 3
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 512


class RMSNorm(nn.Module):
    """Normalise the last dimension in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """Make a bias-free Linear; outputs start at half the scale of their inputs, times `gain`."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.5 * gain * inputs**-0.5)
    return layer


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply rotary positions 0..S-1 to interleaved pairs: [B, S, H, R] -> [B, S, H, R]."""
    size = x.shape[-1]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self, config: DemoConfig, gain: float) -> None:
        super().__init__()
        c = self.config = config
        heads, head_dim = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
        self.q_b_proj = linear(c.q_lora_rank, heads * head_dim)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(heads * c.v_head_dim, c.hidden_size, gain)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        c, heads = self.config, self.config.num_attention_heads
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, -1))
        q_nope, q_rope = q.split((nope, rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v = kv.split((nope, c.v_head_dim), -1)
        q = torch.cat((q_nope, rotate(q_rope, c.rope_theta)), -1)
        k_rope = rotate(k_rope[:, :, None], c.rope_theta).expand(-1, -1, heads, -1)
        k = torch.cat((k_nope, k_rope), -1)
        # Written out: on CPU the fused attention takes three times as long, forward and backward.
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        mask = q.new_full((q.shape[1], q.shape[1]), float("-inf")).triu(1)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=(nope + rope) ** -0.5)
        out = torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, (-1, heads))
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inner: int, gain: float) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores, group-limited top-k; the bias steers the selection only."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.randn(experts, hidden) * 0.5 * hidden**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> weights [T, K] in float32 and expert ids [T, K]."""
        c = self.config
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        choice = (scores.detach() + self.e_score_correction_bias).unflatten(-1, (c.n_group, -1))
        group_scores = choice.topk(2, dim=-1).values.sum(-1)
        kept = group_scores.topk(c.topk_group, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        choice = choice.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        ids = choice.topk(c.num_experts_per_tok, dim=-1).indices
        self.load += torch.bincount(ids.flatten(), minlength=c.n_routed_experts)
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        return weights, ids

    def rebalance(self, speed: float) -> None:
        """Move the bias one step towards equal load and forget the load."""
        self.e_score_correction_bias += speed * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Experts(nn.Module):
    """All routed experts in two tensors, gate rows before up rows."""

    def __init__(self, config: DemoConfig, gain: float) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        inner = config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.5 * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * 0.5 * gain * inner**-0.5)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """[T, D], [T, K], [T, K] -> [T, D]."""
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.down.shape[0]).tolist()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        chunks = x.to(dtype).index_select(0, order // ids.shape[1]).split(counts)
        gate_ups, downs = self.gate_up.to(dtype).unbind(), self.down.to(dtype).unbind()
        outputs = []
        for chunk, gate_up, down in zip(chunks, gate_ups, downs, strict=True):
            gate, up = F.linear(chunk, gate_up).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        unsorted = torch.cat(outputs).index_select(0, order.argsort())
        return (unsorted.view(*ids.shape, -1) * weights[..., None]).sum(1)


class MoE(nn.Module):
    """Routed experts plus one shared expert."""

    def __init__(self, config: DemoConfig, gain: float) -> None:
        super().__init__()
        inner = config.moe_intermediate_size * config.n_shared_experts
        self.gate = Router(config)
        self.experts = Experts(config, gain)
        self.shared_experts = MLP(config.hidden_size, inner, gain)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return self.experts(flat, *self.gate(flat)).view_as(x) + self.shared_experts(x)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DemoConfig, dense: bool) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        # Two additions to the residual per layer should not make it grow with depth.
        gain = (2 * config.num_hidden_layers) ** -0.5
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config, gain)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, config.intermediate_size, gain) if dense else MoE(config, gain)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class MTPBlock(Block):
    """The extra layer that predicts one token further."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__(config, dense=False)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = linear(2 * hidden, hidden)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden, eps)})

    def predict(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Map embeddings of t[i+1] and hidden states of t[i], both [B, S, D], to head inputs."""
        joined = torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)
        return self.shared_head["norm"](self(self.eh_proj(joined)))


class DemoModel(nn.Module):
    """DeepSeek-V3 for causal language modelling; `model.layers.N` past the last layer is MTP."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        layers = [
            Block(config, dense=index < config.first_k_dense_replace)
            for index in range(config.num_hidden_layers)
        ]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList([*layers, MTPBlock(config)]),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        nn.init.normal_(self.model["embed_tokens"].weight, std=0.1)
        self.lm_head = linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S + 1] -> main logits [B, S, V] for t[i+1] and MTP logits [B, S, V] for t[i+2]."""
        embedded = self.model["embed_tokens"](tokens)
        *layers, mtp = self.model["layers"]
        x = embedded[:, :-1]
        for layer in layers:
            x = layer(x)
        x = self.model["norm"](x)
        ahead = mtp.predict(embedded[:, 1:], x)
        return self.lm_head(x).float(), self.lm_head(ahead).float()

    def routers(self) -> list[Router]:
        """The routers of all MoE layers, MTP last."""
        return [module for module in self.modules() if isinstance(module, Router)]
