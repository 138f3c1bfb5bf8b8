"""What people read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from requant.verify.comparison import verify
from requant.verify.report import render

from .conftest import TEXT, Edit, Tensors


def rendered(verdict: dict[str, Any], width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render(verdict))
    return stream.getvalue()


def test_a_pass_ends_with_its_verdict(source: Path, converted: Callable[[str], Path]) -> None:
    verdict = verify(source, converted("int8-channel"), tokens=128, text=TEXT)
    text = rendered(verdict)
    last = text.strip().splitlines()[-1]
    assert last.startswith("PASS  KL ")
    assert "within the limit of 0.02" in last
    assert "(int8-channel)" in text
    assert f"{100 * verdict['top1_agreement']:.2f} %" in text
    assert f"source {verdict['perplexity_source']:.4g}" in text
    assert "3 (MTP)" in text
    for weight in verdict["tensors"]["worst"]:
        assert weight["name"] in text
    assert text.isascii()


def test_a_fail_lists_its_problems(source: Path, damaged: Callable[[Edit], Path]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.norm.weight"][0] += 1

    verdict = verify(source, damaged(edit), tokens=128, text=TEXT)
    text = rendered(verdict)
    assert text.strip().splitlines()[-1].startswith("FAIL  KL ")
    assert "; 1 problem" in text
    assert "- model.norm.weight: norm was to be kept bit-identical" in text


def test_an_output_that_cannot_be_opened(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[")
    verdict = verify(source, tmp_path, tokens=128, text=TEXT)
    text = rendered(verdict, width=400)
    assert "FAIL  KL was not measured; 1 problem" in text
    assert "cannot be opened" in text
    assert "config.json: not valid JSON" in text


def test_names_survive_a_narrow_terminal(source: Path, converted: Callable[[str], Path]) -> None:
    verdict = verify(source, converted("int8-channel"), tokens=64, text=TEXT)
    squeezed = "".join(rendered(verdict, width=40).split())
    for weight in verdict["tensors"]["worst"]:
        assert weight["name"] in squeezed
