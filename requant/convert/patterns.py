"""Few patterns for many modules: what a compressed-tensors config targets and ignores.

A pattern is an exact module name, or `re:` and a regular expression that engines match from the
start of the name. Numbers of layers and experts become `\\d+` only where every module of the
checkpoint that the pattern matches is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from requant.convert.names import is_index

#: Stands for the numbers of layers until all are known; no module's name holds it.
_LAYER = "<layer>"


def module_patterns(chosen: Collection[str], modules: Iterable[str]) -> list[str]:
    """Patterns that match all of `chosen` and nothing else among `modules`."""
    wanted = set(chosen)
    outside = {key for module in modules if module not in wanted for key in _keys(module)}
    patterns: dict[str, list[str]] = {}  # with {} for the numbers of some layers
    for module in sorted(wanted, key=natural_key):
        keys = (key for key in _keys(module) if key not in outside)
        pattern, layer = next(keys, (module, ""))
        layers = patterns.setdefault(pattern if pattern == module else f"re:{pattern}$", [])
        if layer and layer not in layers:
            layers.append(layer)
    return [
        pattern.replace(_LAYER, f"(?:{'|'.join(layers)})" if len(layers) > 1 else "".join(layers))
        for pattern, layers in patterns.items()
    ]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that counts layers as numbers."""
    return [(int(c), "") if is_index(c) else (-1, c) for c in name.split(".")]


def _keys(module: str) -> Iterator[tuple[str, str]]:
    """Regular expressions that match a module, the widest first; equal for modules alike. The last
    has a place for the number of the layer, which comes second.

    The first has no prefix: engines and transformers move `language_model.` about.
    """
    components = module.split(".")
    numbers = [i for i, c in enumerate(components) if is_index(c)]
    if not numbers:
        return
    every = [r"\d+" if is_index(c) else re.escape(c) for c in components]
    first = numbers[0]
    if first > 1:
        yield r".*\." + r"\.".join(every[first - 1 :]), ""
    yield r"\.".join(every), ""
    yield r"\.".join([*every[:first], _LAYER, *every[first + 1 :]]), components[first]
