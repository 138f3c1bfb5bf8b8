"""A checkpoint to edit, and a place to write to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def folder(source: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(source("fp8-block"), tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
