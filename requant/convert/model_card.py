"""What a checkpoint's folder says of itself beside its weights: tokenizer and licence."""

from __future__ import annotations

import stat
from pathlib import Path

#: File -> what kind of tokenizer it is; the first that is there counts.
_TOKENIZERS = {
    "tokenizer.json": "tokenizers",
    "tiktoken.model": "tiktoken",
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "vocab.json": "vocabulary and merges",
}
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-MODEL")
#: A README's front matter and a licence's title are within so many bytes.
_HEAD_BYTES = 1 << 16
_LONGEST = 100


def tokenizer_of(folder: Path) -> dict[str, str] | None:
    """{kind, file} of the tokenizer; None where there is none."""
    found = next((name for name in _TOKENIZERS if (folder / name).is_file()), None)
    return None if found is None else {"kind": _TOKENIZERS[found], "file": found}


def license_of(folder: Path) -> str | None:
    """The licence: `license_name` or `license` of README.md's front matter, or the first line of a
    LICENSE file; None where nothing tells."""
    front = _front_matter(_head(folder / "README.md"))
    declared = front.get("license")
    if declared not in (None, "other"):
        return declared
    if "license_name" in front:
        return front["license_name"]
    lines = (line for name in _LICENSES for line in _head(folder / name))
    title = next((text for text in (line.strip("#*=- \t") for line in lines) if text), None)
    return declared if title is None else _shown(title)


def _front_matter(lines: list[str]) -> dict[str, str]:
    """The top-level `key: value` lines between the two `---` that a README begins with."""
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    pairs = (line.partition(":") for line in lines[1:end] if line[:1].isalpha())
    values = {key: _shown(value.strip().strip("'\"")) for key, _, value in pairs}
    return {key: value for key, value in values.items() if value}


def _head(path: Path) -> list[str]:
    """The first lines of a text file; none of what is no readable file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return []
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _shown(text: str) -> str:
    """A text that is safe to print: one line, of a sensible length."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LONGEST].strip()
