"""What a checkpoint's folder says of itself beside its weights: tokenizer and licence."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

#: File -> what kind of tokenizer it is; the first that is there counts.
_TOKENIZERS = {
    "tokenizer.json": "tokenizers",
    "tiktoken.model": "tiktoken",
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "vocab.json": "vocabulary and merges",
}
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-MODEL")
_LONGEST = 100


#: Larger texts of the source are not looked at.
MAX_TEXT_BYTES = 1 << 20
#: What front matter is, to the Hub's client.
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
#: Beginnings of licences' texts, and the Hub's names for them.
_LICENSE_TEXTS = {
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge, to any person": "mit",
}


@dataclass(frozen=True)
class SourceTexts:
    """The source's own card with its front matter, and the text of its licence, where it has them.

    The files themselves are carried along beside the weights.
    """

    card: str = ""
    license: str = ""

    @classmethod
    def read(cls, folder: Path) -> SourceTexts:
        """From the folder of a checkpoint."""
        return cls(_text(folder / "README.md"), _text(folder / "LICENSE"))

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The front matter, every value as it is written; empty where it cannot be read."""
        match = _FRONT_MATTER.match(self.card)
        try:
            found = yaml.load(match[1], Loader=yaml.BaseLoader) if match else None
        except (yaml.YAMLError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def body(self) -> str:
        """The card without its front matter."""
        return _FRONT_MATTER.sub("", self.card).strip()

    @property
    def licenses(self) -> dict[str, str]:
        """The metadata keys that say which licence it is under."""
        keys = ("license", "license_name", "license_link")
        told = {key: self.metadata[key] for key in keys if isinstance(self.metadata.get(key), str)}
        if "license" in told or not self.license:
            return told
        named = (
            name for text, name in _LICENSE_TEXTS.items() if re.search(text, self.license[:2000])
        )
        return {"license": next(named, "other"), "license_link": "LICENSE"}


def tokenizer_of(folder: Path) -> dict[str, str] | None:
    """{kind, file} of the tokenizer; None where there is none."""
    found = next((name for name in _TOKENIZERS if (folder / name).is_file()), None)
    return None if found is None else {"kind": _TOKENIZERS[found], "file": found}


def license_of(folder: Path) -> str | None:
    """The licence: `license_name` or `license` of README.md's front matter, or the first line of a
    LICENSE file; None where nothing tells."""
    front = SourceTexts.read(folder).metadata
    named = (front.get(key) for key in ("license", "license_name"))
    declared, name = (value if isinstance(value, str) and value else None for value in named)
    if declared not in (None, "other"):
        return _shown(declared)
    if name is not None:
        return _shown(name)
    lines = (line for file in _LICENSES for line in _text(folder / file).splitlines())
    title = next((text for text in (line.strip("#*=- \t") for line in lines) if text), None)
    return declared if title is None else _shown(title)


def _text(path: Path) -> str:
    """The beginning of a text file; nothing of what is no readable file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return ""


def _shown(text: str) -> str:
    """A text that is safe to print: one line, of a sensible length."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LONGEST].strip()
