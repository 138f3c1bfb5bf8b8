"""kill -9 at any step, repeat the command, and get the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from tests.helpers import CPU, SIDE_FILES, hashes

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, out: Path, to: str) -> dict[str, object]:
    plan = make_plan(Checkpoint.open(folder), default_recipe(to))
    return convert(plan, out, Runtime(CPU, 2))


@pytest.mark.parametrize(
    ("stored_as", "to", "distance"),
    [("fp8-block", "int4[group_size=64]", 11), ("bf16", "fp32", 23)],
)
def test_killed_at_any_step(
    stored_as: str, to: str, distance: int, source: Callable[[str], Path], tmp_path: Path
) -> None:
    start(source(stored_as), tmp_path / "whole", to)
    expected = hashes(tmp_path / "whole")
    driver = subprocess.run(
        [sys.executable, "-m", "tests.convert.killer", source(stored_as), tmp_path / "out", to,
         str(distance)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert driver.returncode == 0, driver.stderr
    kills = [json.loads(line) for line in driver.stdout.splitlines()]
    assert len(kills) >= 5
    for kill in kills:
        step, left = kill["step"], kill["left"]
        assert kill["result"] == expected, step
        # What has its final name is final; what an engine loads first is there last.
        for name in set(left) - set(SIDE_FILES):
            final = not name.endswith(".partial") and name != JOURNAL_NAME
            assert not final or left[name] == expected[name], (step, name)
        assert "config.json" not in left or set(left) >= set(expected) - {MANIFEST_NAME}, step
        assert MANIFEST_NAME in left or JOURNAL_NAME in left or not left, step
    assert not any("config.json" in kill["left"] for kill in kills[: len(kills) // 2])


SLOW = r"""
import sys, time
from requant.convert import steps
convert = steps._convert
def slowly(*args):
    sys.stderr.write("busy\n")
    time.sleep(0.03)
    return convert(*args)
steps._convert, steps.TILE_ELEMENTS, steps.CHUNK_ELEMENTS = slowly, 1 << 14, 1 << 14
from requant.cli import main
main()
"""


@contextlib.contextmanager
def running(folder: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A slow conversion to BF16 in a process of its own that is converting."""
    command = [sys.executable, "-c", SLOW, "convert", folder, out, "--to", "bf16", "--workers", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr is not None and process.stderr.readline() == "busy\n"
            yield process
        finally:
            process.kill()


def test_killed_from_outside_at_random_times(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out, chance = source("fp8-block"), tmp_path / "out", random.Random(3)
    start(folder, tmp_path / "whole", "bf16")
    for _ in range(2):
        with running(folder, out) as process:
            with pytest.raises(CheckpointError, match="another requant is writing to it"):
                start(folder, out, "bf16")
            time.sleep(chance.uniform(0, 0.4))
            process.kill()
            assert process.wait() == -signal.SIGKILL
    assert start(folder, out, "bf16")["files"] == 3 and hashes(out) == hashes(tmp_path / "whole")
    assert start(folder, out, "bf16")["resumed_files"] == 3


def test_ctrl_c_keeps_what_is_finished(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = source("fp8-block"), tmp_path / "out"
    with running(folder, out) as process:
        while (out / JOURNAL_NAME).read_text().count("\n") < 2:  # the key, and a finished file
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.replace("busy\n", "") == "error: interrupted; repeat the command to continue\n"
    assert not list(out.glob("*.partial")) and (out / JOURNAL_NAME).exists()
    assert start(folder, out, "bf16")["resumed_files"] in (1, 2)
