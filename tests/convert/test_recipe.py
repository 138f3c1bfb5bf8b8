"""Recipes: the presets, what each setting does, and that nothing in one is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from requant.convert.names import LINEAR_ROLES
from requant.convert.recipe import (
    RECIPE_ROLES,
    default_recipe,
    load_recipe,
    parse_recipe,
    plain_codec,
    recipe_names,
    recipe_text,
)
from requant.convert.source import Checkpoint
from requant.errors import FormatError, RequantError
from requant.quant import CODECS, parse_format


@pytest.fixture
def checkpoint(source: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(source("fp8-block"))


def test_every_format_has_a_preset_and_every_preset_parses() -> None:
    assert set(recipe_names()) >= {codec.name for codec in CODECS}
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.description and set(recipe.roles) == RECIPE_ROLES
        assert recipe == parse_recipe(name, recipe_text(name), preset=True)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_the_default_recipe_converts_every_role(codec: object) -> None:
    name = getattr(codec, "name", "")
    recipe = default_recipe(name)
    assert set(recipe.roles.values()) == {codec} and recipe.format == name


@pytest.mark.parametrize(
    "text", ["int4[group_size=32]", "fp8-block[block_rows=64,block_cols=64]", "fp8-block"]
)
def test_options_reach_everything_the_recipe_converts(text: str) -> None:
    recipe = default_recipe(text)
    assert set(recipe.roles.values()) == {parse_format(text)} and recipe.format == text


def test_roles_modules_and_keep_decide(checkpoint: Checkpoint) -> None:
    recipe = parse_recipe(
        "mine",
        """
        [roles]
        routed_expert = "int4[group_size=64]"
        attention = "bf16"
        dense_mlp = "keep"
        [modules]
        "model.layers.1.mlp.experts.10.*" = "keep"
        "*.experts.1*" = "int8-channel"
        "*.experts.*.up_proj" = "fp16"
        """.replace('"*.experts.1*" = "int8-channel"\n', ""),
    )
    recipe.require_effect(checkpoint)
    targets = {
        name.removeprefix("model.layers."): recipe.target(weight)
        for name, weight in checkpoint.weights.items()
        if name.startswith("model.layers.") and recipe.target(weight) is not None
    }
    assert targets == {
        "0.self_attn.q_proj.weight": parse_format("bf16"),
        "0.self_attn.kv_a_proj_with_mqa.weight": parse_format("bf16"),
        "1.self_attn.o_proj.weight": parse_format("bf16"),
        "1.mlp.experts.0.up_proj.weight": parse_format("fp16"),
    }
    assert recipe.format == "int4[group_size=64]+bf16+fp16"


def test_only_linear_weights_are_ever_converted(checkpoint: Checkpoint) -> None:
    recipe = default_recipe("fp32")
    converted = {n for n, w in checkpoint.weights.items() if recipe.target(w) is not None}
    kinds = {checkpoint.weights[name].role for name in converted}
    assert kinds == {*LINEAR_ROLES, "mtp"}
    assert not [n for n in converted if "eh_proj" in n or ".gate." in n or "head" in n]


WRONG: dict[str, tuple[str, str]] = {
    "not TOML": ("[roles", "recipe x: not valid TOML"),
    "unknown key": ('role = 1\n[roles]\nattention = "bf16"', "unknown key 'role'"),
    "unknown role": ('[roles]\nattn = "bf16"', r"\[roles\] has 'attn'; one of attention, dense"),
    "role that is always kept": ('[roles]\nrouter = "bf16"', r"\[roles\] has 'router'"),
    "unknown format": (
        '[roles]\nattention = "int5"',
        r"\[roles\] attention: unknown format 'int5'",
    ),
    "unknown option": ('[roles]\nattention = "int4[g=1]"', "int4 has no option 'g'"),
    "bad option": ('[roles]\nattention = "int4[group_size=31]"', "group_size=31: expected 32, 64"),
    "format in capitals": ('[roles]\nattention = "BF16"', "unknown format 'BF16'"),
    "number for a format": ("[roles]\nattention = 4", r"attention = 4 is not a format name"),
    "roles no table": ('roles = "int4"', "roles is not a table"),
    "modules no table": ("modules = []", "modules is not a table"),
    "same role twice": ('[roles]\nattention = "bf16"\nattention = "bf16"', "not valid TOML"),
    "nothing": ("", "converts nothing"),
    "only keep": ('[roles]\nattention = "keep"', "converts nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes_are_refused(case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(RequantError, match=message):
        parse_recipe("x", text)


WITHOUT_EFFECT = {
    '"model.layers.9.*" = "bf16"': r"'model\.layers\.9\.\*' matches no linear weight of .*; "
    r"patterns are compared with names such as 'model\.layers\.0\.mlp\.down_proj'",
    '"lm_head" = "bf16"': "'lm_head' matches no linear weight",
    '"*.mlp.gate" = "bf16"': r"'\*\.mlp\.gate' matches no linear weight",
    '"model.layers.0.*.weight" = "bf16"': "matches no linear weight",
    '"*" = "bf16"\n"*.q_proj" = "fp16"': r"'\*\.q_proj' has no effect, patterns above it",
}


@pytest.mark.parametrize("patterns", WITHOUT_EFFECT)
def test_patterns_without_effect_are_refused(patterns: str, checkpoint: Checkpoint) -> None:
    recipe = parse_recipe("x", f'[roles]\nattention = "bf16"\n[modules]\n{patterns}')
    with pytest.raises(RequantError, match=WITHOUT_EFFECT[patterns]):
        recipe.require_effect(checkpoint)


def test_a_preset_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(RequantError, match="unknown recipe 'int44': one of bf16, fp16"):
        load_recipe("int44")
    with pytest.raises(RequantError, match="cannot read the recipe"):
        load_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(RequantError, match="unknown recipe"):
        load_recipe("../recipes/int4")
    path = tmp_path / "mine.toml"
    path.write_bytes("description = 'caf\u00e9'\n[roles]\nmtp = 'int4'\n".encode())
    assert load_recipe(str(path)).description == "caf\u00e9"
    path.write_bytes(b"description = '\xff'")
    with pytest.raises(RequantError, match="cannot read the recipe"):
        load_recipe(str(path))


def test_near_misses_are_suggested() -> None:
    with pytest.raises(FormatError, match=r"unknown format 'fp8-blok'.*did you mean fp8-block\?"):
        default_recipe("fp8-blok")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({"dtype": "float32"}, "fp32"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bf16"),
        ({"text_config": {"dtype": "float16"}}, "fp16"),
    ],
)
def test_the_plain_format_of_a_config(config: dict[str, object], name: str) -> None:
    assert plain_codec(config).name == name
