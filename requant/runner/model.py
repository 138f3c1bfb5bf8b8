"""A DeepSeek-family model over a checkpoint in any format that requant reads."""

from __future__ import annotations

import torch

from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from requant.runner.attention import AttentionForm, attention, rms_norm
from requant.runner.cache import LatentCache
from requant.runner.config import ModelConfig
from requant.runner.moe import feed_forward
from requant.runner.ranks import Rank
from requant.runner.shapes import check_shapes, mtp_layers
from requant.runner.weights import DEFAULT_CACHE_BYTES, Weights


class Model:
    """Runs a checkpoint, whole or layer by layer, in float32 activations.

    Weights stay on disk as they are stored and are decoded when a layer, or a token's expert, needs
    them; see `Weights` for the memory bound. `attention` forces one form of MLA; `auto` takes the
    cheaper one.

    With a `rank`, the checkpoint is what that rank holds, and all ranks' processes call the same
    methods in the same order with tensors of the same shapes. Hidden states are right in the stage
    that made them (a layer fetches them from the one before), logits in the last and first.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        attention: AttentionForm = "auto",
        rank: Rank | None = None,
    ) -> None:
        self.config = ModelConfig.from_config(checkpoint.config)
        self.rank = rank or Rank.alone(checkpoint.weights)
        check_shapes(checkpoint, self.config, self.rank)
        self.weights = Weights(checkpoint, device, cache_bytes, self.rank)
        self.attention: AttentionForm = attention
        #: Indices of the multi-token-prediction layers that the checkpoint holds.
        self.mtp_layers = mtp_layers(self.rank.names, self.config)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.weights.device

    def new_cache(self) -> LatentCache:
        """An empty cache, to be passed to every call of one generation."""
        return LatentCache()

    @torch.inference_mode()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> [B, T, D]. Raises CheckpointError outside the vocabulary."""
        return self._embed("model.embed_tokens.weight", ids)

    @torch.inference_mode()
    def layer(self, index: int, x: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """One decoder layer, or the block of a prediction layer, [B, T, D] -> [B, T, D]."""
        prefix = self._prefix(index)
        stage = self.rank.layer_stage(index) or 0
        before = self.rank.layer_stage(index - 1)
        x = self.rank.moved(x, stage if before is None else before, stage)
        if self.rank.at != stage:
            return x
        h = self._norm(prefix + "input_layernorm", x)
        x = x + attention(self.weights, self.config, index, h, cache, self.attention)
        h = self._norm(prefix + "post_attention_layernorm", x)
        return x + feed_forward(self.weights, self.config, index, h)

    @torch.inference_mode()
    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The norm after the last layer, [B, T, D] -> [B, T, D]."""
        return self._norm("model.norm", x)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The last layer's output [B, T, D] -> final norm and head -> [B, T, V]."""
        return self._head("lm_head", self.final_norm(x))

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """Token ids [B, T], following those in the cache -> logits [B, T, V]."""
        return self.logits(self.hidden(ids, cache))

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """Token ids [B, T] -> the last layer's output [B, T, D], before the final norm."""
        x = self.embed(ids)
        for index in range(self.config.num_hidden_layers):
            x = self.layer(index, x, cache)
        return x

    @torch.inference_mode()
    def mtp_input(self, index: int, next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Input of prediction layer `index`, [B, T, D].

        `hidden` [B, T, D] is `final_norm`'s output at some positions, `next_ids` [B, T] the tokens
        that follow them. Then `layer(index, ...)` and `mtp_logits(index, ...)` give the logits of
        the tokens after those. Positions may start at 0 whatever the tokens' places in the text:
        rotary attention sees only their differences.
        """
        prefix = self._prefix(index)
        own = prefix + "embed_tokens.weight"
        name = own if self.weights.has(own) else "model.embed_tokens.weight"
        e = self._embed(name, next_ids)
        e = self.rank.moved(e, self.rank.stage_of(name), self.rank.last)
        if self.rank.at != self.rank.last:
            return e
        pair = (self._norm(prefix + "enorm", e), self._norm(prefix + "hnorm", hidden))
        return self.weights.linear(prefix + "eh_proj", torch.cat(pair, dim=-1))

    @torch.inference_mode()
    def mtp_logits(self, index: int, y: torch.Tensor) -> torch.Tensor:
        """Output of prediction layer `index` [B, T, D] -> logits [B, T, V]."""
        prefix = self._prefix(index)
        own = prefix + "shared_head.head"
        normed = self._norm(prefix + "shared_head.norm", y)
        return self._head(own if self.weights.has(own + ".weight") else "lm_head", normed)

    def _prefix(self, index: int) -> str:
        if not 0 <= index < self.config.num_hidden_layers and index not in self.mtp_layers:
            raise CheckpointError(
                f"{self.weights.checkpoint.path}: has no layer {index}; it has layers 0 to "
                f"{self.config.num_hidden_layers - 1} and {len(self.mtp_layers)} prediction layers"
            )
        return f"model.layers.{index}."

    def _norm(self, module: str, x: torch.Tensor) -> torch.Tensor:
        if self.rank.stage_of(module + ".weight") != self.rank.at:
            return x
        return rms_norm(x, self.weights.get(module + ".weight"), self.config.rms_norm_eps)

    def _head(self, module: str, x: torch.Tensor) -> torch.Tensor:
        if self.rank.at == self.rank.last:
            tied = not self.weights.has(module + ".weight")
            logits = self.weights.joined("model.embed_tokens" if tied else module, x)
        else:
            logits = x.new_empty(*x.shape[:-1], self._vocabulary)
        return self.rank.moved(logits, self.rank.last, 0)

    def _embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        if ids.numel() and not 0 <= (low := int(ids.min())) <= int(ids.max()) < self._vocabulary:
            worst = low if low < 0 else int(ids.max())
            raise CheckpointError(
                f"{self.weights.checkpoint.path}: token {worst} is outside its vocabulary of "
                f"{self._vocabulary}; use the tokenizer that belongs to the checkpoint"
            )
        if self.rank.at != self.rank.stage_of(name):
            return torch.zeros(*ids.shape, self.config.hidden_size, device=self.device)
        return self.weights.rows(name, ids.to(self.device))

    @property
    def _vocabulary(self) -> int:
        return self.config.vocab_size
