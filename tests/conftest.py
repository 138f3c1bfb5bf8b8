"""What all tests share. A test that edits a checkpoint copies it first."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import make_source


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster, and sums reproducible, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C reaches the processes that tests start, though whoever started us ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`source(format)`: the small DeepSeek-style checkpoint in that format. Read only."""

    @functools.cache
    def get(format_text: str) -> Path:
        return make_source(tmp_path_factory.mktemp("source") / "model", format_text)

    return get


@pytest.fixture
def folder(source: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to edit."""
    return shutil.copytree(source("fp8-block"), tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A place to write to."""
    return tmp_path / "out"
