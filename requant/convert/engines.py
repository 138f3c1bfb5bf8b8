"""What engines want beyond what a format can hold: told by `plan`, before a byte is written.

Rules that no engine forgives (a group that does not divide, AWQ's 32 rows, fused layers of two
formats) are errors, raised where the format or the mixture is chosen. These here leave a checkpoint
that is valid, but that some engines do not load, or not on every number of GPUs.

Sources: SGLang 0.5.23, layers/quantization/fp8.py and blockwise_int8.py; vLLM, fp8.py of the same
folder; SGLang models/deepseek_common/deepseek_weight_loader.py (kv_b_proj).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from requant.convert.weights import Kind
from requant.quant import Codec, format_name
from requant.quant.codec import bits_per_weight
from requant.quant.plain import Plain

if TYPE_CHECKING:
    from requant.convert.forms import Form, PlannedWeight

#: Formats whose blocks engines cut weights along, when they split them over GPUs.
_BLOCK_FORMATS = frozenset({"fp8-block", "int8-block"})
#: Cut along the columns, all others along the rows.
_ROW_PARALLEL = frozenset("o_proj down_proj wo wo_b w2".split())
#: model_type -> leaves of experts taken apart that are not among the names its loaders know.
_UNREAD = dict.fromkeys(
    ("gpt_oss", "llama4", "llama4_text", "mixtral", "minimax", "minimax_m2"),
    ("gate_proj", "up_proj", "down_proj"),
)


def engine_notes(
    weights: Mapping[tuple[Kind, Form], Sequence[PlannedWeight]], model_type: object
) -> Iterator[str]:
    """One sentence a rule that is broken, with an example and how often; `weights` by what they
    are and how they are written."""
    broken: dict[str, list[tuple[str, int]]] = {}
    for (kind, form), members in weights.items():
        for rule in _broken(kind, form.codec or kind.codec, str(model_type)):
            broken.setdefault(rule, []).append((members[0].source.name, len(members)))
    for rule, found in broken.items():
        count = sum(number for _, number in found)
        more = f" and {count - 1} more" if count > 1 else ""
        yield f"{found[0][0]}{more}: {rule}"


def _broken(kind: Kind, codec: Codec | None, model_type: str) -> Iterator[str]:
    leaf = kind.leaf
    if kind.purpose == "routed_expert" and leaf in _UNREAD.get(model_type, ()):
        yield (
            f"{model_type}'s fused experts are written one by one; transformers does not read "
            "them so (it warns and leaves experts at random), and not every version of vLLM "
            "and SGLang does"
        )
    if codec is None or isinstance(codec, Plain):
        return
    rows, cols = kind.shape
    if codec.name in _BLOCK_FORMATS:
        height, width = getattr(codec, "block_rows", 1), getattr(codec, "block_cols", 1)
        joined = (kind.fused_set or "").rpartition(".")[2] in ("gate_up", "w13", "qkv", "wqkv")
        if joined and rows % height:
            yield (
                f"vLLM and SGLang join it with its neighbours and need whole blocks: {rows} rows "
                f"are not a multiple of {height}; keep these in bf16, or use a format without "
                "blocks"
            )
        if leaf in _ROW_PARALLEL and cols % width:
            yield (
                f"vLLM and SGLang need whole blocks: {cols} columns are not a multiple of "
                f"{width}; keep these in bf16, or use a format without blocks"
            )
    if leaf in ("kv_b_proj", "wkv_b") and bits_per_weight(codec) < 6:
        yield (
            f"as {format_name(codec)}: engines take MLA's kv_b_proj apart, and SGLang does so in "
            "plain, FP8 or INT8 formats only; keep it in bf16 with a [modules] entry"
        )
