"""Memory of one GPU beside the weights: KV cache, activations, reserve.

Assumed: tensor parallelism as vLLM has it. A rank holds its share of the KV heads, or one of them
where there are fewer than ranks; MLA's latent belongs to no head, so every rank has all of it.
Where experts are spread over more ranks than attention is cut (ep > tp), attention is repeated, and
each copy serves its own part of the sequences. Stages (pp) hold the cache of their own layers.

Activations are an estimate, of tensors that are alive at a time in one layer (see
`activation_bytes`). Source for what is allocated when: vLLM, its profiling run and
model_executor/layers/fused_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from requant.convert.kv_cache import cache_bytes, count, head_sizes, top_k
from requant.convert.names import language_config
from requant.convert.parallel import Parallel
from requant.errors import CheckpointError

#: Tokens of a step: vLLM's max_num_batched_tokens when it serves, on GPUs of at least 70 GB and on
#: smaller ones. Long prompts are prefilled in chunks of so many.
CHUNK_TOKENS, SMALL_CHUNK_TOKENS, LARGE_GPU_BYTES = 8192, 2048, 70 * 10**9
#: Of a GPU's memory what an engine takes: vLLM's and SGLang's defaults are around 0.9 of what the
#: driver reports, which is up to 7 % more than the 10^9 bytes a GB that are counted here.
UTILISATION = 0.95
#: CUDA context, NCCL's buffers and captured CUDA graphs.
CONTEXT_BYTES = 10**9
#: Activations are 16-bit, logits are kept in 16 and in 32 bits.
_ELEMENT, _LOGIT = 2, 6


class Demand(NamedTuple):
    """What is to be served: `batch` sequences of `context` tokens at a time."""

    context: int
    batch: int = 1
    kv_bytes: float = 2.0


def number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of these settings of the language model that is a number; 0 for none."""
    return count(language_config(config), *keys) or 0


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens that the model was made for, if the config tells."""
    return number(config, "max_position_embeddings") or None


def sequences(demand: Demand, parallel: Parallel) -> int:
    """Sequences that one rank serves: all, or its part where attention is repeated."""
    return -(-demand.batch // (parallel.stage_size // parallel.tp))


def kv_cache_bytes(config: Mapping[str, Any], demand: Demand, parallel: Parallel) -> int:
    """KV cache of a rank in bytes. Raises CheckpointError where the config does not tell."""
    whole = cache_bytes(config, demand.context, demand.kv_bytes)
    if whole is None:
        raise CheckpointError(
            "config.json: does not tell the size of the KV cache (num_hidden_layers, hidden_size "
            "and num_attention_heads, or kv_lora_rank); complete it"
        )
    if not number(config, "kv_lora_rank"):
        heads = number(config, "num_key_value_heads", "num_attention_heads") or 1
        whole = -(-whole * -(-heads // parallel.tp) // heads)
    if parallel.pp > 1:
        layers = number(config, "num_hidden_layers")
        whole = -(-whole * -(-layers // parallel.pp) // layers)
    return whole * sequences(demand, parallel)


def activation_bytes(
    config: Mapping[str, Any], demand: Demand, parallel: Parallel, gpu_bytes: int
) -> int:
    """Activations of a rank in bytes, at the peak of one step of T tokens and S sequences:

    3 T hidden (residual, normed, output), and the most of
    - attention: T heads / tp times queries, keys, values and output,
    - dense MLP: 3 T intermediate / tp (gate, up, product),
    - routed experts: T top_k (hidden + 3 intermediate / cuts of an expert),
    each of 2 bytes, and logits of 6 bytes for each sequence and word.
    """
    chunk = CHUNK_TOKENS if gpu_bytes >= LARGE_GPU_BYTES else SMALL_CHUNK_TOKENS
    rows = sequences(demand, parallel)
    tokens = min(chunk, rows * demand.context)
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    attention = -(-heads // parallel.tp) * 2 * sum(head_sizes(config) or (0, 0))
    dense = 3 * -(-number(config, "intermediate_size") // parallel.tp)
    expert = -(-number(config, "moe_intermediate_size") // parallel.expert_cut)
    routed = (top_k(config) or 0) * (hidden + 3 * expert) if expert else 0
    peak = tokens * (3 * hidden + max(attention, dense, routed)) * _ELEMENT
    return peak + rows * number(config, "vocab_size") * _LOGIT


def reserve_bytes(gpu_bytes: int) -> int:
    """What is left to the driver and the engine itself."""
    return gpu_bytes - int(gpu_bytes * UTILISATION) + CONTEXT_BYTES
