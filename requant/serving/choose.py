"""The mixture of formats with the least expected damage that fits: `plan SRC --fit GPUS`.

Each role has one format, but of the role that most of the model is of, the first and last layers
can have a better one than those between, as many layers as there is room for. All mixtures of what
the GPUs run are compared, so the result is the best there is by quality.py, and always the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from requant.convert.names import LINEAR_ROLES, ROLES, Role
from requant.convert.recipe import (
    KEEP,
    RECIPE_ROLES,
    Recipe,
    default_recipe,
    parse_recipe,
    plain_codec,
)
from requant.convert.source import Checkpoint
from requant.quant import Codec, format_name, parse_format
from requant.quant.codec import bits_per_weight
from requant.serving.fit import Fit
from requant.serving.hardware import Architecture, Gpus
from requant.serving.inventory import Inventory, Stack, ways
from requant.serving.memory import Demand
from requant.serving.quality import damage
from requant.serving.support import Engine, common_engines

#: What is tried beside the plain format: all in compressed-tensors, whose config says any mixture.
FORMATS = (
    "fp8-block[container=compressed-tensors]",
    "fp8-channel",
    "int8-channel",
    "int4[group_size=32,method=mse]",
    "int4[method=mse]",
    "nvfp4[method=mse]",
    "mxfp4[method=mse]",
)
#: FP4 is tried only where GPUs multiply it; elsewhere INT4 has faster kernels, in more engines.
_FP4_UNITS: Mapping[str, frozenset[Architecture]] = {
    "nvfp4[method=mse]": frozenset({"blackwell"}),
    "mxfp4[method=mse]": frozenset({"blackwell", "cdna4"}),
}
#: Engines take MLA's kv_b_proj apart, and not all can do so in 4 bits.
_KV_B = "*.kv_b_proj"


class Option(NamedTuple):
    """A format for a group of weights: what it costs, and the bytes of a rank."""

    format: str
    damage: float
    rank_bytes: int


class Mixture(NamedTuple):
    """A format for each group; of the largest group, `edges` layers at both ends have another.

    Ordered by damage, then bytes, then names.
    """

    damage: float
    rank_bytes: int
    formats: tuple[str, ...]
    edge_format: str
    edges: int


@dataclass(frozen=True)
class Group:
    """The linear weights of a role, in how many layers, and whether it is the largest role."""

    role: Role
    stacks: tuple[Stack, ...]
    layers: int
    largest: bool


@dataclass(frozen=True)
class Choice:
    """The chosen recipe, as the text of a file and parsed; `fit` is that of its largest rank."""

    text: str
    recipe: Recipe
    fit: Fit
    damage: float
    engines: tuple[Engine, ...]


def choose(source: Checkpoint, gpus: Gpus, demand: Demand) -> Choice | None:
    """The best recipe whose output fits on these GPUs, as it is stored if that fits; None where no
    mixture does.

    Of GPUs that are told by memory alone it takes formats that Ampere and all newer ones run.
    """
    inventory = Inventory.of(source)
    plain = format_name(plain_codec(source.config))
    usually = inventory.parallel_for(default_recipe(plain), gpus.count)
    found = []
    for parallel in ways(inventory.survey, usually.ranks):
        choice = _best(inventory, plain, gpus, Fit.of(source.config, gpus, parallel, demand, 0))
        if choice is not None:
            found.append(choice)
    return min(found, key=lambda choice: (choice.damage, choice.fit.needed), default=None)


def _best(inventory: Inventory, plain: str, gpus: Gpus, empty: Fit) -> Choice | None:
    """The best that fits with one parallelism; `empty` is the fit without weights."""
    groups = _groups(inventory)
    linear = {id(stack) for group in groups for stack in group.stacks}
    others = [stack for stack in inventory.stacks if id(stack) not in linear]
    beside = inventory.sized(KEEP, empty.parallel, others) if others else []
    if beside is None or not groups:
        return None
    options = [_options(inventory, group, plain, gpus, empty) for group in groups]
    room = empty.room - sum(each.rank_bytes for each in beside)
    mixtures = sorted(_mixtures(groups, options, room))
    for mixture in itertools.chain(_as_stored(groups), mixtures):
        names = {*mixture.formats, mixture.edge_format}
        engines = tuple(common_engines(names, gpus.architecture))
        if not engines:
            continue
        for edges in range(mixture.edges, -1, -1):  # fewer where layers are not alike
            counted = inventory.with_edges(edges) if edges else inventory
            text = _text(_groups(counted), mixture, plain, gpus, empty.demand)
            recipe = parse_recipe("fit", text)
            sized = counted.sized(recipe, empty.parallel) or []
            fit = dataclasses.replace(empty, weights=sum(each.rank_bytes for each in sized))
            if sized and fit.fits:
                return Choice(text, recipe, fit, damage(counted, sized), engines)
    return None


def _groups(inventory: Inventory) -> list[Group]:
    """The roles that get a format each, in the order of recipes."""
    found: dict[Role, list[Stack]] = {}
    for stack in inventory.stacks:
        weight = stack.item.weight
        linear = weight.kind in LINEAR_ROLES and weight.codec is not None
        if linear and weight.role in RECIPE_ROLES:
            found.setdefault(weight.role, []).append(stack)
    sizes = {
        role: sum(s.number * s.item.weight.nbytes for s in stacks)
        for role, stacks in found.items()
        if role != "mtp"
    }
    largest = max(sizes, key=lambda role: sizes[role], default=None)
    layers: dict[Role, set[int]] = {}
    for item in inventory.survey.items:
        if item.layer is not None and item.weight.kind in LINEAR_ROLES:
            layers.setdefault(item.weight.role, set()).add(item.layer)
    return [
        Group(role, tuple(found[role]), len(layers.get(role, ())), role == largest)
        for role in ROLES
        if role in found
    ]


def _options(
    inventory: Inventory, group: Group, plain: str, gpus: Gpus, empty: Fit
) -> list[Option]:
    """The formats that a group can have, without those that another beats in damage and bytes; the
    least damage first."""
    found = []
    for text in (plain, *FORMATS):
        units = _FP4_UNITS.get(text)
        if units is not None and gpus.architecture not in units:
            continue
        if not common_engines([text], gpus.architecture):
            continue
        roles: dict[str, Codec | None] = {group.role: parse_format(text)}
        apart: dict[str, Codec | None] = {
            k: parse_format(v) for k, v in _apart(group, text, plain).items()
        }
        sized = inventory.sized(Recipe("fit", "", roles, apart), empty.parallel, group.stacks)
        if sized is not None:
            nbytes = sum(each.rank_bytes for each in sized)
            found.append(Option(text, damage(inventory, sized), nbytes))
    kept: list[Option] = []
    for option in sorted(found, key=lambda o: (o.damage, o.rank_bytes, o.format)):
        if not kept or option.rank_bytes < kept[-1].rank_bytes:
            kept.append(option)
    return kept


def _mixtures(
    groups: Sequence[Group], options: Sequence[Sequence[Option]], room: int
) -> Iterator[Mixture]:
    """Mixtures that fit into the room of a rank; layers are taken to be alike."""
    place = next(i for i, group in enumerate(groups) if group.largest)
    layers = groups[place].layers
    for chosen in itertools.product(*options):
        cost = sum(option.damage for option in chosen)
        nbytes = sum(option.rank_bytes for option in chosen)
        if nbytes > room:
            continue
        formats, between = tuple(option.format for option in chosen), chosen[place]
        yield Mixture(cost, nbytes, formats, between.format, 0)
        for edge in options[place]:
            if edge.rank_bytes > between.rank_bytes:
                more = (edge.rank_bytes - between.rank_bytes) * 2 / layers
                edges = min(int((room - nbytes) / more), (layers - 1) // 2)
                if edges:
                    less = (between.damage - edge.damage) * edges * 2 / layers
                    total = nbytes + int(edges * more)
                    yield Mixture(cost - less, total, formats, edge.format, edges)


def _as_stored(groups: Sequence[Group]) -> Iterator[Mixture]:
    """The mixture that changes nothing, where each role is stored in one format that is written."""
    formats = []
    for group in groups:
        codecs = {stack.item.weight.codec for stack in group.stacks}
        codec = next(iter(codecs))
        if len(codecs) > 1 or codec is None or codec.read_only or codec.fused_only:
            return
        formats.append(format_name(codec))
    yield Mixture(0.0, 0, tuple(formats), formats[0], 0)


def _apart(group: Group, text: str, plain: str) -> dict[str, str]:
    """The pattern that keeps kv_b_proj in plain floats where a group has it in 4 bits."""
    if bits_per_weight(parse_format(text)) >= 6:
        return {}
    found = [s for s in group.stacks if s.item.weight.module.endswith(_KV_B[1:])]
    return {_KV_B if s.number > 1 else s.item.weight.module: plain for s in found}


def _text(groups: Sequence[Group], mixture: Mixture, plain: str, gpus: Gpus, demand: Demand) -> str:
    """The recipe as a file."""
    modules: dict[str, str] = {}
    for group, text in zip(groups, mixture.formats, strict=True):
        modules |= _apart(group, text, plain)
    for group in groups:
        if group.largest:
            for stack in group.stacks:
                modules |= dict.fromkeys(stack.modules, mixture.edge_format)
    serving = f"{gpus}, context {demand.context}, batch {demand.batch}"
    lines = [
        f"# The formats of least expected damage that fit on {serving}.",
        "# Found by `requant plan --fit`; `requant convert --recipe` takes this file, `requant",
        "# verify` measures what it costs. Edit it freely.",
        f'description = "fits {serving}"',
        "",
        "[roles]",
        *(f'{group.role} = "{text}"' for group, text in zip(groups, mixture.formats, strict=True)),
    ]
    if modules:
        entries = (f'"{pattern}" = "{text}"' for pattern, text in modules.items())
        lines += ["", "[modules]", *entries]
    return "\n".join(lines) + "\n"
