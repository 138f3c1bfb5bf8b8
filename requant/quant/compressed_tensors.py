"""The `quantization_config` of compressed-tensors: written from schemes, read for one weight.

Source: compressed-tensors 0.20.0, quantization/quant_config.py and quant_args.py. A config holds
groups, each a scheme and its targets: class names, exact module names, or `re:` and a regular
expression that is matched from the start of the name. Unknown keys inside a scheme are errors
there, so what is written has the keys that the library itself writes.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from requant.errors import FormatError

QUANT_METHOD = "compressed-tensors"
#: The top-level format of a config whose groups have formats of their own.
MIXED = "mixed-precision"
#: `(a+)+` backtracks exponentially, and nobody needs it to name modules.
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def scheme(
    container: str,
    *,
    num_bits: int,
    type: str,
    strategy: str,
    symmetric: bool = True,
    group_size: int | None = None,
    activations: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One scheme. `more` is added to `weights` (block_structure, scale_dtype)."""
    weights = {
        "num_bits": num_bits,
        "type": type,
        "symmetric": symmetric,
        "group_size": group_size,
        "strategy": strategy,
        **more,
        "dynamic": False,
    }
    return {
        "weights": weights,
        "input_activations": None if activations is None else dict(activations),
        "output_activations": None,
        "format": container,
    }


def dynamic_activations(num_bits: int, type: str, **more: Any) -> dict[str, Any]:
    """Activations quantized by the engine as it runs, per token unless `more` says otherwise."""
    return {
        "num_bits": num_bits,
        "type": type,
        "symmetric": True,
        "group_size": None,
        "strategy": "token",
        "dynamic": True,
        **more,
    }


def one_scheme_config(scheme: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of one scheme over all Linears but the `kept` modules."""
    return groups_config([(["Linear"], scheme)], kept)


def groups_config(
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]], kept: Sequence[str]
) -> dict[str, Any]:
    """The quantization_config of several (targets, scheme); `kept` are names or `re:` patterns."""
    formats = list(dict.fromkeys(scheme["format"] for _, scheme in groups))
    return {
        "config_groups": {
            f"group_{number}": {"targets": list(targets), **scheme}
            for number, (targets, scheme) in enumerate(groups)
        },
        "quant_method": QUANT_METHOD,
        "kv_cache_scheme": None,
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(kept),
    }


def narrow(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config with the group that targets `module` as its only one; as it is for one group."""
    groups = Groups(config)
    return groups.only(groups.target(module))


class Groups:
    """The groups of a config, and which of them targets a module.

    Exact names count before patterns and patterns before class names, as in compressed-tensors.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        groups = config.get("config_groups")
        ours = config.get("quant_method") == QUANT_METHOD
        several = ours and isinstance(groups, dict) and len(groups) > 1
        self._groups: Mapping[str, Any] = config["config_groups"] if several else {}

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return bool(self._groups)

    def target(self, module: str) -> str | None:
        """The name of the group that targets a module; None for none, or where there is but one.

        Raises FormatError for a pattern that can take for ever to match.
        """
        if not self._groups:
            return None
        exact, patterns, otherwise = self._targets
        if module in exact:
            return exact[module]
        return next((name for pattern, name in patterns if pattern.match(module)), otherwise)

    def only(self, name: str | None) -> Mapping[str, Any]:
        """The config with this group as its only one. Of None as it is: with the one group there
        is, or with all, of which the weight's parts decide."""
        if name is None:
            return self._config
        return {**self._config, "config_groups": {name: self._groups[name]}}

    @cached_property
    def _targets(self) -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]], str | None]:
        """Of exact names, patterns, and all Linears: the first group that targets them."""
        exact: dict[str, str] = {}
        patterns: list[tuple[re.Pattern[str], str]] = []
        for name, group in self._groups.items():
            for target in _texts(group):
                exact.setdefault(target, name)
                if target.startswith("re:") and (pattern := _pattern(target[3:])) is not None:
                    patterns.append((pattern, name))
        return exact, patterns, exact.get("Linear")


def stored_scheme(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The only scheme of a config, with its container; None when there is no such thing."""
    if not stored_weights(config):
        return None
    (group,) = config["config_groups"].values()
    scheme = {key: value for key, value in group.items() if key != "targets"}
    container = group.get("format") or config.get("format")
    return {**scheme, "format": container} if isinstance(container, str) else None


def stored_weights(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The `weights` of a config's only group; empty when there is no such thing."""
    groups = (config or {}).get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return {}
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    return weights if isinstance(weights, dict) else {}


def _texts(group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, dict) else None
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []


@lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str] | None:
    if _REPEATED_GROUP.search(text):
        raise FormatError(
            f"config_groups: the target {reprlib.repr(text)} repeats a group, which can take for "
            "ever to match; write it without"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None
