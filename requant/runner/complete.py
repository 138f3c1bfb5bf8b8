"""From a prompt to text: tokenizer, model and generation of one checkpoint folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from requant.convert.folder import Folder
from requant.convert.source import Checkpoint
from requant.runner.generate import generate
from requant.runner.model import Model
from requant.runner.tokenizer import load_tokenizer


def complete(
    where: Path | Folder,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Continue `prompt` by up to `max_tokens` tokens; `text` is what was added.

    Stops at the config's eos_token_id. Raises CheckpointError for a folder that cannot be run.
    """
    checkpoint = Checkpoint.open(where)
    tokenizer = load_tokenizer(checkpoint.path)
    model = Model(checkpoint, device)
    ids = _with_bos(checkpoint.path, checkpoint.config, tokenizer.encode(prompt).ids)
    eos = checkpoint.config.get("eos_token_id")
    stop = eos if isinstance(eos, list) else [] if eos is None else [eos]
    started = time.monotonic()
    new = list(generate(model, ids, max_tokens, temperature, seed, stop))
    seconds = time.monotonic() - started
    # Decoded together, so that a character split over two tokens survives.
    whole, given = tokenizer.decode(ids + new), tokenizer.decode(ids)
    return {
        "model": checkpoint.folder.label,
        "prompt": prompt,
        "text": whole[len(given) :],
        "prompt_tokens": len(ids),
        "tokens": len(new),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(new) / seconds, 2) if seconds else None,
    }


def _with_bos(path: Path, config: dict[str, Any], ids: list[int]) -> list[int]:
    """Start with bos_token_id where tokenizer_config.json asks for it and the ids do not."""
    bos = config.get("bos_token_id")
    try:
        wants = json.loads((path / "tokenizer_config.json").read_bytes()).get("add_bos_token")
    except (OSError, ValueError, AttributeError):
        wants = False
    if wants is True and isinstance(bos, int) and ids[:1] != [bos]:
        return [bos, *ids]
    return ids
