"""The runner computes what transformers computes, for every shape of the family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runner_references import (
    CASES,
    TOLERANCE,
    Reference,
    copy,
    distance,
    edit_config,
    edit_tensors,
)

from requant.quant import parse_format

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]

Build = Callable[[str], Reference]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(reference: Build, name: str, device: str) -> None:
    case = reference(name)
    logits = case.model(device=device).forward(case.ids)
    assert logits.dtype == torch.float32
    assert distance(logits, case.logits) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
def test_prediction_layer_equals_that_of_transformers(reference: Build, device: str) -> None:
    case = reference("mtp")
    model = case.model(device=device)
    assert model.mtp_layers == (3,)
    hidden = model.final_norm(model.hidden(case.ids))
    y = model.layer(3, model.mtp_input(3, case.next_ids, hidden))
    assert distance(model.mtp_logits(3, y), case.mtp_logits) < TOLERANCE
    assert distance(model.forward(case.ids), case.logits) < TOLERANCE


def test_prediction_layer_prefers_its_own_embedding_and_head(
    reference: Build, tmp_path: Path
) -> None:
    case = copy(reference("mtp"), tmp_path)
    model = case.model()
    embedding = model.weights.get("model.embed_tokens.weight")
    head = model.weights.get("lm_head.weight")
    own = {
        "model.layers.3.embed_tokens.weight": 2 * embedding,
        "model.layers.3.shared_head.head.weight": 2 * head,
    }
    edit_tensors(case.path, lambda tensors: tensors | own)
    changed = case.model()
    hidden = torch.randn(1, 4, model.config.hidden_size)
    # The norms of MTP undo a scaled embedding; the head's scale shows.
    assert torch.equal(changed.mtp_logits(3, hidden), 2 * model.mtp_logits(3, hidden))
    assert not torch.equal(
        changed.mtp_input(3, case.ids[:1, :4], hidden), model.mtp_input(3, case.ids[:1, :4], hidden)
    )


def test_layer_by_layer_is_the_same_as_forward(reference: Build) -> None:
    case = reference("v3")
    model = case.model()
    x = model.embed(case.ids)
    for index in range(model.config.num_hidden_layers):
        x = model.layer(index, x)
    assert torch.equal(model.logits(x), model.forward(case.ids))


@pytest.mark.parametrize("form", ["bf16", "fp8-block", "int8-channel"])
def test_stored_format_runs_as_its_decoded_weights(
    reference: Build, tmp_path: Path, form: str
) -> None:
    stored, decoded = (copy(reference("v3"), tmp_path / kind) for kind in ("stored", "decoded"))
    codec = parse_format(form)

    def encode(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = dict(tensors)
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                del parts[name]
                for part, tensor in codec.encode(weight, tuple(weight.shape)).items():
                    parts[name.removesuffix("weight") + part] = tensor.contiguous()
        return parts

    def round_trip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: codec.decode(codec.encode(weight, tuple(weight.shape)), tuple(weight.shape))
            if name.endswith("_proj.weight")
            else weight
            for name, weight in tensors.items()
        }

    edit_tensors(stored.path, encode)
    edit_config(stored.path, quantization_config=codec.config(["lm_head"]))
    edit_tensors(decoded.path, round_trip)
    expected = decoded.model().forward(decoded.ids)
    assert torch.equal(stored.model().forward(stored.ids), expected)
    assert distance(expected, stored.logits) > TOLERANCE


def test_logits_need_no_room_for_a_decoded_embedding_or_head(reference: Build) -> None:
    case = reference("v3-biases-tied")
    streamed = case.model(cache_bytes=0)
    assert distance(streamed.forward(case.ids), case.logits) < TOLERANCE
    assert streamed.weights.cached_bytes == 0
