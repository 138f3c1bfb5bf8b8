"""Memory of this process."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_bytes() -> int:
    """The most memory that this process has had so far, in bytes.

    Linux counts into getrusage what the process that started this one had.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    kilobytes = int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024
