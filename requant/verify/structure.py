"""What can be compared without weight data: names, shapes, config.json, tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from requant.convert.names import LINEAR_ROLES
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight
from requant.errors import CheckpointError
from requant.quant import format_name
from requant.quant.plain import Plain
from requant.runner.config import ModelConfig
from requant.runner.tokenizer import TOKENIZER_NAME

#: What loaders go by, beside the numbers that the runner computes with.
_LOADER_KEYS = ("architectures", "tie_word_embeddings", "num_nextn_predict_layers")


@dataclass(frozen=True)
class Structure:
    """`comparable`: weights that both hold in the same shape. `runnable`: all that the output needs
    for a forward pass of the main model is there."""

    comparable: frozenset[str]
    runnable: bool
    problems: tuple[str, ...]


def check_structure(source: Checkpoint, output: Checkpoint) -> Structure:
    """Compare everything but the weights' values."""
    missing = [w for name, w in source.weights.items() if name not in output.weights]
    misshapen = [
        (w, output.weights[name].shape)
        for name, w in source.weights.items()
        if name in output.weights and output.weights[name].shape != w.shape
    ]
    extra = [w for name, w in output.weights.items() if name not in source.weights]
    broken = {w.name for w in (*missing, *(w for w, _ in misshapen))}
    problems = [
        *(f"{w.name}: missing in the output; {_stored(w)} in the source" for w in missing),
        *(
            f"{w.name}: is {list(shape)} in the output, {list(w.shape)} in the source"
            for w, shape in misshapen
        ),
        *(f"{w.name}: {_stored(w)} in the output, missing in the source" for w in extra),
        *_config_problems(source, output),
        *_tokenizer_problems(source, output),
    ]
    runnable = all(source.weights[name].role == "mtp" for name in broken)
    return Structure(frozenset(source.weights.keys() - broken), runnable, tuple(problems))


def linear_formats(checkpoint: Checkpoint) -> dict[str, int]:
    """Stored bytes by format of the linear layers, most first."""
    sizes: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        if weight.codec and weight.kind in LINEAR_ROLES:
            name = format_name(weight.codec)
            sizes[name] = sizes.get(name, 0) + weight.nbytes
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _stored(weight: StoredWeight) -> str:
    return f"{weight.format} {list(weight.shape)}"


def _config_problems(source: Checkpoint, output: Checkpoint) -> Iterator[str]:
    for key in _LOADER_KEYS:
        # Null, false and absent mean the same to loaders; writers choose freely among them.
        ours, theirs = source.config.get(key) or None, output.config.get(key) or None
        if ours != theirs:
            yield _changed(key, theirs, ours)
    try:
        theirs_read = ModelConfig.from_config(output.config)
    except CheckpointError as error:
        yield f"output: {error}"
    else:
        ours_read = ModelConfig.from_config(source.config)
        for field in dataclasses.fields(ModelConfig):
            ours, theirs = getattr(ours_read, field.name), getattr(theirs_read, field.name)
            if ours != theirs and field.name not in _LOADER_KEYS:
                yield _changed(field.name, theirs, ours)
    yield from _quantization_problems(output)


def _changed(key: str, output: Any, source: Any) -> str:
    return f"config.json: {key} is {output!r} in the output, {source!r} in the source"


def _quantization_problems(output: Checkpoint) -> Iterator[str]:
    """Whether config.json declares what the weights are stored in: loaders believe it blindly."""
    quantized = {
        weight.codec: weight.name
        for weight in output.weights.values()
        if weight.codec and not isinstance(weight.codec, Plain)
    }
    declared = (output.quantization_config or {}).get("quant_method")
    for codec, name in quantized.items():
        if declared != codec.quant_method:
            yield (
                f"config.json: quant_method is {declared!r}, but {name} is {format_name(codec)}, "
                f"which loaders know as {codec.quant_method!r}"
            )
    if declared is not None and not quantized:
        yield f"config.json: quant_method is {declared!r}, but every weight is in plain floats"


def _tokenizer_problems(source: Checkpoint, output: Checkpoint) -> Iterator[str]:
    ours, theirs = source.path / TOKENIZER_NAME, output.path / TOKENIZER_NAME
    if not theirs.is_file():
        yield f"{TOKENIZER_NAME}: missing in the output; copy it from the source"
        return
    a, b = ours.read_bytes(), theirs.read_bytes()
    if a == b:
        return
    try:
        left, right = json.loads(a), json.loads(b)
    except ValueError as error:
        yield f"{TOKENIZER_NAME}: not valid JSON in the output: {error}"
        return
    if left == right:
        return
    keys = sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))
    yield (
        f"{TOKENIZER_NAME}: differs from the source's in {', '.join(keys)} "
        f"({len(b)} bytes, {len(a)} in the source); copy the source's"
    )
