"""Convert straight from a Hub that cuts connections, killed again and again, within a disk budget.

python bench/hub.py [--size-gb 8] [--disk 1GB] [--kills 20] [--cuts 100] [--to int4] [--download]
                    [--seed 0] [--dir DIR] [--json]

A synthetic checkpoint is served on loopback by a process of its own, which resets connections at
random bytes. `requant convert org/name OUT` runs in children that get SIGKILL at random moments,
until the last one comes to its end. All the time the bytes of the source that lie in OUT are added
up. Then the same checkpoint is converted from the disk, and all files are compared. With
--download it is `requant download`, compared with the files that are served. Exits with 1 where
anything differs, or there was more of the source on the disk than allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from child import ROOT, options_parser, requant, say
from synthetic import make_checkpoint
from table import markdown

REPO = "org/model"
STAGING, JOURNALS = ".requant-source", (".requant-journal.jsonl", ".requant-download.jsonl")
#: What tells where a conversion came from, and differs between the Hub and the disk.
MANIFEST = "requant.json"
LOOK_SECONDS = 0.002
#: The probability that an answer is cut, while there are cuts left: a download asks seldom.
CONVERT_SHARE, DOWNLOAD_SHARE = 0.5, 0.97
#: How long a child may work before it is killed, at most, for a GB of the source.
SECONDS_A_GB = 0.25


@dataclass
class Result:
    """What happened; `most_source_bytes` that lay in OUT at any time."""

    what: str
    source_bytes: int
    disk_bytes: int
    kills: int
    cuts: int
    most_source_bytes: int
    sent_bytes: int
    sent_share: float
    mismatches: list[str]
    wall_seconds: float

    @property
    def ok(self) -> bool:
        """Whether the result is right, and was within its budget."""
        return not self.mismatches and self.most_source_bytes <= self.disk_bytes


def main() -> None:
    """Parse, run, print."""
    options = _options()
    options.dir.mkdir(parents=True, exist_ok=True)
    say(f"source of {options.size_gb:g} GB")
    source = make_checkpoint(options.dir / f"fp8-block-{options.size_gb:g}gb", options.size_gb)
    with tempfile.TemporaryDirectory(prefix="hub-", dir=options.dir) as name:
        result = _measure(source, Path(name), options)
    if options.json:
        print(json.dumps({**asdict(result), "ok": result.ok}))
    else:
        print(markdown([_row(result)]))
        print(*result.mismatches, sep="\n", end="")
    raise SystemExit(0 if result.ok else 1)


def _options() -> argparse.Namespace:
    parser = options_parser(__doc__, size_gb=8)
    parser.add_argument("--kills", type=int, default=20, help="children that are killed (20)")
    parser.add_argument("--cuts", type=int, default=100, help="connections that are reset (100)")
    parser.add_argument("--disk", default="1GB", help="of the source on disk, at most (1GB)")
    parser.add_argument("--to", default="int4", metavar="FORMAT", help="convert into it (int4)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and cuts (0)")
    parser.add_argument("--download", action="store_true", help="download instead of converting")
    return parser.parse_args()


def _measure(source: Path, place: Path, options: argparse.Namespace) -> Result:
    """Everything from the served checkpoint to the compared result, in an empty folder."""
    out = place / "out"
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if options.download:
        command = ["download", REPO, str(out)]
        disk = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    else:
        command = ["convert", REPO, str(out), "--to", options.to, "--disk", options.disk]
        disk = _nbytes(options.disk)
    started = time.monotonic()
    with _served(source, place, options) as (endpoint, log), _watched(out) as most:
        kills = _run_killed(command, _environment(endpoint, place / "home"), out, options)
        seconds = time.monotonic() - started
        sent, cuts = _told(log)
    if options.download:
        expected = _hashes(source)
    else:
        say("the same from the disk")
        requant("convert", str(source), str(place / "local"), "--to", options.to)
        expected = _hashes(place / "local")
    found = _hashes(out)
    wrong = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
    what = "download" if options.download else f"convert to {options.to}"
    return Result(
        what, weights, disk, kills, cuts, most[0], sent, sent / weights, sorted(wrong), seconds
    )  # fmt: skip


@contextlib.contextmanager
def _served(source: Path, place: Path, options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The checkpoint on a server of its own: its endpoint, and where it logs what it sent."""
    log = place / "served.log"
    share = DOWNLOAD_SHARE if options.download else CONVERT_SHARE
    command = [sys.executable, str(Path(__file__)), "serve", str(source), str(log),
               str(options.seed), str(options.cuts), str(share)]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip(), log
        finally:
            server.terminate()


