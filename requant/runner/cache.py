"""What decoding remembers: one latent row per token and layer."""

from __future__ import annotations

import torch


class LatentCache:
    """Per layer the normalised latents and rotated keys, [B, T, kv_lora_rank + qk_rope_head_dim].

    Layers grow one after the other during a forward pass; a prediction layer has its own length.
    Size in bytes: 4 * B * T * (kv_lora_rank + qk_rope_head_dim) per layer.
    """

    def __init__(self) -> None:
        self._layers: dict[int, torch.Tensor] = {}

    def length(self, layer: int) -> int:
        """Tokens that this layer remembers."""
        return self._layers[layer].shape[1] if layer in self._layers else 0

    def append(self, layer: int, latents: torch.Tensor) -> torch.Tensor:
        """Add the rows of new tokens [B, T, width]; return those of all tokens so far."""
        if layer in self._layers:
            latents = torch.cat((self._layers[layer], latents), dim=1)
        self._layers[layer] = latents
        return latents

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` tokens, in every layer."""
        self._layers = {layer: rows[:, :length] for layer, rows in self._layers.items()}
