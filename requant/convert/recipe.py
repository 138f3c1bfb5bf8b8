"""Recipes: which weights go into which format. Data in TOML files, read and checked here.

    description = "one line"
    [roles]                      # attention, dense_mlp, shared_expert, routed_expert, mtp
    routed_expert = "int4"       # a format, or "keep"; a role that is not named is kept
    [modules]                    # exceptions: glob over module names, the first match counts
    "model.layers.0.mlp.*" = "bf16"

Embeddings, lm_head, norms, biases and routers are always copied bit-identical, and so is what is
not a linear layer of an MTP layer (its eh_proj, norms, router and embeddings).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from requant.convert.names import LINEAR_ROLES, ROLES, setting
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight
from requant.errors import FormatError, RequantError
from requant.quant import CODECS, Codec, format_name, parse_format
from requant.quant.codec import bits_per_weight
from requant.quant.plain import Plain

#: The roles a recipe may name.
RECIPE_ROLES = frozenset({*LINEAR_ROLES, "mtp"})


@dataclass(frozen=True)
class Recipe:
    """`roles` and `modules` map to a codec, or None for "keep". A `preset` serves many models, so
    its patterns need not match."""

    name: str
    description: str
    roles: Mapping[str, Codec | None]
    modules: Mapping[str, Codec | None]
    preset: bool = False

    @property
    def format(self) -> str:
        """The formats it writes, in order, e.g. `int4` or `int4[group_size=32]+bf16`."""
        exceptions = () if self.preset else self.modules.values()
        names = [format_name(c) for c in (*self.roles.values(), *exceptions) if c]
        return "+".join(dict.fromkeys(names)) or "keep"

    @property
    def sha256(self) -> str:
        """Identifies what it says, whatever it is called."""
        tables = {
            key: {left: format_name(codec) if codec else "keep" for left, codec in table.items()}
            for key, table in (("roles", self.roles), ("modules", self.modules))
        }
        return hashlib.sha256(json.dumps(tables).encode()).hexdigest()

    @property
    def text(self) -> str:
        """It as a recipe file."""
        tables = (("roles", self.roles), ("modules", self.modules))
        return "\n".join(
            f"[{key}]\n"
            + "".join(
                f"{json.dumps(left)} = {json.dumps(format_name(codec) if codec else 'keep')}\n"
                for left, codec in table.items()
            )
            for key, table in tables
            if table
        )

    @cached_property
    def tells_numbers(self) -> bool:
        """Whether a pattern may match one number and not another, of a layer for example. One of
        `*` and other characters than digits cannot: what is around the numbers has to fit."""
        return any(re.search(r"[0-9?\[]", pattern) for pattern in self.modules)

    def target(self, weight: StoredWeight) -> Codec | None:
        """The codec this weight is to be written in; None to keep it as it is stored."""
        if weight.codec is None or not weight.alike.linear:
            return None
        module = weight.module
        for pattern, codec in self.modules.items():
            if fnmatch.fnmatchcase(module, pattern):
                return codec
        return self.roles.get(weight.role)

    def require_effect(self, source: Checkpoint) -> None:
        """Raise when a [modules] pattern decides about no linear weight: a typo must not pass."""
        if self.preset:
            return
        linear = [kind for kind in source.kinds if kind.linear]
        modules = {kind.module for kind in linear}
        if self.tells_numbers:
            modules = {weight.module for kind in linear for weight in source.kinds[kind]}
        left = set(modules)
        for pattern in self.modules:
            matches = {module for module in modules if fnmatch.fnmatchcase(module, pattern)}
            if not matches:
                names = (weight.module for kind in linear for weight in source.kinds[kind])
                raise RequantError(
                    f"recipe {self.name}: [modules] {pattern!r} matches no linear weight of "
                    f"{source.path}; patterns are compared with names such as "
                    f"{min(names, default='model.layers.0.mlp.up_proj')!r}"
                )
            if not matches & left:
                raise RequantError(
                    f"recipe {self.name}: [modules] {pattern!r} has no effect, patterns above it "
                    "match all that it matches; put it first"
                )
            left -= matches


#: The recipe of a copy: what `shard` and `merge` do.
KEEP = Recipe("keep", "every weight as it is", {}, {}, preset=True)


def recipe_names() -> list[str]:
    """The presets: the default recipe of every format, then those that ship as files."""
    folder = resources.files("requant.recipes")
    files = (f.name for f in folder.iterdir() if f.name.endswith(".toml"))
    return [codec.name for codec in CODECS] + sorted(name.removesuffix(".toml") for name in files)


def recipe_text(name: str) -> str:
    """The text of a preset. Raises RequantError naming the presets there are."""
    if name not in recipe_names():
        raise RequantError(f"unknown recipe {name!r}: one of {', '.join(recipe_names())}")
    file = resources.files("requant.recipes").joinpath(f"{name}.toml")
    return file.read_text("utf-8") if file.is_file() else _format_text(parse_format(name))


def load_recipe(name_or_file: str) -> Recipe:
    """A preset by name, or a recipe file by a path that ends in .toml."""
    if not name_or_file.endswith(".toml"):
        return parse_recipe(name_or_file, recipe_text(name_or_file), preset=True)
    try:
        text = Path(name_or_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequantError(f"{name_or_file}: cannot read the recipe: {error}") from error
    return parse_recipe(name_or_file, text)


def default_recipe(format_text: str) -> Recipe:
    """The default recipe of a format with its options: all linear layers."""
    codec = parse_format(format_text)
    return parse_recipe(codec.name, _format_text(codec), preset=True)


def _format_text(codec: Codec) -> str:
    """The default recipe of a format, as a file would say it."""
    name = format_name(codec)
    lines = [
        f"# {name}: {codec.summary}.",
        f"# Loaded by {codec.loaded_by}. Copy this text into a file to edit it.",
        f'description = "all linear layers in {name}"',
        "",
        "[roles]",
        *(f'{role} = "{name}"' for role in ROLES if role in RECIPE_ROLES),
    ]
    if bits_per_weight(codec) < 6:
        lines += [
            "",
            "# Engines take MLA's kv_b_proj apart, and not all can do so in 4 bits.",
            "[modules]",
            '"*.kv_b_proj" = "bf16"',
        ]
    return "\n".join(lines) + "\n"


def parse_recipe(name: str, text: str, preset: bool = False) -> Recipe:
    """Parse a recipe's text. Unknown keys, roles and formats are errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequantError(f"recipe {name}: not valid TOML: {error}") from error
    unknown = set(data) - {"description", "roles", "modules"}
    if unknown:
        raise RequantError(
            f"recipe {name}: unknown key {min(unknown)!r}; it may have description, roles, modules"
        )
    roles = _table(name, data, "roles")
    for role in roles:
        if role not in RECIPE_ROLES:
            raise RequantError(
                f"recipe {name}: [roles] has {role!r}; one of {', '.join(sorted(RECIPE_ROLES))} "
                "(everything else is copied bit-identical)"
            )
    modules = _table(name, data, "modules")
    if not any((*roles.values(), *modules.values())):
        raise RequantError(f"recipe {name}: converts nothing; name a format in [roles]")
    return Recipe(name, str(data.get("description", "")), roles, modules, preset)


def _table(name: str, data: Mapping[str, object], key: str) -> dict[str, Codec | None]:
    table = data.get(key, {})
    if not isinstance(table, dict):
        raise RequantError(f"recipe {name}: {key} is not a table")
    codecs: dict[str, Codec | None] = {}
    for left, right in table.items():
        if not isinstance(right, str):
            raise RequantError(f"recipe {name}: [{key}] {left} = {right!r} is not a format name")
        try:
            codec = None if right == "keep" else parse_format(right)
            if codec is not None and (codec.read_only or codec.fused_only):
                raise FormatError(f"{right} is only read, not written; see `requant formats`")
            codecs[left] = codec
        except FormatError as error:
            raise FormatError(f"recipe {name}: [{key}] {left}: {error}") from error
    return codecs


def plain_codec(config: Mapping[str, object]) -> Plain:
    """The plain format that a checkpoint's activations are in: its torch_dtype, bf16 by default."""
    dtype = setting(config, "torch_dtype") or setting(config, "dtype")
    codec = parse_format({"float16": "fp16", "float32": "fp32"}.get(str(dtype), "bf16"))
    assert isinstance(codec, Plain)
    return codec
