"""`--ram` is kept, or refused with what is needed; the size of the model does not matter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import requant.convert.budget as budget
from requant.cli import app
from requant.convert.plan import Plan, make_plan
from requant.convert.processes import Team
from requant.convert.readahead import WINDOW_BYTES
from requant.convert.recipe import default_recipe
from requant.convert.source import Checkpoint
from requant.errors import RequantError
from requant.output import parse_size
from tests.convert.team import together
from tests.helpers import CPU, Tensors, write_checkpoint

#: An expert of DeepSeek-V3.
ROWS, COLS, BLOCK = 2048, 7168, 128
CONFIG = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}


def experts(folder: Path, count: int) -> Path:
    """So many FP8 matrices, 15 MB each, with their scales."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for number in range(count):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        codes = torch.randint(0, 120, (ROWS, COLS), generator=generator, dtype=torch.uint8)
        tensors[name] = codes.view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(ROWS // BLOCK, COLS // BLOCK) * 1e-3
    return write_checkpoint(folder, tensors, CONFIG, lambda name: "model.safetensors")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts(tmp_path_factory.mktemp("large") / "model", 5)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts(tmp_path_factory.mktemp("small") / "model", 1)


def planned(folder: Path, to: str) -> Plan:
    return make_plan(Checkpoint.open(folder), default_recipe(to))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["bf16", "int4", "int4[method=mse]", "nvfp4", "int4-awq"])
def test_a_conversion_stays_within_its_ram(to: str, large: Path, out: Path, tmp_path: Path) -> None:
    """Given as little as it says it needs; 2 % are what Python takes, more or less, by chance."""
    command = [large, out, "--to", to, "--workers", 2, "--json", "--ram"]
    codes, (child,) = together(1, [*command, "1MB"], tmp_path)
    assert codes == [2] and not out.exists()
    (needed,) = re.findall(r"1\.00 MB are too few, (\S+ [MG]B) are needed with", child.stderr)
    ram = round(parse_size("", needed) * 1.02)
    codes, (child,) = together(1, [*command, ram], tmp_path)
    assert codes == [0], child.stderr
    assert json.loads(child.stdout)["peak_rss_bytes"] <= ram


def test_too_little_ram_is_refused_with_both_numbers(small: Path, out: Path) -> None:
    command = ["convert", str(small), str(out), "--to", "int4", "--workers", "3", "--ram", "12.5MB"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and result.stdout == "" and not out.exists()
    assert re.fullmatch(
        r"error: --ram: 12\.50 MB are too few, \d+\.\d\d [MG]B are needed with --workers 3 "
        r"\(\d+\.\d\d [MG]B of them by Python, torch and Numba\); give more\n",
        result.stderr,
    )


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process takes without converting does not change."""
    monkeypatch.setattr(budget, "_now", lambda: 200_000_000)


@pytest.mark.parametrize("to", ["bf16", "int4", "nvfp4", "int4-awq"])
def test_what_is_needed_does_not_depend_on_the_models_size(
    to: str, small: Path, large: Path, steady: None
) -> None:
    plans = planned(small, to), planned(large, to)
    assert plans[1].read_bytes == 5 * plans[0].read_bytes
    one, five = (budget.needed_bytes(plan, 2, 4) for plan in plans)
    assert one == five


@pytest.mark.parametrize(("to", "usual", "most"), [("int4", 8, 8), ("nvfp4", 18, 32)])
def test_memory_is_spent_on_workers_first_and_then_on_windows(
    to: str, usual: int, most: int, small: Path, steady: None
) -> None:
    """More windows than reading ahead needs are of use where weights are looked at twice."""
    plan = planned(small, to)

    def given(ram: int | None, workers: int | None = None) -> tuple[int, int]:
        how = budget.runtime(plan, CPU, workers, ram, Team())
        return how.workers, how.windows

    cores = min(len(os.sched_getaffinity(0)), budget.MAX_WORKERS)
    assert given(None) == (cores, usual) and given(None, 100) == (100, usual)
    least = budget.needed_bytes(plan, 1, budget.MIN_WINDOWS)
    assert given(least) == (1, budget.MIN_WINDOWS)
    with pytest.raises(RequantError, match="are too few"):
        given(least - 1)
    four = budget.needed_bytes(plan, 4, budget.MIN_WINDOWS)
    assert given(four, 4) == (4, budget.MIN_WINDOWS)
    with pytest.raises(RequantError, match="with --workers 4"):
        given(four - 1, 4)
    assert given(four + 3 * WINDOW_BYTES, 4) == (4, budget.MIN_WINDOWS + 3)
    assert given(1 << 50) == (cores, most)
    for workers, windows in ((1, 4), (2, 7), (5, most)):
        needed = budget.needed_bytes(plan, workers, windows)
        assert given(needed, workers) == (workers, windows)


def test_processes_of_a_machine_share_its_cores(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_cores", lambda: 12)
    for processes, workers in ((1, 12), (3, 4), (5, 2), (50, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        how = budget.runtime(planned(small, "bf16"), CPU, None, None, Team())
        assert how.workers == workers


def test_the_peak_is_this_processs_and_not_that_of_who_started_it() -> None:
    script = """
import subprocess, sys
ballast = bytearray(200_000_000)
ballast[::4096] = bytes(len(ballast[::4096]))
print("begun", flush=True)
code = "from requant.memory import peak_bytes; print(peak_bytes())"
subprocess.run([sys.executable, "-c", code], check=True)
from requant.memory import peak_bytes; print(peak_bytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    _, child, parent = done.stdout.split()
    assert int(parent) > 200_000_000 > 100_000_000 > int(child) > 1_000_000
