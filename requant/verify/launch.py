"""One process for each rank on this machine, started as torchrun would start them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from requant.convert.processes import PATIENCE
from requant.convert.rank_folders import read_layout
from requant.errors import RequantError

#: Seconds that processes have to end by themselves once one of them failed, and between two looks.
GRACE_SECONDS = 10.0
LOOK_SECONDS = 0.05


def ranks_in(output: Path) -> int:
    """How many ranks a folder was cut into; 1 where it was not, or cannot be read, which `verify`
    then tells."""
    try:
        layout = read_layout(output)
    except RequantError:
        return 1
    return 1 if layout is None else len(layout.folders)


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `requant` with these arguments in `count` processes, and wait; their exit status.

    Raises RequantError when a process was killed. None of them outlives this call.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, None, True, PATIENCE, wait_for_workers=False)
    command = [sys.executable, "-m", "requant", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            environment = {**os.environ, **_environment(number, count, store.port)}
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _environment(number: int, count: int, port: int) -> dict[str, str]:
    """Who a process is, as torchrun tells it; the store is the parent's, on a port that is free."""
    threads = max(1, (os.cpu_count() or 1) // count)
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended. A bug counts more than an error, that more than a verdict of no,
    which process 0 gives."""
    deadline: float | None = None
    while None in (codes := [process.poll() for process in processes]):
        if any(codes) and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(LOOK_SECONDS)
    for number, code in enumerate(codes):
        if code is not None and code < 0:
            raise RequantError(
                f"the process of rank {number} was killed by signal {-code}; if memory was short, "
                "start fewer at a time, on several machines"
            )
    return max(code for code in codes if code is not None)
