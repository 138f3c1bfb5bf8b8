"""What a tensor's name says: layer, module, expert, part, and the role of the weight.

Names are split into dotted components once and compared as whole components, never as substrings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from requant.quant import ACTIVATION_PARTS, PART_NAMES

Role = Literal[
    "embedding",
    "lm_head",
    "norm",
    "bias",
    "router",
    "router_bias",
    "attention",
    "dense_mlp",
    "shared_expert",
    "routed_expert",
    "mtp",
    "other",
]
ROLES: tuple[Role, ...] = get_args(Role)

#: The roles whose weights are linear layers that formats are made for.
LINEAR_ROLES: frozenset[Role] = frozenset(
    {"attention", "dense_mlp", "shared_expert", "routed_expert"}
)

#: Of Hugging Face's names, and of DeepSeek's own (V4 is published under those).
_ATTENTION = frozenset(
    "q_proj k_proj v_proj o_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj "
    "wq wk wv wo wq_a wq_b wkv wkv_a wkv_b wo_a wo_b".split()
)
#: Inside attention, and not its projections: DeepSeek's sparse indexer and key compressor.
_BESIDE_ATTENTION = frozenset({"indexer", "compressor"})
_MLP = frozenset("gate_proj up_proj down_proj w1 w2 w3".split())
_EMBEDDINGS = frozenset("embed_tokens embed wte".split())
#: Parts of multimodal models that are not the language model, whatever their leaves are called.
_TOWERS = frozenset(
    "vision_tower vision_model visual audio_tower mm_projector multi_modal_projector".split()
)
#: The part names that lead to a weight.
_OF_WEIGHTS = PART_NAMES | ACTIVATION_PARTS
#: A number between dots, such as a layer or expert can have.
_NUMBER = re.compile(r"\.([0-9]{1,9})(?=\.)")
_HEADS = frozenset("lm_head head".split())
_ROUTERS = frozenset("gate router shared_expert_gate".split())

#: Layers that engines run as one matrix product, which must therefore share one format and, in
#: NVFP4, one global scale: leaf -> name of its set.
_FUSED = {
    leaf: name
    for name, leaves in {
        "qkv": "q_proj k_proj v_proj",
        "wqkv": "wq wk wv",
        "qkv_a": "q_a_proj kv_a_proj_with_mqa",
        "wqkv_a": "wq_a wkv_a wkv",
        "gate_up": "gate_proj up_proj",
        "w13": "w1 w3",
    }.items()
    for leaf in leaves.split()
}


@dataclass(frozen=True)
class TensorName:
    """`model.layers.3.mlp.experts.7.up_proj.weight_scale_inv`, taken apart.

    `module` is everything before the part; `layer` and `expert` are None where there is none.
    """

    module: str
    part: str
    layer: int | None
    expert: int | None

    @classmethod
    def parse(cls, name: str) -> TensorName:
        """Take a stored tensor's name apart."""
        module, part = split_part(name)
        components = module.split(".")
        return cls(module, part, _number(components, "layers"), _number(components, "experts"))

    @property
    def weight(self) -> str:
        """The canonical name of the weight this part belongs to: `<module>.weight`, or itself."""
        return weight_of(self.module, self.part)


def split_part(name: str) -> tuple[str, str]:
    """A stored tensor's name -> the module's and the part's."""
    module, _, part = name.rpartition(".")
    if part not in PART_NAMES and ".weight." in name:  # bitsandbytes: `weight.absmax`, ...
        owner, _, tail = name.rpartition(".weight.")
        if f"weight.{tail}" in PART_NAMES:
            return owner, f"weight.{tail}"
    return module, part


def weight_of(module: str, part: str) -> str:
    """The canonical name of the weight that a part of a module belongs to."""
    part = "weight" if part in _OF_WEIGHTS else part
    return f"{module}.{part}" if module else part


def split_numbers(name: str) -> tuple[tuple[str, ...], list[str]]:
    """What is around the numbers in a name, and the numbers, as text. Those that are the first or
    the last component count as text."""
    pieces = _NUMBER.split(name)
    return tuple(pieces[::2]), pieces[1::2]


def layer_at(around: tuple[str, ...]) -> int | None:
    """Which of the numbers, by what is around them, is that of a layer."""
    layers = (i for i, text in enumerate(around[:-1]) if f".{text}".endswith(".layers"))
    return next(layers, None)


def zeroed(name: str) -> str:
    """The name with 0 for those numbers: the same for names that differ in nothing else."""
    return _NUMBER.sub(".0", name)


def kind_of(name: str, shape: tuple[int, ...]) -> Role:
    """What a weight is for by its own name, wherever it lies (an MTP layer has every kind)."""
    parsed = TensorName.parse(name)
    components = parsed.module.split(".")
    leaf = components[-1]
    if parsed.part == "e_score_correction_bias" or (leaf in _ROUTERS and parsed.part == "bias"):
        return "router_bias"
    if parsed.part == "tid2eid":  # DeepSeek-V4's first layers route by token
        return "router"
    if len(shape) <= 1:
        return "bias" if parsed.part == "bias" else "norm"
    if parsed.part != "weight" or len(shape) != 2:
        return "other"
    if _TOWERS & set(components):
        return "other"
    if leaf in _EMBEDDINGS:
        return "embedding"
    if leaf in _HEADS:
        return "lm_head"
    if leaf in _ROUTERS:
        return "router"
    if leaf in _ATTENTION and not _BESIDE_ATTENTION & set(components):
        return "attention"
    if leaf in _MLP:
        if parsed.expert is not None:
            return "routed_expert"
        shared = {"shared_experts", "shared_expert"} & set(components)
        return "shared_expert" if shared else "dense_mlp"
    return "other"


def fused_set(name: str) -> str | None:
    """What identifies the layers that engines fuse with this one; None when it stands alone."""
    prefix, _, leaf = TensorName.parse(name).module.rpartition(".")
    return f"{prefix}.{_FUSED[leaf]}" if leaf in _FUSED else None


def role_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Role:
    """The role: `mtp` for everything in a multi-token-prediction layer, else its kind."""
    if is_mtp(name, config):
        return "mtp"
    return kind_of(name, shape)


def is_mtp(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor lies in the layers counted by num_nextn_predict_layers, or under `mtp.`."""
    parsed = TensorName.parse(name)
    if "mtp" in parsed.module.split("."):
        return True
    return parsed.layer is not None and parsed.layer in mtp_layers(config)


def mtp_layers(config: Mapping[str, Any]) -> range:
    """The numbers of the layers that num_nextn_predict_layers counts."""
    count = setting(config, "num_nextn_predict_layers") or 0
    layers = setting(config, "num_hidden_layers")
    if not isinstance(layers, int) or not isinstance(count, int):
        return range(0)
    return range(layers, layers + count)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the language model's own part, which multimodal ones nest, counting first."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A value of the language model's config, or None."""
    return language_config(config).get(key)


def in_tower(name: str) -> bool:
    """Whether a tensor lies in a part of a multimodal model that is not the language model."""
    return not _TOWERS.isdisjoint(TensorName.parse(name).module.split("."))


def is_index(component: str) -> bool:
    """Whether a component is a number that a layer or expert can have."""
    return component.isascii() and component.isdecimal() and len(component) < 10


def _number(components: list[str], after: str) -> int | None:
    """The integer component that follows `after`, as in layers.3 or experts.7."""
    place = -1
    while after in components[place + 1 : -1]:
        place = components.index(after, place + 1)
        if is_index(components[place + 1]):
            return int(components[place + 1])
    return None
