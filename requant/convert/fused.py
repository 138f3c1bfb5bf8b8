"""Fused expert tensors, taken apart: one stored tensor of all experts becomes views of each.

| stored as | gate_up_proj | down_proj | gate and up |
|---|---|---|---|
| transformers 5, fused save | [E, 2I, H] | [E, H, I] | gate's rows, then up's |
| Llama-4 | [E, H, 2I] (in, out) | [E, I, H] | gate's columns, then up's |
| gpt-oss, plain | [E, H, 2I] (in, out) | [E, I, H] | alternating columns |
| gpt-oss, MXFP4 `_blocks`, `_scales` | [E, 2I, H/32, 16] | [E, H, I/32, 16] | alternating rows |

Sources: transformers 5.23.0, models/gpt_oss, models/llama4, integrations/mxfp4.py and
conversion_mapping.py. A view is an offset and strides: nothing is read before its rows are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from requant.convert.header import Location
from requant.convert.names import setting
from requant.errors import CheckpointError
from requant.quant.codec import DTYPE_BITS, TensorSpec
from requant.quant.cutting import Patch

_FUSED = re.compile(
    r"(?P<experts>.*\bexperts)\.(?P<leaf>gate_up_proj|down_proj)"
    r"(?:\.weight)?(?P<part>|_blocks|_scales|_bias|_scale_inv)"
)
#: What follows the leaf in a fused name -> the part's name in a per-expert one.
_PARTS = {
    "": "weight",
    "_blocks": "weight_blocks",
    "_scales": "weight_scales",
    "_scale_inv": "weight_scale_inv",
    "_bias": "bias",
}


class StoredPart(NamedTuple):
    """One stored tensor: its full name, dtype, shape and place.

    `strides` is None for a tensor that lies in one piece. Of a view of a fused tensor it holds the
    bytes from one row to the next and, where rows do not lie in one piece either, from one element
    of a row to the next (else None). `pieces` are those of a tensor that was cut for several ranks;
    its `location` then is that of the first.
    """

    name: str
    spec: TensorSpec
    location: Location
    strides: tuple[int, int | None] | None = None
    pieces: tuple[StoredPiece, ...] = ()


@dataclass(frozen=True)
class StoredPiece:
    """One of the pieces that a stored tensor is joined from.

    `patch`: where its bytes lie in the tensor's; None for one that every rank has as a whole.
    `moved` makes of its bytes what the whole tensor has of them, where they differ.
    """

    location: Location
    patch: Patch | None
    moved: Callable[[torch.Tensor], torch.Tensor] | None = None


def split_experts(
    tensors: Mapping[str, StoredPart], config: Mapping[str, Any]
) -> dict[str, StoredPart]:
    """Replace every fused tensor by one view per expert and projection, under per-expert names."""
    split: dict[str, StoredPart] = {}
    for name, tensor in tensors.items():
        match = _fused(name, tensor.spec)
        if match is None:
            split[name] = tensor
            continue
        if match["part"] == "_scale_inv" and match["leaf"] == "gate_up_proj":
            _require_whole_blocks(name, tensors, config)
        turned = match["part"] == "" and _is_transposed(name, match["leaf"], tensors, config)
        for view in _views(tensor, match["experts"], match["leaf"], match["part"], turned, config):
            if view.name in split or view.name in tensors:
                raise CheckpointError(f"{name}: holds {view.name}, which is also stored by itself")
            split[view.name] = view
    return split


def _fused(name: str, spec: TensorSpec) -> re.Match[str] | None:
    """The name of a fused tensor taken apart; None for any other."""
    dims = len(spec.shape)
    if dims < 3 and not name.endswith("_bias"):  # nearly all
        return None
    match = _FUSED.fullmatch(name)
    if match is None or dims != {"_bias": 2, "_blocks": 4}.get(match["part"], 3):
        return None
    return match if spec.nbytes else None  # no bytes: 2**60 experts at will


def _require_whole_blocks(
    name: str, tensors: Mapping[str, StoredPart], config: Mapping[str, Any]
) -> None:
    """Raise CheckpointError when a block of scales reaches over the end of gate into up."""
    weight = tensors.get(name.removesuffix("_scale_inv"))
    stored = setting(config, "quantization_config")
    block = stored.get("weight_block_size") if isinstance(stored, dict) else None
    side = block[0] if isinstance(block, list) and block else 128
    rows = weight.spec.shape[1] // 2 if weight is not None and len(weight.spec.shape) == 3 else 0
    if isinstance(side, int) and side > 0 and rows % side:  # what else it is, `detect` refuses
        raise CheckpointError(
            f"{name}: has scales for blocks of {side} rows, which do not divide the {rows} "
            "rows of gate and of up, so one block has both"
        )


def _views(
    tensor: StoredPart,
    experts: str,
    leaf: str,
    part: str,
    transposed: bool,
    config: Mapping[str, Any],
) -> Iterator[StoredPart]:
    count, *shape = tensor.spec.shape
    itemsize = DTYPE_BITS[tensor.spec.dtype] // 8
    nbytes = math.prod(shape) * itemsize
    whole = TensorSpec(tensor.spec.dtype, tuple(shape))
    interleaved = part in ("_blocks", "_scales") or setting(config, "model_type") == "gpt_oss"
    for expert in range(count):
        begin = tensor.location.begin + expert * nbytes
        location = tensor.location._replace(begin=begin, end=begin + nbytes)
        one = tensor._replace(name="", spec=whole, location=location)
        if transposed:
            one = _transpose(one, itemsize)
        halves = [("down_proj", one)]
        if leaf == "gate_up_proj":
            gate, up = _halves(one, interleaved, tensor.name)
            halves = [("gate_proj", gate), ("up_proj", up)]
        for projection, view in halves:
            yield view._replace(name=f"{experts}.{expert}.{projection}.{_PARTS[part]}")


def _is_transposed(
    name: str, leaf: str, tensors: Mapping[str, StoredPart], config: Mapping[str, Any]
) -> bool:
    """Whether plain experts are stored [in, out], by where hidden_size stands.

    One of the two tensors may be square, the other is not then.
    """
    hidden: object = setting(config, "hidden_size")
    for other in ("gate_up_proj", "down_proj"):
        beside = tensors.get(other.join(name.rsplit(leaf, 1)))
        shape = beside.spec.shape[1:] if beside is not None else ()
        if len(shape) == 2 and (shape[0] == hidden) != (shape[1] == hidden):
            return (shape[0] == hidden) == (other == "gate_up_proj")
    return False


def _transpose(one: StoredPart, itemsize: int) -> StoredPart:
    """[in, out] seen as [out, in]."""
    rows, cols = one.spec.shape
    spec = replace(one.spec, shape=(cols, rows))
    return one._replace(spec=spec, strides=(itemsize, cols * itemsize))


def _halves(one: StoredPart, interleaved: bool, name: str) -> tuple[StoredPart, StoredPart]:
    """Gate and up of a joint tensor: every other row, or the first and the second half."""
    rows, *rest = one.spec.shape
    if rows % 2:
        raise CheckpointError(f"{name}: {rows} rows do not halve into gate and up")
    itemsize = DTYPE_BITS[one.spec.dtype] // 8
    step, element = one.strides or (math.prod(rest) * itemsize, None)
    spec = replace(one.spec, shape=(rows // 2, *rest))
    shift = step if interleaved else rows // 2 * step
    stride = 2 * step if interleaved else step
    strides = None if one.strides is None and not interleaved else (stride, element)

    def half(offset: int) -> StoredPart:
        begin = one.location.begin + offset
        end = begin + spec.nbytes if strides is None else one.location.end
        return one._replace(
            spec=spec, location=Location(one.location.file, begin, end), strides=strides
        )

    return half(0), half(shift)
