"""Measure `requant convert` against the disk: wall time over floor, and peak memory.

python bench/convert.py [--size-gb 8] [--dir DIR] [--from fp8-block ...] [--to int4 ...]
                        [--scale 1,4,16] [--json]

Sources are generated once and kept in --dir; outputs are removed. Each conversion is a child
process that starts with none of the source in the page cache; wall time is from its start to its
end, Python's and torch's start included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from child import options_parser, requant, say
from floor import drop_cache, read_seconds, write_seconds
from synthetic import make_checkpoint
from table import markdown

from requant.quant import parse_format

TARGETS = ("bf16", "fp8-block", "int8-channel", "int4", "mxfp4", "nvfp4")
#: Sources, and the bytes of each for a byte of the FP8 checkpoint that it is made from.
SOURCES = {"fp8-block": 1.0, "bf16": 2.0, "mxfp4": 17 / 32}
#: What convert reports of its own peak memory may lie this far below what the kernel saw.
RSS_SLACK = 0.05


@dataclass(frozen=True)
class Result:
    """One conversion. Floors: seconds by way of reading and writing; `floor_seconds` the best."""

    source_format: str
    target_format: str
    source_bytes: int
    output_bytes: int
    read_floor_seconds: dict[str, float]
    write_floor_seconds: dict[str, float]
    floor_seconds: float
    wall_seconds: float
    cpu_seconds: float
    ratio: float
    source_bytes_per_second: float
    peak_rss_bytes: int
    reported_peak_rss_bytes: int


def main() -> None:
    """Parse, measure, print."""
    options = _options()
    sizes = options.scale or [options.size_gb]
    results = []
    for size_gb in sizes:
        for stored in options.sources or SOURCES:
            say(f"source of {size_gb:g} GB in {stored}")
            source = make_source(options.dir, stored, size_gb)
            read_floor = read_seconds(_weight_files(source))
            for target in options.to or TARGETS:
                say(f"{source.name} -> {target}")
                runs = (
                    _measure(source, stored, options.dir, target, read_floor)
                    for _ in range(options.repeat)
                )
                results.append(min(runs, key=lambda result: result.wall_seconds))
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "os": platform.system()}
        print(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}))
    else:
        print(markdown([_row(result) for result in results]))


def _options() -> argparse.Namespace:
    parser = options_parser(__doc__, size_gb=8)
    parser.add_argument(
        "--from", action="append", dest="sources", metavar="FORMAT", help=", ".join(SOURCES)
    )
    parser.add_argument("--to", action="append", metavar="FORMAT", help=", ".join(TARGETS))
    parser.add_argument(
        "--scale",
        type=lambda text: [float(size) for size in text.split(",")],
        metavar="GB,GB",
        help="several sizes instead of one: memory must stay flat",
    )
    parser.add_argument("--repeat", type=int, default=1, help="keep the best of so many (1)")
    return parser.parse_args()


def make_source(folder: Path, stored: str, size_gb: float) -> Path:
    """A checkpoint of at least `size_gb` GB in a format, made here or taken if it is there."""
    path = folder / f"{stored}-{size_gb:g}gb"
    if stored == "fp8-block":
        return make_checkpoint(path, size_gb)
    if not (path / "requant.json").exists():
        larger = size_gb / SOURCES[stored]
        origin = make_checkpoint(folder / f"fp8-block-{larger:g}gb", larger)
        requant("convert", str(origin), str(path), "--to", stored)
        if larger != size_gb:
            shutil.rmtree(origin)
    return path


def _measure(
    source: Path, stored: str, folder: Path, target: str, read_floor: dict[str, float]
) -> Result:
    """Convert once, look at the output, remove it, then measure what writing it takes dd."""
    with tempfile.TemporaryDirectory(prefix="out-", dir=folder) as name:
        out = Path(name)
        drop_cache(_weight_files(source))
        child = requant("convert", str(source), str(out), "--to", target)
        facts = requant("inspect", str(out)).document
        sizes = [file.stat().st_size for file in _weight_files(out)]
    found = [parse_format(name) for name in facts["formats"]]  # which do not tell a method
    if parse_format(target) not in found or facts["files"] != len(sizes):
        raise SystemExit(f"{target}: the output reads back as {facts['formats']}")
    reported = child.document["peak_rss_bytes"]
    if not child.peak_rss_bytes * (1 - RSS_SLACK) <= reported <= child.peak_rss_bytes:
        raise SystemExit(f"peak_rss_bytes is {reported}, the kernel says {child.peak_rss_bytes}")
    write_floor = write_seconds(folder, sizes)
    floor = min(read_floor.values()) + min(write_floor.values())
    source_bytes = sum(file.stat().st_size for file in _weight_files(source))
    return Result(
        source_format=stored,
        target_format=target,
        source_bytes=source_bytes,
        output_bytes=sum(sizes),
        read_floor_seconds=read_floor,
        write_floor_seconds=write_floor,
        floor_seconds=floor,
        wall_seconds=child.wall_seconds,
        cpu_seconds=child.cpu_seconds,
        ratio=child.wall_seconds / floor,
        source_bytes_per_second=source_bytes / child.wall_seconds,
        peak_rss_bytes=child.peak_rss_bytes,
        reported_peak_rss_bytes=reported,
    )


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _row(result: Result) -> dict[str, str]:
    return {
        "pair": f"{result.source_format} -> {result.target_format}",
        "source GB": f"{result.source_bytes / 1e9:.2f}",
        "output GB": f"{result.output_bytes / 1e9:.2f}",
        "floor s": f"{result.floor_seconds:.1f}",
        "wall s": f"{result.wall_seconds:.1f}",
        "ratio": f"{result.ratio:.2f}",
        "GB/s": f"{result.source_bytes_per_second / 1e9:.2f}",
        "CPU s": f"{result.cpu_seconds:.1f}",
        "peak RSS MB": f"{result.peak_rss_bytes / 1e6:.0f}",
    }


if __name__ == "__main__":
    main()
