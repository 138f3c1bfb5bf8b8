"""The tensors a model must have, and their shapes: checked from headers, before anything is run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from requant.runner.config import ModelConfig
from requant.runner.ranks import Rank

Shapes = dict[str, tuple[int, ...]]


def mtp_layers(weights: Collection[str], config: ModelConfig) -> tuple[int, ...]:
    """Indices of the multi-token-prediction layers among a model's weights.

    transformers does not save them, but still counts them in the config.
    """
    # Found among the tensors, not by counting up: a hostile config may count to any number.
    names = (name.split(".") for name in weights if name.endswith(".eh_proj.weight"))
    found = sorted(int(n[2]) for n in names if n[:2] == ["model", "layers"] and n[2].isdecimal())
    first = config.num_hidden_layers
    return tuple(i for i in found if first <= i < first + config.num_nextn_predict_layers)


def check_shapes(checkpoint: Checkpoint, config: ModelConfig, rank: Rank) -> None:
    """Raise CheckpointError for a tensor that is missing, misshapen, or unknown in its layer; of a
    rank's tensors, for a piece that is misshapen.

    Stops at the first, so that the work is bounded by the tensors there are.
    """
    known: set[str] = set()
    for shapes in _expected(rank.names, config):
        for name, shape in shapes.items():
            _check_shape(checkpoint, rank, name, shape)
        known.update(shapes)
    layers = {".".join(name.split(".")[:3]) for name in known if name.startswith("model.layers.")}
    for name in rank.names:
        # Old checkpoints store the rotary frequencies, which follow from the config.
        ours = ".".join(name.split(".")[:3]) in layers and not name.endswith(".inv_freq")
        if ours and name not in known:
            raise CheckpointError(
                f"{checkpoint.path}: {name}: a {config.model_type} layer has no such tensor, "
                "so running the model without it would give wrong numbers"
            )


def _expected(names: Collection[str], config: ModelConfig) -> Iterator[Shapes]:
    """All tensors of the model, a few at a time."""
    yield {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
        **_if_present(names, "lm_head.weight", config.vocab_size, config.hidden_size),
    }
    for index in range(config.num_hidden_layers):
        yield from _layer(names, config, f"model.layers.{index}.")
    for index in mtp_layers(names, config):
        yield _mtp(names, config, f"model.layers.{index}.")
        yield from _layer(names, config, f"model.layers.{index}.")


def _check_shape(checkpoint: Checkpoint, rank: Rank, name: str, shape: tuple[int, ...]) -> None:
    if name not in rank.names:
        raise CheckpointError(
            f"{checkpoint.path}: {name}: missing; config.json asks for one of {list(shape)}"
        )
    if name not in checkpoint.weights:  # another rank has it
        return
    axis, start, stop = rank.span(name)
    piece = tuple(stop - start if at == axis else side for at, side in enumerate(shape))
    found = tuple(checkpoint.weights[name].shape)
    if found != piece:
        raise CheckpointError(
            f"{checkpoint.path}: {name}: is {list(found)}, expected {list(piece)} from config.json"
        )


def _if_present(names: Collection[str], name: str, *shape: int) -> Shapes:
    return {name: shape} if name in names else {}


def _linear(names: Collection[str], module: str, rows: int, cols: int) -> Shapes:
    """A projection, and its bias where the checkpoint has one."""
    return {f"{module}.weight": (rows, cols), **_if_present(names, f"{module}.bias", rows)}


def _mlp(names: Collection[str], config: ModelConfig, prefix: str, width: int) -> Shapes:
    return {
        **_linear(names, prefix + "gate_proj", width, config.hidden_size),
        **_linear(names, prefix + "up_proj", width, config.hidden_size),
        **_linear(names, prefix + "down_proj", config.hidden_size, width),
    }


def _layer(names: Collection[str], config: ModelConfig, prefix: str) -> Iterator[Shapes]:
    hidden, mlp = config.hidden_size, prefix + "mlp."
    yield {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
    }
    yield _attention(names, config, prefix + "self_attn.")
    if mlp + "gate.weight" not in names:
        yield _mlp(names, config, mlp, config.intermediate_size)
        return
    bias = mlp + "gate.e_score_correction_bias"
    yield {
        mlp + "gate.weight": (config.n_routed_experts, hidden),
        **_if_present(names, bias, config.n_routed_experts),
    }
    for expert in range(config.n_routed_experts):
        yield _mlp(names, config, f"{mlp}experts.{expert}.", config.moe_intermediate_size)
    shared = mlp + "shared_experts."
    if shared + "gate_proj.weight" in names or config.n_shared_experts:
        width = config.moe_intermediate_size * config.n_shared_experts  # stored as one
        yield _mlp(names, config, shared, width)


def _attention(names: Collection[str], config: ModelConfig, prefix: str) -> Shapes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    q_rows, kv_rows = (
        heads * config.qk_head_dim,
        heads * (config.qk_nope_head_dim + config.v_head_dim),
    )
    shapes: Shapes = {}
    if prefix + "q_a_proj.weight" in names:
        q_rank = config.q_lora_rank or 0
        shapes.update(_linear(names, prefix + "q_a_proj", q_rank, hidden))
        shapes[prefix + "q_a_layernorm.weight"] = (q_rank,)
        shapes.update(_linear(names, prefix + "q_b_proj", q_rows, q_rank))
    else:
        shapes.update(_linear(names, prefix + "q_proj", q_rows, hidden))
    shapes.update(_linear(names, prefix + "kv_a_proj_with_mqa", rank + rope, hidden))
    shapes[prefix + "kv_a_layernorm.weight"] = (rank,)
    # No bias: the absorbed form folds the matrix into queries and outputs.
    shapes[prefix + "kv_b_proj.weight"] = (kv_rows, rank)
    shapes.update(_linear(names, prefix + "o_proj", hidden, heads * config.v_head_dim))
    return shapes


def _mtp(names: Collection[str], config: ModelConfig, prefix: str) -> Shapes:
    hidden, vocabulary = config.hidden_size, config.vocab_size
    return {
        prefix + "enorm.weight": (hidden,),
        prefix + "hnorm.weight": (hidden,),
        **_linear(names, prefix + "eh_proj", hidden, 2 * hidden),
        prefix + "shared_head.norm.weight": (hidden,),
        **_if_present(names, prefix + "shared_head.head.weight", vocabulary, hidden),
        **_if_present(names, prefix + "embed_tokens.weight", vocabulary, hidden),
    }
