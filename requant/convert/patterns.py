"""Few patterns for many modules: what a compressed-tensors config targets and ignores.

A pattern is an exact module name, or `re:` and a regular expression that engines match from the
start of the name. Numbers of layers and experts become `\\d+` only where every module of the
checkpoint that the pattern matches is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from requant.convert.names import is_index


def module_patterns(chosen: Collection[str], modules: Iterable[str]) -> list[str]:
    """Patterns that match all of `chosen` and nothing else among `modules`."""
    wanted = set(chosen)
    outside = {key for module in modules if module not in wanted for key in _keys(module)}
    patterns: dict[str, None] = {}
    for module in sorted(wanted, key=natural_key):
        key = next((key for key in _keys(module) if key not in outside), None)
        patterns[module if key is None else f"re:{key}$"] = None
    return list(patterns)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that counts layers as numbers."""
    return [(int(c), "") if is_index(c) else (-1, c) for c in name.split(".")]


def _keys(module: str) -> Iterator[str]:
    """Regular expressions that match a module, the widest first; equal for modules alike.

    The first has no prefix: engines and transformers move `language_model.` about.
    """
    components = module.split(".")
    numbers = [i for i, c in enumerate(components) if is_index(c)]
    if not numbers:
        return
    every = [r"\d+" if is_index(c) else re.escape(c) for c in components]
    tail = every[numbers[0] - 1 :]
    if len(tail) < len(every):
        yield r".*\." + r"\.".join(tail)
    yield r"\.".join(every)
    if len(numbers) > 1:
        yield r"\.".join(
            [
                re.escape(c) if i == numbers[0] else e
                for i, (c, e) in enumerate(zip(components, every, strict=True))
            ]
        )
