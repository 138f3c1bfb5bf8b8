"""Text generation, one token at a time, over the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from requant.errors import CheckpointError
from requant.runner.model import Model


def generate(
    model: Model,
    ids: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue the prompt `ids`; a stop token is not yielded.

    Temperature 0 takes the most likely token. Above, tokens are drawn on the CPU by a generator of
    its own, so that a seed gives the same text whatever else draws. Raises CheckpointError at the
    call for an empty prompt, a negative temperature, or more tokens than the model has positions.
    """
    where = model.weights.checkpoint.path
    if not ids:
        raise CheckpointError(f"{where}: the prompt has no tokens; give at least one")
    if not 0 <= temperature < float("inf"):
        raise CheckpointError(f"temperature is {temperature}; give 0 (greedy) or more")
    limit = model.config.max_position_embeddings
    if len(ids) + max_tokens > limit:
        raise CheckpointError(
            f"{where}: {len(ids)} prompt tokens and {max_tokens} new ones are "
            f"{len(ids) + max_tokens}, more than its {limit} positions; ask for fewer"
        )
    return _continue(model, list(ids), max_tokens, temperature, seed, frozenset(stop_ids))


def _continue(
    model: Model,
    ids: list[int],
    max_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    cache = model.new_cache()
    random = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        # The head is applied to the last position only: a prompt's logits can be gigabytes.
        last = model.hidden(torch.tensor([ids]), cache)[:, -1:]
        token = pick(model.logits(last)[0, 0].cpu(), temperature, random)
        if token in stop_ids:
            return
        yield token
        ids = [token]


def pick(logits: torch.Tensor, temperature: float, random: torch.Generator) -> int:
    """One token from logits [V]: the largest at temperature 0, else drawn."""
    if temperature == 0:
        return int(logits.argmax())
    # The largest logit is taken off first: a tiny temperature must not turn it into infinity.
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=random))
