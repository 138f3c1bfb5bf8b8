"""Few patterns for many modules: what a compressed-tensors config targets and ignores.

A pattern is an exact module name, or `re:` and a regular expression that engines match from the
start of the name. Numbers of layers and experts become `\\d+` only where every module of the
checkpoint that the pattern matches is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from requant.convert.names import is_index, split_numbers

#: Stands for the numbers of layers until all are known; no module's name holds it.
_LAYER = "<layer>"


def module_patterns(chosen: Collection[str], modules: Mapping[str, Collection[str]]) -> list[str]:
    """Patterns that match all of `chosen` and nothing else among `modules`.

    These are grouped, under any one of them, with those that differ in numbers only.
    """
    wanted = set(chosen)
    inside = {like: [m for m in names if m in wanted] for like, names in modules.items()}
    outside = {like for like, names in modules.items() if len(inside[like]) < len(names)}
    inside |= {m: [m] for m in wanted.difference(*inside.values())}
    refused = {key for like in outside for key in _wide(like)}
    found: list[tuple[list[tuple[int, str]], str, str]] = []
    single: list[str] = []
    for like, names in inside.items():
        pattern = next((key for key in _wide(like) if key not in refused), None)
        if pattern is None:
            single += names
        elif names:
            found.append((natural_key(min(names, key=_numbers)), f"re:{pattern}$", ""))
    keys = {module: _of_layer(module) for module in single}
    shapes = {key[0] for key in keys.values() if key}
    alike = (like for like in outside if (key := _of_layer(like)) and key[0] in shapes)
    beside = {_of_layer(m) for like in alike for m in modules[like] if m not in wanted}
    for module, key in keys.items():
        usable = key is not None and key not in beside
        pattern, layer = (f"re:{key[0]}$", key[1]) if key and usable else (module, "")
        found.append((natural_key(module), pattern, layer))
    patterns: dict[str, list[str]] = {}  # with a place for the numbers of some layers
    for _, pattern, layer in sorted(found, key=lambda item: item[0]):
        layers = patterns.setdefault(pattern, [])
        if layer and layer not in layers:
            layers.append(layer)
    return [
        pattern.replace(_LAYER, f"(?:{'|'.join(layers)})" if len(layers) > 1 else "".join(layers))
        for pattern, layers in patterns.items()
    ]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that counts layers as numbers."""
    return [(int(c), "") if is_index(c) else (-1, c) for c in name.split(".")]


def _numbers(module: str) -> list[int]:
    """What puts modules that are alike in order."""
    return [int(number) for number in split_numbers(f"{module}.")[1]]


def _wide(module: str) -> Iterator[str]:
    """Regular expressions that match a module whatever its numbers, the widest first; equal for
    modules alike.

    The first has no prefix: engines and transformers move `language_model.` about.
    """
    every, first = _components(module)
    if first is None:
        return
    if first > 1:
        yield r".*\." + r"\.".join(every[first - 1 :])
    yield r"\.".join(every)


def _of_layer(module: str) -> tuple[str, str] | None:
    """The same with a place for the number of the layer, which comes second."""
    every, first = _components(module)
    if first is None:
        return None
    layer = module.split(".")[first]
    return r"\.".join([*every[:first], _LAYER, *every[first + 1 :]]), layer


def _components(module: str) -> tuple[list[str], int | None]:
    """What matches each component, and which is the first number."""
    components = module.split(".")
    every = [r"\d+" if is_index(c) else re.escape(c) for c in components]
    return every, next((i for i, c in enumerate(components) if is_index(c)), None)
