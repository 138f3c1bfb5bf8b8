"""References are built once per session; a test that edits one copies its folder first."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from runner_references import Reference, build, build_mtp


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """The reference of a case, built when first asked for."""

    @functools.cache
    def get(name: str) -> Reference:
        path = tmp_path_factory.mktemp(name)
        return build_mtp(path) if name == "mtp" else build(name, path)

    return get