def serve(source: Path, log: Path, seed: int, cuts: int, share: float) -> None:
    """Serve a checkpoint until this process is terminated; what was sent is logged all the time.
    `cuts` answers are cut, each with the probability `share`."""
    sys.path.insert(0, str(ROOT))
    from tests.hub.server import Cut, Fault, HubServer, Request, random_cuts

    reset = random_cuts(seed, cuts, share)
    done = [0]

    def fault(request: Request) -> Fault | None:
        found = reset(request)
        done[0] += isinstance(found, Cut)
        return found

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with HubServer(fault) as server:
        server.add(REPO, source)
        print(server.endpoint, flush=True)
        while True:
            sent = sum(r.sent for r in server.requests if ".safetensors?" in r.path)
            temporary = log.with_suffix(".new")
            temporary.write_text(f"{sent} {done[0]}")
            temporary.rename(log)
            time.sleep(0.2)


def _told(log: Path) -> tuple[int, int]:
    """The bytes of weights that the server has sent, and the connections that it cut."""
    time.sleep(2)  # it logs every second or more often
    sent, cuts = map(int, log.read_text().split())
    return sent, cuts


def _environment(endpoint: str, home: Path) -> dict[str, str]:
    sys.path.insert(0, str(ROOT))
    from tests.hub.server import environment

    return environment(endpoint, home)


def _run_killed(
    arguments: Sequence[str], environment: dict[str, str], out: Path, options: argparse.Namespace
) -> int:
    """Run a command, killed so many times, to its end; how often it was."""
    chance = random.Random(options.seed)
    command = [sys.executable, "-m", "requant", *arguments, "--json"]
    kills = 0
    while True:
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        ) as child:  # fmt: skip
            if kills < options.kills:
                _wait_for_work(child, out, chance.uniform(0, SECONDS_A_GB * options.size_gb))
                child.kill()
            _, words = child.communicate()
        if child.returncode == 0:
            return kills
        if child.returncode != -signal.SIGKILL:
            raise SystemExit(f"{words[-3000:]}{' '.join(command)}: exit {child.returncode}")
        kills += 1
        say(f"kill {kills} of {options.kills}")


def _wait_for_work(child: subprocess.Popen[str], out: Path, seconds: float) -> None:
    """Until the child writes to OUT, and then so long, or it has ended."""
    before = _written(out)
    while child.poll() is None and _written(out) == before:
        time.sleep(LOOK_SECONDS)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def _written(out: Path) -> list[tuple[str, int]]:
    """What lies in OUT, and how large it is, but for journals."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.name not in JOURNALS:
                found.append((str(path), path.stat().st_size))
    return found


@contextlib.contextmanager
def _watched(out: Path) -> Iterator[list[int]]:
    """While inside, the most bytes of the source that were seen on the disk; [0] of the list."""
    most = [0]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_SECONDS):
            before = _source_files(out)
            total = 0
            with contextlib.suppress(OSError):  # it has just gone
                total = sum(path.stat().st_size for path in before)
            # What went while we looked, and came under another name, must not count twice.
            if _source_files(out) == before:
                most[0] = max(most[0], total)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def _source_files(out: Path) -> list[Path]:
    """Files with bytes of the source: chunks of a conversion, or the copy's own."""
    staging = out / STAGING
    with contextlib.suppress(OSError):
        where = staging if staging.is_dir() else out
        found = [path for path in where.rglob("*") if path.suffix != ".sha256" and path.is_file()]
        if where == staging or (out / JOURNALS[1]).exists():
            return sorted(path for path in found if path.name not in JOURNALS)
    return []


def _nbytes(text: str) -> int:
    """Bytes of 1GB, as requant reads it."""
    sys.path.insert(0, str(ROOT))
    from requant.output import parse_size

    return parse_size("--disk", text)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that is no journal or manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (*JOURNALS, MANIFEST):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = digest
    return found


def _row(result: Result) -> dict[str, str]:
    return {
        "what": result.what,
        "source GB": f"{result.source_bytes / 1e9:.2f}",
        "kills": str(result.kills),
        "cuts": str(result.cuts),
        "most source MB on disk": f"{result.most_source_bytes / 1e6:.0f}",
        "allowed MB": f"{result.disk_bytes / 1e6:.0f}",
        "fetched / source": f"{result.sent_share:.2f}",
        "mismatches": str(len(result.mismatches)),
        "wall s": f"{result.wall_seconds:.0f}",
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        source, log, seed, cuts, share = sys.argv[2:]
        serve(Path(source), Path(log), int(seed), int(cuts), float(share))
    else:
        main()
