"""Weights of one kind share what is known of them, and nothing that their numbers decide."""

from __future__ import annotations

import fnmatch
import random
import re
from pathlib import Path
from typing import Any

import pytest

from requant.convert.names import fused_set, kind_of, role_of
from requant.convert.parallel import Parallel
from requant.convert.patterns import module_patterns
from requant.convert.plan import make_plan
from requant.convert.ranks import split
from requant.convert.recipe import RECIPE_ROLES, parse_recipe
from requant.convert.source import Checkpoint
from requant.quant import parse_format
from requant.quant.compressed_tensors import groups_config, narrow
from tests.convert.sparse import BF16, V3, deepseek, plain, write_sparse

SMALL: dict[str, Any] = V3 | {"num_hidden_layers": 12, "n_routed_experts": 11}


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_sparse(tmp_path_factory.mktemp("v3") / "model", SMALL, deepseek(SMALL))


def test_a_kind_says_what_each_of_its_names_says(v3: Checkpoint) -> None:
    assert len(v3.kinds) < 50 < 450 < len(v3.weights)
    for name, weight in v3.weights.items():
        assert weight.role == role_of(name, weight.shape, SMALL), name
        assert weight.kind == kind_of(name, weight.shape), name
        assert weight.fused_set == fused_set(name), name
        assert f"{weight.module}.weight" == name or weight.kind == "router_bias", name
    mtp = {name for name, weight in v3.weights.items() if weight.role == "mtp"}
    assert mtp == {name for name in v3.weights if ".layers.12." in name}


PATTERNS = ["*.layers.3.mlp.*", "*.layers.1?.mlp.*", "*.layers.[2-4].*", "*.kv_b_proj",
            "*.experts.1*.down_proj", "*.experts.*.down_proj"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_hits_the_modules_that_it_matches(pattern: str, v3: Checkpoint) -> None:
    roles = "".join(f'{role} = "int4"\n' for role in sorted(RECIPE_ROLES))
    recipe = parse_recipe("mine", f'[roles]\n{roles}[modules]\n"{pattern}" = "bf16"\n')
    assert recipe.tells_numbers == bool(re.search(r"[0-9?\[]", pattern))
    for planned in make_plan(v3, recipe).weights:
        weight = planned.source
        expected = None
        if weight.codec is not None and weight.alike.linear:
            expected = BF16 if fnmatch.fnmatchcase(weight.module, pattern) else parse_format("int4")
        assert planned.codec == expected, weight.name


def test_a_config_may_target_single_layers() -> None:
    """Exact names before patterns, patterns before classes; among equals the first group."""
    targets = [["Linear"], [r"re:.*layers\.1\d\.", "a.layers.3.b"], [r"re:.*\.layers\.12\..*", "c"]]
    config = groups_config([(target, {"format": "pack-quantized"}) for target in targets], [])
    for module, expected in (
        ("a.layers.3.b", 1), ("a.layers.4.b", 0), ("a.layers.12.b", 1), ("a.layers.10.b", 1),
        ("a.layers.1.b", 0), ("c", 2), ("b.a.layers.3.b", 0),
    ):  # fmt: skip
        assert list(narrow(config, module)["config_groups"]) == [f"group_{expected}"], module


def test_patterns_match_what_is_chosen_and_nothing_else() -> None:
    """Of modules chosen at random, whatever else there is: the law that engines rely on."""
    leaves = ("a_proj", "experts.0.b_proj", "experts.1.b_proj")
    layers = [f"{prefix}layers.{n}" for prefix in ("model.", "") for n in range(11)]
    names = ["lm_head", *(f"{layer}.{leaf}" for layer in layers for leaf in leaves)]
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    rng = random.Random(0)
    for chance in (0.05, 0.5, 0.95, 1.0):
        for _ in range(20):
            chosen = {name for name in names if rng.random() < chance}
            dropped = rng.choice(["", "a_proj", "b_proj", "layers.3."])
            chosen = {name for name in chosen if not dropped or dropped not in name}
            patterns = module_patterns(chosen, modules)
            found = {name for name in names if any(_matches(p, name) for p in patterns)}
            assert found == chosen


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def test_a_star_in_a_name_is_no_number(tmp_path: Path) -> None:
    specs = {f"model.layers.{n}.mlp.up_proj.weight": plain(64, 64) for n in ("0", "1", "*")}
    checkpoint = write_sparse(tmp_path / "model", {"num_hidden_layers": 2}, specs)
    layers = {
        item.weight.name: item.layer for item in split(checkpoint, Parallel(1, 1)).survey.items
    }
    assert list(layers.values()) == [0, 1, None]
    assert len(checkpoint.kinds) == 2
