"""The Hub that uploads go to, and how long anybody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import WRITER, HubServer, reached


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A server that this process reaches, with a token that may write."""
    (tmp_path / "home").mkdir()
    with HubServer() as server, reached(server, tmp_path / "home"):
        (tmp_path / "home" / "token").write_text(WRITER)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What anybody would have waited, in seconds."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited
