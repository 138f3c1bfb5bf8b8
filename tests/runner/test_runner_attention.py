"""The two forms of MLA agree, with and without a cache, whatever is done at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from runner_references import Reference, distance, sizes

from requant.runner import attention
from requant.runner.attention import use_absorbed
from requant.runner.cache import LatentCache

Build = Callable[[str], Reference]

#: Other shapes of the same products: sums in another order, some 1e-6 of the largest logit.
AGREEMENT = 1e-5

#: The attention of DeepSeek-V3.
V3_SIZES = {
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.mark.parametrize("name", ["v3", "v2-lite"])
def test_absorbed_equals_expanded(reference: Build, name: str) -> None:
    case = reference(name)
    expanded = case.model(attention="expanded").forward(case.ids)
    absorbed = case.model(attention="absorbed").forward(case.ids)
    assert not torch.equal(absorbed, expanded)
    assert distance(absorbed, expanded) < AGREEMENT


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("steps", [[1] * 48, [20, 27, 1], [47, 1]], ids=["1x48", "20+27+1", "47+1"])
def test_cached_decoding_equals_one_pass(reference: Build, form: str, steps: list[int]) -> None:
    case = reference("v3")
    model = case.model(attention=form)
    cache = model.new_cache()
    pieces = [model.forward(ids, cache) for ids in case.ids.split(steps, dim=1)]
    assert distance(torch.cat(pieces, dim=1), case.logits) < AGREEMENT
    assert cache.length(0) == cache.length(2) == 48
    assert cache.length(3) == 0


def test_prediction_layer_decodes_with_its_own_cache(reference: Build) -> None:
    case = reference("mtp")
    model = case.model()
    z = model.mtp_input(3, case.next_ids, model.final_norm(model.hidden(case.ids)))
    cache = model.new_cache()
    pieces = [model.layer(3, piece, cache) for piece in z.split([30, 1, 17], dim=1)]
    logits = model.mtp_logits(3, torch.cat(pieces, dim=1))
    assert distance(logits, case.mtp_logits) < AGREEMENT


def test_cropped_cache_goes_on_from_there(reference: Build) -> None:
    case = reference("v3")
    model = case.model()
    cache = model.new_cache()
    model.forward(case.ids[:, :30], cache)
    cache.crop(25)
    rest = model.forward(case.ids[:, 25:], cache)
    assert distance(rest, case.logits[:, 25:]) < AGREEMENT


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_long_inputs_go_in_runs_of_queries(
    reference: Build, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    case = reference("v3")
    model = case.model(attention=form)
    whole = model.forward(case.ids)
    monkeypatch.setattr(attention, "_SCORE_ELEMENTS", 7 * 2 * 3 * 48)  # 7 of 48 queries at a time
    assert distance(model.forward(case.ids), whole) < AGREEMENT


def test_attention_by_eye() -> None:
    """Equal keys: every query takes the mean of the values it may see."""
    q, k = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4)
    v = torch.tensor([[[[1.0], [3.0], [8.0]]]])
    assert attention.attend_causally(q, k, v, 0.5).flatten().tolist() == [2.0, 4.0]


def test_decoding_is_absorbed_and_prefill_expanded() -> None:
    config = sizes(**V3_SIZES)
    assert use_absorbed(config, new=1, total=1000)
    assert use_absorbed(config, new=100, total=4096)
    assert not use_absorbed(config, new=200, total=4096)
    assert not use_absorbed(config, new=4096, total=4096)


def test_cache_holds_576_numbers_per_token_and_layer() -> None:
    cache = LatentCache()
    width = V3_SIZES["kv_lora_rank"] + V3_SIZES["qk_rope_head_dim"]
    cache.append(0, torch.zeros(1, 5, width))
    assert cache.append(0, torch.ones(1, 2, width)).shape == (1, 7, 576)
    assert (cache.length(0), cache.length(1)) == (7, 0)
