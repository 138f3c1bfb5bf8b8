"""Where experts lie, worked out by hand, and how fast they can be read."""

from __future__ import annotations

import pytest

from requant.convert.parallel import Parallel
from requant.errors import RequantError
from requant.serving.hardware import Gpus
from requant.serving.offload import (
    DISK_BANDWIDTH,
    RAM_BANDWIDTH,
    RAM_RESERVE,
    Experts,
    Resident,
    offload,
)

#: Two layers of four experts of 100 bytes, of which a token visits one in each layer.
EXPERTS = Experts({"model.layers.0.mlp.experts": 4, "model.layers.1.mlp.experts": 4}, 1, 100.0)
ONE = Parallel(1, 1)
GPU = Gpus(1, 1000, "some", "ada", bandwidth=1e6, host_bandwidth=1e6)


def test_experts_lie_on_gpu_ram_and_disk_in_this_order() -> None:
    found = offload(750, Resident(400, 300), EXPERTS, GPU, ONE, RAM_RESERVE + 250)
    assert (found["gpu_experts"], found["ram_experts"], found["disk_experts"]) == (3, 2, 3)
    assert (found["ram_bytes"], found["disk_bytes"]) == (200, 300)
    # Each is visited by a quarter of the tokens: 25 bytes a token.
    assert found["bus_bytes_per_token"] == 125 and found["disk_bytes_per_token"] == 75
    assert found["hot_share"] == 3 / 8
    seconds = (300 + 75) / 1e6 + 50 / RAM_BANDWIDTH + 75 / DISK_BANDWIDTH
    assert found["tokens_per_second_bound"] == round(1 / seconds, 3)
    assert found["ram_experts_run_on"] == "cpu"


def test_the_experts_chosen_most_are_the_ones_on_the_gpu() -> None:
    loads = {"0": [0.0, 1.0, 0.0, 0.0], "1": [1.0, 1.0, 1.0, 5.0]}
    found = offload(600, Resident(400, 300), EXPERTS, GPU, ONE, None, loads)
    assert found["gpu_experts"] == 2 and found["disk_experts"] == 0
    assert found["bus_bytes_per_token"] == round(100 * 3 / 8)  # of layer 1 three of eight visits
    with pytest.raises(RequantError, match="no counts for the 4 experts of model.layers.1"):
        offload(600, Resident(400, 300), EXPERTS, GPU, ONE, None, {"0": [1.0] * 4})
    with pytest.raises(RequantError, match="3 counts for the 4 experts"):
        offload(600, Resident(400, 300), EXPERTS, GPU, ONE, None, {None: [1.0] * 3})


def test_gpus_share_experts_and_links() -> None:
    wide = Gpus(2, 1000, "some", "hopper", bandwidth=1e6, host_bandwidth=60e9)
    found = offload(650, Resident(400, 300), EXPERTS, wide, Parallel(2, 2))
    assert found["gpu_experts"] == 4  # two on each
    assert found["ram_experts_run_on"] == "gpu"
    seconds = (300 + 100 / 2) / 1e6 + 100 / (2 * 0.8 * 60e9)
    assert found["tokens_per_second_bound"] == round(1 / seconds, 3)
    cut = offload(650, Resident(400, 300), EXPERTS, wide, Parallel(2, 1))  # each in two pieces
    assert cut["gpu_experts"] == 5


def test_nothing_bounds_what_is_unknown() -> None:
    found = offload(2000, Resident(400, 300), EXPERTS, Gpus(1, 1000), ONE)
    assert found["gpu_experts"] == 8 and found["tokens_per_second_bound"] is None


def test_what_must_stay_on_the_gpu_may_not_fit_either() -> None:
    found = offload(300, Resident(400, 300), EXPERTS, GPU, ONE)
    assert found == {"possible": False, "missing_bytes": 100}
    assert offload(500, Resident(400, 300), Experts({}, 0, 0.0), GPU, ONE)["possible"] is False
