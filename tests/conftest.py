"""Checkpoints that many tests read; a test that edits one copies it first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import make_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`source(format)`: the small DeepSeek-style checkpoint in that format. Read only."""

    @functools.cache
    def get(format_text: str) -> Path:
        return make_source(tmp_path_factory.mktemp("source") / "model", format_text)

    return get
