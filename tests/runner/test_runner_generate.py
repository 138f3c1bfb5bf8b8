"""Generation: greedy is the argmax of full passes, sampling is repeatable, limits are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runner_references import Reference
from tokenizers import Tokenizer, models

from requant.errors import CheckpointError
from requant.runner.generate import generate, pick
from requant.runner.tokenizer import load_tokenizer

Build = Callable[[str], Reference]
PROMPT = [5, 17, 3]


def test_greedy_is_the_argmax_of_full_passes(reference: Build) -> None:
    model = reference("v3").model()
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(model.forward(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, PROMPT, 12)) == ids[3:]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(reference: Build) -> None:
    model = reference("v3").model()
    text = list(generate(model, PROMPT, 12))
    stop = text[7]
    assert list(generate(model, PROMPT, 12, stop_ids=[stop])) == text[: text.index(stop)]


def test_a_seed_gives_the_same_text_whatever_else_draws(reference: Build) -> None:
    model = reference("v3").model()
    first = list(generate(model, PROMPT, 12, temperature=1.0, seed=1))
    torch.manual_seed(99)
    assert list(generate(model, PROMPT, 12, temperature=1.0, seed=1)) == first
    assert list(generate(model, PROMPT, 12, temperature=1.0, seed=2)) != first


def test_draws_follow_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    random = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([pick(logits, 2.0, random) for _ in range(4000)]))
    expected = torch.softmax(logits / 2, dim=-1)
    # Four standard deviations of a share of 4000 draws.
    assert (counts / 4000 - expected).abs().max() < 4 * 0.5 / 4000**0.5
    assert pick(logits, 1e-30, random) == pick(logits, 0.0, random) == 2


def test_limits(reference: Build) -> None:
    model = reference("v3").model()
    with pytest.raises(CheckpointError, match="3 prompt tokens and 126 new ones are 129, more tha"):
        generate(model, PROMPT, 126)
    with pytest.raises(CheckpointError, match="the prompt has no tokens"):
        generate(model, [], 1)
    with pytest.raises(CheckpointError, match="temperature is -1"):
        generate(model, PROMPT, 1, temperature=-1)
    assert list(generate(model, PROMPT, 0)) == []


def test_tokenizer(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert load_tokenizer(tmp_path).encode("b").ids == [1]


@pytest.mark.parametrize("content", [b"{", b'{"a": 1}', b"\xff\xfe\x00", b""])
def test_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer.json: (not a tokenizer|cannot be read)"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file; download it"):
        load_tokenizer(tmp_path)
