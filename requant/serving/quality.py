"""How much a mixture of formats is expected to cost: one number to rank mixtures by, no more.

A weight's error reaches the output in proportion to how often it is multiplied: every token meets
all of attention, and of the routed experts top_k. So a mixture's damage is the sum over all weights
of elements x uses per token x importance x relative squared error of the format, with the error of
each format measured on normally distributed weights. What is copied or converted without loss costs
nothing. It never grows when a format is replaced by one of less error. What a mixture really costs,
`requant verify` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from requant.convert.kv_cache import top_k
from requant.quant import Codec, format_name
from requant.quant.plain import Plain
from requant.serving.inventory import Inventory, Sized, Stack

#: Relative squared error of normally distributed weights (512 x 4096), by format and the options
#: that change it. The test measures it again.
NOISE: Mapping[str, float] = {
    "fp8-block": 7.0e-4,
    "fp8-channel": 7.0e-4,
    "fp8-tensor": 7.0e-4,
    "mxfp8": 7.0e-4,
    "int8-channel": 7.6e-5,
    "int8-block": 9.0e-5,
    "int4": 1.23e-2,
    "int4[method=mse]": 1.03e-2,
    "int4[group_size=32]": 9.0e-3,
    "int4[group_size=32,method=mse]": 7.5e-3,
    "int4-awq": 1.02e-2,
    "int4-gptq": 1.23e-2,
    "nf4": 8.5e-3,
    "bnb-fp4": 1.49e-2,
    "mxfp4": 1.34e-2,
    "mxfp4[method=mse]": 1.25e-2,
    "nvfp4": 9.0e-3,
    "nvfp4[method=mse]": 6.7e-3,
}
#: BF16's, of weights that were not stored so; what the other two add is less than any format's.
PLAIN_NOISE = 2.8e-6

#: An error in attention, and in shared experts, does more harm than elsewhere: the usual finding of
#: those who choose bits by sensitivity. MTP only guesses tokens that are then checked.
IMPORTANCE: Mapping[str, float] = {"attention": 2.0, "shared_expert": 1.5, "mtp": 0.25}


def noise(codec: Codec) -> float:
    """The relative squared error of a format; of options that are not listed, that without."""
    if isinstance(codec, Plain):
        return PLAIN_NOISE
    name = format_name(codec)
    left, _, options = name.partition("[")
    known = [o for o in options.removesuffix("]").split(",") if o.startswith(("group", "method"))]
    for text in (f"{left}[{','.join(known)}]", left):
        if text in NOISE:
            return NOISE[text]
    return max(NOISE.values())


def uses(inventory: Inventory, stack: Stack) -> float:
    """Of a stack's weights, the share that one token meets."""
    item = stack.item
    if item.prefix is None or item.expert is None:
        return 1.0
    chosen = top_k(inventory.checkpoint.config)
    return min(1.0, chosen / inventory.survey.experts[item.prefix]) if chosen else 1.0


def damage(inventory: Inventory, found: Iterable[Sized]) -> float:
    """What the weights of these stacks cost, in elements of relative error 1 that a token meets."""
    total = 0.0
    for stack, planned, _, _ in found:
        if planned.codec is None or planned.lossless:
            continue
        rows, cols = planned.source.shape
        elements = rows * cols * stack.number * uses(inventory, stack)
        total += elements * IMPORTANCE.get(planned.source.role, 1.0) * noise(planned.codec)
    return total
