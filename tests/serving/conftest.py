"""DeepSeek-V3 as headers only: all of it, and in nine layers of 64 experts."""

from __future__ import annotations

import pytest

from requant.convert.source import Checkpoint
from requant.serving.inventory import Inventory
from tests.convert.sparse import V3, deepseek, write_sparse


@pytest.fixture(scope="package")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    return Inventory.of(write_sparse(tmp_path_factory.mktemp("v3") / "model", V3, deepseek(V3)))


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = V3 | {"num_hidden_layers": 9, "n_routed_experts": 64}
    return write_sparse(tmp_path_factory.mktemp("small") / "model", config, deepseek(config))
