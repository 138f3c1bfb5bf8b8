"""Run by test_resume.py: convert in children that kill themselves with SIGKILL, and start again.

A step is a call that changes the disk. Arguments: SRC, OUT, format, distance of steps to die at.
Prints one JSON line a step: what lay in OUT after the kill, and what lies in it in the end.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import requant.convert.run as run
import requant.convert.steps as steps
import requant.convert.writer as writer
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.source import Checkpoint
from tests.helpers import hashes

STEPS = ["open", "pwrite", "fsync", "rename", "unlink", "ftruncate", "mkdir"]


def kill_at(step: int) -> None:
    """Make the given call, counted from now, the last one; half of a write still happens."""
    left = step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if call is pwrite:
                    pwrite(args[0], args[1][: len(args[1]) // 2 // 4096 * 4096], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return dying

    pwrite = os.pwrite
    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def convert(source: Path, out: Path, to: str, step: int | None) -> bool:
    """Convert in a child of its own; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            if step is not None:
                kill_at(step)
            steps.TILE_ELEMENTS, steps.CHUNK_ELEMENTS = 1 << 14, 1 << 14
            steps.COPY_BYTES, writer.WINDOW_BYTES = 1 << 15, 1 << 15
            plan = make_plan(Checkpoint.open(source), default_recipe(to))
            run.convert(plan, out, run.Runtime(torch.device("cpu"), 1))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, (step, status)
    return True


def main() -> None:
    source, out, to, distance = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    for step in itertools.count(0, distance):
        shutil.rmtree(out, ignore_errors=True)
        if convert(source, out, to, step):
            return
        left = hashes(out) if out.exists() else {}
        # The next run is killed too, later or sooner, and the one after it is left in peace.
        convert(source, out, to, step // 2 + 7)
        convert(source, out, to, None)
        print(json.dumps({"step": step, "left": left, "result": hashes(out)}), flush=True)


if __name__ == "__main__":
    main()
