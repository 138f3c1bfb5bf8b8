"""Weights are decoded when asked for, kept within bounds, and checked from headers first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runner_references import Reference, copy, edit_config, edit_tensors

from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from requant.runner import weights as weights_module
from requant.runner.weights import Weights

Build = Callable[[str], Reference]
Tensors = dict[str, torch.Tensor]

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"


def test_cache_keeps_the_most_recently_used(reference: Build) -> None:
    checkpoint = Checkpoint.open(reference("v3").path)
    experts = [f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in range(5)]
    room = 4 * (4 * 18 * 36)
    weights = Weights(checkpoint, cache_bytes=room)
    kept = [weights.get(name) for name in experts[:4]]
    assert weights.cached_bytes == room
    assert weights.get(experts[0]) is kept[0]
    weights.get(experts[4])  # in the place of 1, the least recently used
    assert [weights.get(experts[e]) is kept[e] for e in (0, 2, 3)] == [True] * 3
    assert weights.get(experts[1]) is not kept[1]
    assert weights.cached_bytes == room


def test_a_tensor_above_a_quarter_of_the_cache_evicts_nothing(reference: Build) -> None:
    weights = Weights(Checkpoint.open(reference("v3").path), cache_bytes=4 * (4 * 36))
    norm = weights.get(NORM)
    assert weights.get(HEAD).shape == (97, 36)
    assert weights.get(NORM) is norm
    assert weights.cached_bytes == norm.nbytes


def test_tiles_make_the_same_product(reference: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(reference("v3-biases-tied").path)
    monkeypatch.setattr(weights_module, "_TILE_ELEMENTS", 36 * 5)
    x = torch.randn(2, 3, 36)
    module = "model.layers.0.self_attn.q_a_proj"  # has a bias
    whole, tiled = (Weights(checkpoint, "cpu", room).linear(module, x) for room in (1 << 20, 0))
    torch.testing.assert_close(tiled, whole)


def test_rows_of_a_streamed_embedding(reference: Build) -> None:
    checkpoint = Checkpoint.open(reference("v3").path)
    ids = torch.tensor([[96, 0, 5], [5, 5, 95]])
    kept, streamed = Weights(checkpoint), Weights(checkpoint, cache_bytes=0)
    assert torch.equal(streamed.rows(EMBEDDING, ids), kept.rows(EMBEDDING, ids))
    assert torch.equal(kept.rows(EMBEDDING, ids), kept.get(EMBEDDING)[ids])


def test_unknown_tensor(reference: Build) -> None:
    weights = Weights(Checkpoint.open(reference("v3").path))
    assert weights.has(HEAD)
    assert not weights.has("model.nothing.weight")
    with pytest.raises(CheckpointError, match="has no tensor model.nothing.weight"):
        weights.get("model.nothing.weight")


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    "name",
    [
        NORM,
        EMBEDDING,
        "model.layers.1.mlp.experts.11.up_proj.weight",
        "model.layers.2.mlp.shared_experts.down_proj.weight",
        "model.layers.2.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ],
)
def test_missing_tensor_is_refused_at_once(reference: Build, tmp_path: Path, name: str) -> None:
    case = copy(reference("v3"), tmp_path)
    edit_tensors(case.path, without(name))
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        case.model()


def test_misshapen_tensor_names_both_shapes(reference: Build, tmp_path: Path) -> None:
    case = copy(reference("v3"), tmp_path)
    edit_tensors(case.path, lambda tensors: tensors | {Q_A: torch.zeros(22, 35)})
    with pytest.raises(CheckpointError, match=r"q_a_proj.weight: is \[22, 35\], expected \[22, 36"):
        case.model()


def test_unknown_tensor_in_a_layer_is_refused(reference: Build, tmp_path: Path) -> None:
    case = copy(reference("v3"), tmp_path)
    extra = "model.layers.1.self_attn.indexer.wk.weight"
    edit_tensors(case.path, lambda tensors: tensors | {extra: torch.zeros(4, 36)})
    with pytest.raises(CheckpointError, match="a deepseek_v3 layer has no such tensor"):
        case.model()


def test_stored_rotary_frequencies_are_no_trouble(reference: Build, tmp_path: Path) -> None:
    case = copy(reference("v3"), tmp_path)
    extra = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(case.path, lambda tensors: tensors | {extra: torch.zeros(3)})
    assert case.model().forward(case.ids).shape == case.logits.shape


def test_prediction_layer_of_the_config_may_be_absent(reference: Build, tmp_path: Path) -> None:
    case = copy(reference("v3"), tmp_path)
    edit_config(case.path, num_nextn_predict_layers=1)
    model = case.model()
    assert model.mtp_layers == ()
    with pytest.raises(CheckpointError, match="has no layer 3; it has layers 0 to 2 and 0 pred"):
        model.layer(3, torch.zeros(1, 1, 36))


@pytest.mark.parametrize("token", [-1, 97])
def test_token_outside_the_vocabulary(reference: Build, token: int) -> None:
    with pytest.raises(CheckpointError, match=f"token {token} is outside its vocabulary of 97"):
        reference("v3").model().forward(torch.tensor([[3, token]]))


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("num_hidden_layers", r"layers.3.input_layernorm.weight: missing"),
        ("n_routed_experts", r"mlp.gate.weight: is \[12, 36\], expected \[4000000000000, 36\]"),
    ],
)
def test_an_absurd_count_is_refused_at_once(
    reference: Build, tmp_path: Path, key: str, missing: str
) -> None:
    case = copy(reference("v3"), tmp_path)
    edit_config(case.path, **{key: 4 * 10**12, "num_nextn_predict_layers": 10**12})
    with pytest.raises(CheckpointError, match=missing):
        case.model()
