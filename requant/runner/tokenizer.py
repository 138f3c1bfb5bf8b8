"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from requant.errors import CheckpointError

TOKENIZER_NAME = "tokenizer.json"


def load_tokenizer(path: Path) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint folder. Raises CheckpointError when it cannot be."""
    file = path / TOKENIZER_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; download it into the folder (a tokenizer in another form, such "
            "as tiktoken.model, has to be converted with transformers first)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower than Exception itself
        raise CheckpointError(
            f"{file}: not a tokenizer that the tokenizers library reads: {error}; download it again"
        ) from error
