"""Reading config.json key by key: each reader raises CheckpointError naming key and value."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from requant.errors import CheckpointError

_LARGEST = sys.float_info.max


def required(config: Mapping[str, Any], key: str) -> Any:
    """A value that must be there; null counts as absent."""
    if config.get(key) is None:
        raise CheckpointError(f"config.json: has no {key}; the runner needs it")
    return config[key]


def integer(config: Mapping[str, Any], key: str) -> int:
    """A required integer of at least 1."""
    value = required(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def optional_count(config: Mapping[str, Any], key: str) -> int:
    """A count that is 0 when null or absent: the file's way to say "none"."""
    return integer(config, key) if config.get(key) else 0


def number(config: Mapping[str, Any], key: str, zero: bool = False) -> float:
    """A required finite number above 0, or at 0 where `zero` allows it."""
    value = required(config, key)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer of JSON may be too large for a float.
    if not numeric or not 0 <= value <= _LARGEST or (value == 0 and not zero):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """A required true or false."""
    value = required(config, key)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected true or false")
    return value


def choice(
    config: Mapping[str, Any], key: str, fallback: Mapping[str, str], choices: tuple[str, ...]
) -> str:
    """One of `choices`, or what the model_type's `fallback` says when the key is absent."""
    value = config.get(key) or fallback[key]
    if value not in choices:
        raise CheckpointError(
            f"config.json: {key} is {value!r}; the runner knows {', '.join(choices)}"
        )
    return str(value)
