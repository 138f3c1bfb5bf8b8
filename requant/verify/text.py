"""Held-out text as token sequences."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from requant.errors import RequantError

#: Tokens in a sequence at most: enough for context, few enough for attention's memory.
SEQUENCE_TOKENS = 512


def token_sequences(
    tokenizer: Tokenizer, text: str, tokens: int, max_position_embeddings: int
) -> torch.Tensor:
    """The first tokens of `text` as equally long sequences [B, T] with B * T >= `tokens`.

    Raises RequantError when the text is too short.
    """
    if tokens < 2:
        raise RequantError(f"tokens is {tokens}; at least 2 are needed to predict one from another")
    longest = min(SEQUENCE_TOKENS, max_position_embeddings)
    sequences = -(-tokens // longest)
    length = -(-tokens // sequences)
    ids = tokenizer.encode(text).ids
    if len(ids) < sequences * length:
        raise RequantError(
            f"the text has {len(ids)} tokens, {sequences * length} are needed; "
            f"give a longer text, or ask for at most {len(ids)} tokens"
        )
    return torch.tensor(ids[: sequences * length], dtype=torch.int64).view(sequences, length)
