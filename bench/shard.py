"""Measure `requant shard` and `merge` against the disk: wall time over floor, and peak memory.

python bench/shard.py [--size-gb 8] [--ranks 16] [--ep 8] [--dir DIR] [--json]

The source is that of bench/convert.py, and so is the floor: the fastest that plain `dd` reads what
is read, and writes files of the sizes that are written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from child import options_parser, requant
from convert import make_source
from floor import drop_cache, read_seconds, write_seconds
from table import markdown


@dataclass(frozen=True)
class Result:
    """One command; seconds, and bytes of the files read and written."""

    work: str
    read_bytes: int
    written_bytes: int
    floor_seconds: float
    wall_seconds: float
    ratio: float
    peak_rss_bytes: int


def main() -> None:
    """Parse, measure, print."""
    parser = options_parser(__doc__, size_gb=8)
    parser.add_argument("--ranks", type=int, default=16, help="GPUs to cut for (16)")
    parser.add_argument("--ep", type=int, default=8, help="groups of experts (8)")
    options = parser.parse_args()
    source = make_source(options.dir, "fp8-block", options.size_gb)
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=options.dir) as place:
        ranks, merged = Path(place, "ranks"), Path(place, "merged")
        cut = _measure(f"cut for {options.ranks} ranks", "shard", source, ranks,
                       "--ranks", str(options.ranks), "--ep", str(options.ep))  # fmt: skip
        whole = _measure("merge them", "merge", ranks, merged)
        for file in _files(source):
            if file.read_bytes() != (merged / file.name).read_bytes():
                raise SystemExit(f"{file.name} came back changed")
    if options.json:
        print(json.dumps([asdict(cut), asdict(whole)]))
    else:
        print(markdown([_row(cut), _row(whole)]))


def _measure(work: str, command: str, source: Path, out: Path, *options: str) -> Result:
    """Run one command with a cold cache, then measure its floor."""
    reads = _files(source)
    drop_cache(reads)
    child = requant(command, str(source), str(out), *options)
    sizes = [file.stat().st_size for file in _files(out)]
    aside = out.with_name("floor")
    aside.mkdir()
    floor = min(read_seconds(reads).values()) + min(write_seconds(aside, sizes).values())
    shutil.rmtree(aside)
    return Result(
        work=work,
        read_bytes=sum(file.stat().st_size for file in reads),
        written_bytes=sum(sizes),
        floor_seconds=floor,
        wall_seconds=child.wall_seconds,
        ratio=child.wall_seconds / floor,
        peak_rss_bytes=child.peak_rss_bytes,
    )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def _row(result: Result) -> dict[str, str]:
    return {
        "work": result.work,
        "read GB": f"{result.read_bytes / 1e9:.2f}",
        "written GB": f"{result.written_bytes / 1e9:.2f}",
        "floor s": f"{result.floor_seconds:.1f}",
        "wall s": f"{result.wall_seconds:.1f}",
        "ratio": f"{result.ratio:.2f}",
        "peak RSS MB": f"{result.peak_rss_bytes / 1e6:.0f}",
    }


if __name__ == "__main__":
    main()
