"""Which way each kind of tensor is cut over GPUs, and the sizes its format allows.

Projections into heads or into the middle of an MLP are cut by rows, those out of them by columns,
vocabularies by rows; all else is on every rank. Sources: DeepSeek-V3 and DeepSeek-V3.2-Exp,
inference/convert.py; of DeepSeek-V4's, the copy in supermy/ds4rs. Every piece of a tensor has the
same size: loaders allocate equal parts, and DeepSeek's asserts them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.convert.names import Role, TensorName, setting
from requant.convert.weights import StoredWeight
from requant.errors import FormatError
from requant.quant import Codec, format_name, parse_format
from requant.quant.cutting import AXES, cut_alignment, cut_reason

HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"

#: The roles that can be cut, and that can be kept whole on every rank instead.
REPLICABLE: tuple[Role, ...] = ("embedding", "lm_head", "attention", "dense_mlp", "shared_expert")


@dataclass(frozen=True)
class Rule:
    """`axis`: 0 rows, 1 columns, None for a tensor that every rank has whole.

    `units` is the key of config.json that counts the heads or groups which stay together; None
    where single rows or columns may part. `role` is what the tensor is cut along with.
    """

    axis: int | None = None
    units: str | None = None
    role: Role = "other"


WHOLE = Rule()

#: leaf -> axis, units. Latent projections (q_a_proj, kv_a_proj_with_mqa, wkv) belong to no head.
_ATTENTION: dict[str, tuple[int, str]] = {
    "q_proj": (0, HEADS),
    "wq": (0, HEADS),
    "q_b_proj": (0, HEADS),
    "wq_b": (0, HEADS),
    "kv_b_proj": (0, HEADS),
    "wkv_b": (0, HEADS),
    "k_proj": (0, KV_HEADS),
    "wk": (0, KV_HEADS),
    "v_proj": (0, KV_HEADS),
    "wv": (0, KV_HEADS),
    "o_proj": (1, HEADS),
    "wo": (1, HEADS),
    "wo_a": (0, "o_groups"),
    "wo_b": (1, "o_groups"),
}
#: DeepSeek-V4's sparse indexer; V3.2's, under Hugging Face's names, is on every rank.
_INDEXER_V4 = {"wq_b": (0, "index_n_heads"), "weights_proj": (0, "index_n_heads")}
_SINKS = frozenset({"sinks", "attn_sink"})
_OUT_OF_MLP = frozenset({"down_proj", "w2"})

#: Formats without blocks along either axis, offered where blocks forbid a cut.
_WITHOUT_BLOCKS = ("fp8-channel", "int8-channel", "bf16")


def rule_of(weight: StoredWeight, weights: Mapping[str, StoredWeight]) -> Rule:
    """The rule of a tensor, by its name. A bias goes with its layer: cut like the rows it is added
    to, whole on every rank (and added once, after the sum) where the layer is cut by columns."""
    if weight.kind == "bias":
        layer = weights.get(f"{weight.module}.weight")
        rule = WHOLE if layer is None else rule_of(layer, weights)
        return rule if rule.axis == 0 else WHOLE
    if len(weight.shape) == 2 and weight.codec is None:  # a table of something else
        return WHOLE
    components = weight.module.split(".")
    leaf = components[-1]
    if TensorName.parse(weight.name).part in _SINKS:
        return Rule(0, HEADS, "attention")
    if weight.kind in ("embedding", "lm_head"):
        return Rule(0, None, weight.kind)
    if "indexer" in components and "attn" in components and leaf in _INDEXER_V4:
        return Rule(*_INDEXER_V4[leaf], "attention")
    if weight.kind == "attention" and leaf in _ATTENTION:
        return Rule(*_ATTENTION[leaf], "attention")
    if weight.kind == "shared_expert" and "ffn" in components:  # V4: whole, under its own names
        return WHOLE
    if weight.kind in ("dense_mlp", "shared_expert", "routed_expert"):
        return Rule(1 if leaf in _OUT_OF_MLP else 0, None, weight.kind)
    return WHOLE


@dataclass(frozen=True)
class Demand:
    """What cutting the tensors of one kind asks for; `tensor` is the first of them.

    `unit` rows or columns belong to one head; None, and why in `reason`, where that is unknown.
    `heads` is the number of KV heads, which several ranks may share; 0 for all else.
    """

    tensor: str
    shape: tuple[int, ...]
    codec: Codec | None
    rule: Rule
    unit: int | None
    heads: int = 0
    reason: str = ""

    @classmethod
    def of(cls, weight: StoredWeight, rule: Rule, config: Mapping[str, Any]) -> Demand:
        """The demand of a weight whose rule cuts it."""
        assert rule.axis is not None
        extent = weight.shape[rule.axis]
        unit: int | None = 1
        count, reason = 0, ""
        if rule.units is not None:
            found = setting(config, rule.units)
            if found is None and rule.units == KV_HEADS:
                found = setting(config, HEADS)
            count = found if isinstance(found, int) and found > 0 else 0
            unit = extent // count if count and extent % count == 0 else None
            name = AXES[rule.axis]
            reason = f"{unit} {name} belong to one of {count} {rule.units}"
            if unit is None:
                reason = f"config.json has {found} {rule.units}, so heads cannot be told apart"
        wide = (p for p in weight.activations.values() if math.prod(p.spec.shape) > 1)
        if rule.axis == 1 and (part := next(wide, None)) is not None:
            unit, reason = None, f"{part.name} tells of single columns"
        heads = count if rule.units == KV_HEADS else 0
        return cls(weight.name, weight.shape, weight.codec, rule, unit, heads, reason)

    @property
    def axis(self) -> int:
        """0 rows, 1 columns."""
        assert self.rule.axis is not None
        return self.rule.axis

    @property
    def extent(self) -> int:
        """Rows or columns of the whole."""
        return self.shape[self.axis]

    @property
    def alignment(self) -> int | None:
        """Cuts fall on its multiples; None where the format allows none along this axis."""
        if self.codec is None:
            return 1
        return cut_alignment(self.codec, (self.shape[0], self.shape[1]), self.axis)

    def pieces(self, ways: int) -> int:
        """How many different pieces `ways` ranks have: fewer than ranks where these share KV
        heads."""
        return min(ways, self.heads) if self.heads else ways

    def allows(self, ways: int) -> bool:
        """Whether the tensor can be cut for so many ranks."""
        pieces, alignment = self.pieces(ways), self.alignment
        if pieces == 1:
            return True
        if self.unit is None or alignment is None or ways % pieces:
            return False
        return self.extent % (pieces * math.lcm(self.unit, alignment)) == 0

    def problem(self, ways: int) -> str:
        """Why it cannot be cut `ways` ways, with the numbers."""
        name, pieces = AXES[self.axis], self.pieces(ways)
        what = f"{self.tensor} {list(self.shape)}: {self.extent} {name} / {pieces}"
        if ways % pieces:
            return f"{what}: {ways} ranks cannot share {self.heads} KV heads evenly"
        if self.unit is None:
            return f"{what}: {self.reason}"
        if self.extent % (pieces * self.unit):
            each = f"{self.extent / pieces:g} {name} each"
            return f"{what} = {each}: {self.reason or 'no whole number'}"
        assert self.codec is not None
        why = cut_reason(self.codec, (self.shape[0], self.shape[1]), self.axis)
        what += f" = {self.extent // pieces}"
        if self.alignment is None:
            return f"{what}: {format_name(self.codec)} cannot be cut along {name}: {why}"
        return f"{what}, no multiple of {self.alignment} in {format_name(self.codec)}: {why}"

    def in_format(self, codec: Codec) -> Demand | None:
        """The same for the weight in another format; None where that cannot hold it. A bias has
        none."""
        if self.codec is None:
            return self
        try:
            codec.specs(self.shape[0], self.shape[1])
        except FormatError:
            return None
        return dataclasses.replace(self, codec=codec)


def helpful_formats(refused: list[tuple[Demand, int]]) -> list[str]:
    """Formats that would allow each of the demands as many ways: of the same kind with smaller
    groups if there is one, and one without blocks."""
    offers: list[list[Codec]] = [[], [parse_format(name) for name in _WITHOUT_BLOCKS]]
    for codec in dict.fromkeys(demand.codec for demand, _ in refused):
        if isinstance(getattr(codec, "group_size", None), int):
            sizes = (128, 64, 32)
            offers[0] += [dataclasses.replace(codec, group_size=n) for n in sizes]  # type: ignore
    found: list[str] = []
    for codecs in offers:
        for codec in codecs:
            others = [(demand.in_format(codec), ways) for demand, ways in refused]
            if all(other is not None and other.allows(ways) for other, ways in others):
                found.append(format_name(codec))
                break
    return found
