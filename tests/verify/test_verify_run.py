"""What `verify` measures, against independent formulas, and what it refuses to ask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError, RequantError
from requant.quant import parse_format
from requant.runner.model import Model
from requant.runner.tokenizer import load_tokenizer
from requant.verify import stream
from requant.verify.comparison import verify
from requant.verify.text import token_sequences

from .conftest import TEXT

INT4 = "int4[group_size=32]"
STABLE_KEYS = {
    "ok", "kl", "top1_agreement", "perplexity_source", "perplexity_output", "tokens", "max_kl",
    "layers", "tensors", "problems",
}  # fmt: skip


def independent_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """Mean over positions of sum p log(p / q), the textbook way."""
    p = torch.softmax(p_logits.double(), -1)
    q = torch.softmax(q_logits.double(), -1)
    return float((p * torch.log(p / q)).sum(-1).mean())


def models(source: Path, output: Path) -> tuple[Model, Model]:
    return Model(Checkpoint.open(source)), Model(Checkpoint.open(output))


def ids_of(source: Path) -> torch.Tensor:
    return token_sequences(load_tokenizer(source), TEXT, 128, 64)


def test_identical_checkpoints_have_a_kl_of_exactly_zero(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    verdict = verify(source, tmp_path / "copy", tokens=128, text=TEXT)
    assert verdict["ok"], verdict["problems"]
    assert verdict["kl"] == 0
    assert verdict["top1_agreement"] == 1
    assert verdict["perplexity_source"] == verdict["perplexity_output"]
    assert verdict["max_kl"] == 1e-5
    assert verdict["mtp"]["kl"] == 0
    assert {entry["relative_error"] for entry in verdict["layers"]} == {0}
    tensors = verdict["tensors"]
    assert tensors["checked"] == tensors["identical"] == len(Checkpoint.open(source).weights)
    assert tensors["worst"] == []


@pytest.mark.parametrize("format_text", [INT4, "int8-channel", "fp8-block", "fp16", "fp32"])
def test_faithful_conversions_pass(
    source: Path, converted: Callable[[str], Path], format_text: str
) -> None:
    verdict = verify(source, converted(format_text), tokens=128, text=TEXT)
    assert verdict["ok"], verdict["problems"]
    kept = "+bf16" if format_text == INT4 else ""  # kv_b_proj, which engines take apart
    assert verdict["format"] == format_text + kept
    assert verdict.keys() >= STABLE_KEYS
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict


def test_an_fp8_source_is_decoded_before_it_is_compared(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    original = converted("fp8-block")
    for format_text in (INT4, "bf16"):
        plan = make_plan(Checkpoint.open(original), default_recipe(format_text))
        convert(plan, tmp_path / format_text, Runtime(torch.device("cpu"), 1))
        verdict = verify(original, tmp_path / format_text, tokens=128, text=TEXT)
        assert verdict["ok"], verdict["problems"]
        assert verdict["kl"] > 0


def test_int4_costs_something_and_stays_within_its_default_limit(
    source: Path, converted: Callable[[str], Path]
) -> None:
    verdict = verify(source, converted(INT4), tokens=128, text=TEXT)
    assert 1e-5 < verdict["kl"] < verdict["max_kl"] == parse_format(INT4).tolerance.max_kl
    worst = verdict["tensors"]["worst"]
    assert len(worst) == 10
    assert worst == sorted(worst, key=lambda entry: entry["sqnr_db"])
    assert 10 < worst[0]["sqnr_db"] < 30


def test_fp32_is_exact(source: Path, converted: Callable[[str], Path]) -> None:
    verdict = verify(source, converted("fp32"), tokens=128, text=TEXT)
    assert verdict["kl"] == 0
    assert verdict["max_kl"] == 1e-5
    tensors = verdict["tensors"]
    assert tensors["exact"] > 0
    assert tensors["exact"] + tensors["identical"] == tensors["checked"]


def test_kl_agreement_and_perplexities_match_independent_formulas(
    source: Path, converted: Callable[[str], Path]
) -> None:
    out = converted(INT4)
    verdict = verify(source, out, tokens=128, text=TEXT)
    ids = ids_of(source)
    p, q = (model.forward(ids) for model in models(source, out))
    # float32 sums in another order: the models see other batch sizes here.
    assert verdict["kl"] == pytest.approx(independent_kl(p, q), rel=1e-4)
    assert verdict["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for logits, key in ((p, "perplexity_source"), (q, "perplexity_output")):
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert verdict[key] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert verdict["tokens"] == 128


def test_layer_errors_are_those_of_each_layer_alone(
    source: Path, converted: Callable[[str], Path]
) -> None:
    out = converted(INT4)
    verdict = verify(source, out, tokens=128, text=TEXT)
    ours, theirs = models(source, out)
    x = ours.embed(ids_of(source))
    for entry in verdict["layers"][:3]:
        y, z = ours.layer(entry["layer"], x), theirs.layer(entry["layer"], x)
        expected = float((z - y).norm() / y.norm())
        assert entry["relative_error"] == pytest.approx(expected, rel=1e-4)
        assert "mtp" not in entry
        x = y


def test_the_mtp_layer_is_run_on_the_sources_hidden_state(
    source: Path, converted: Callable[[str], Path]
) -> None:
    out = converted(INT4)
    verdict = verify(source, out, tokens=128, text=TEXT)
    ours, theirs = models(source, out)
    ids = ids_of(source)
    hidden = ours.final_norm(ours.hidden(ids))[:, :-1]
    y, z = (m.layer(3, m.mtp_input(3, ids[:, 1:], hidden)) for m in (ours, theirs))
    entry = verdict["layers"][3]
    assert (entry["layer"], entry["mtp"]) == (3, True)
    assert entry["relative_error"] == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-4)
    expected = independent_kl(ours.mtp_logits(3, y), theirs.mtp_logits(3, z))
    assert verdict["mtp"]["kl"] == pytest.approx(expected, rel=1e-4)
    assert verdict["mtp"]["tokens"] == 2 * 63


def test_chunks_of_positions_change_nothing(
    source: Path, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verify(source, converted(INT4), tokens=128, text=TEXT)
    monkeypatch.setattr(stream, "_LOGIT_ELEMENTS", 5 * 256)
    monkeypatch.setattr("requant.verify.metrics._CHUNK_ELEMENTS", 2 * 256)
    chunked = verify(source, converted(INT4), tokens=128, text=TEXT)
    for key in ("kl", "perplexity_source", "perplexity_output"):
        assert chunked[key] == pytest.approx(whole[key], rel=1e-5)
    assert chunked["top1_agreement"] == whole["top1_agreement"]


def test_a_verdict_repeats_to_the_bit(source: Path, converted: Callable[[str], Path]) -> None:
    first, second = (verify(source, converted(INT4), tokens=128, text=TEXT) for _ in range(2))
    for verdict in (first, second):
        del verdict["seconds"], verdict["peak_rss_bytes"]
    assert first == second


def test_a_limit_of_ones_own_decides(source: Path, converted: Callable[[str], Path]) -> None:
    out = converted(INT4)
    kl = verify(source, out, tokens=128, text=TEXT)["kl"]
    assert verify(source, out, tokens=128, text=TEXT, max_kl=kl * 10)["ok"]
    tight = verify(source, out, tokens=128, text=TEXT, max_kl=kl / 2)
    assert not tight["ok"]
    assert tight["max_kl"] == kl / 2
    assert any("over the limit" in problem for problem in tight["problems"])


def test_progress_ends_at_the_sources_bytes(source: Path, converted: Callable[[str], Path]) -> None:
    told: list[int] = []
    verify(source, converted(INT4), tokens=64, text=TEXT, progress=told.append)
    assert sum(told) == Checkpoint.open(source).nbytes


def test_a_source_that_contradicts_its_config_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "vocab_size": 255}))
    with pytest.raises(CheckpointError, match="expected \\[255, 64\\]"):
        verify(tmp_path / "copy", source, tokens=64, text=TEXT)


def test_too_short_a_text_is_refused_with_both_numbers(source: Path) -> None:
    with pytest.raises(RequantError, match="the text has 5 tokens, 64 are needed"):
        verify(source, source, tokens=64, text="short")


def test_an_unknown_model_is_refused_in_the_runners_words(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((source / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="model_type is 'mamba'"):
        verify(other, source, tokens=64, text=TEXT)


def test_absent_folders_are_errors_not_verdicts(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(source, tmp_path / "absent", tokens=64, text=TEXT)
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "absent", source, tokens=64, text=TEXT)


@pytest.mark.parametrize(
    ("tokens", "positions", "shape"),
    [(128, 64, (2, 64)), (64, 4096, (1, 64)), (65, 64, (2, 33)), (2, 64, (1, 2))],
)
def test_sequences_are_equally_long_and_enough(
    source: Path, tokens: int, positions: int, shape: tuple[int, int]
) -> None:
    ids = token_sequences(load_tokenizer(source), TEXT, tokens, positions)
    assert ids.shape == shape
    expected = load_tokenizer(source).encode(TEXT).ids[: ids.numel()]
    assert ids.flatten().tolist() == expected


def test_the_default_is_four_sequences_of_512(source: Path) -> None:
    ids = token_sequences(load_tokenizer(source), TEXT * 10, 2048, 163840)
    assert ids.shape == (4, 512)
