"""Measure every codec on one core: elements per second of decode and encode.

python bench/codecs.py [--values bf16] [--format int4 ...] [--repeat 7] [--json]

The tiles are those that `convert` makes of a [2048, 7168] weight (an expert's up_proj in
DeepSeek-V3). --values names the format whose decoded values are encoded: FP8's encoder works harder
on values that came from FP8 than on values that came from BF16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from table import markdown

from requant.convert.source import iter_tiles
from requant.convert.steps import TILE_ELEMENTS
from requant.quant import CODECS, Codec, format_name, parse_format

SHAPE = (2048, 7168)


@dataclass(frozen=True)
class Result:
    """One codec; the best repetition of each."""

    format: str
    tile_rows: int
    decode_elements_per_second: float
    encode_elements_per_second: float


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--values", default="bf16", metavar="FORMAT", help="default: bf16")
    parser.add_argument("--format", action="append", metavar="FORMAT", help="default: all")
    parser.add_argument("--repeat", type=int, default=7, help="keep the best of so many (7)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codecs = [parse_format(name) for name in options.format] if options.format else CODECS
    values = _values(parse_format(options.values))
    results = [_measure(codec, values, options.repeat) for codec in codecs]
    if options.json:
        print(json.dumps({"values": options.values, "results": [asdict(r) for r in results]}))
    else:
        print(markdown([_row(result) for result in results]))


def _values(codec: Codec) -> torch.Tensor:
    """A normally distributed weight [rows, cols] as `codec` stores it."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    return codec.decode(codec.encode(weight, SHAPE), SHAPE)


def _measure(codec: Codec, values: torch.Tensor, repeat: int) -> Result:
    """Time both directions over all tiles; the tiles are copies, as if just read or decoded."""
    ranges = list(iter_tiles(*SHAPE, codec.row_alignment(SHAPE[1]), TILE_ELEMENTS))
    tiles = [values[start:stop].clone() for start, stop in ranges]
    encoded = [codec.encode(tile, SHAPE) for tile in tiles]

    def encode() -> None:
        for tile in tiles:
            codec.encode(tile, SHAPE)

    def decode() -> None:
        for tile, parts in zip(tiles, encoded, strict=True):
            codec.decode(parts, (len(tile), SHAPE[1]))

    elements = math.prod(SHAPE)
    return Result(
        format=format_name(codec),
        tile_rows=len(tiles[0]),
        decode_elements_per_second=elements / _best(decode, repeat),
        encode_elements_per_second=elements / _best(encode, repeat),
    )


def _best(work: Callable[[], None], repeat: int) -> float:
    """CPU seconds of the fastest repetition: other work on the machine does not count."""
    seconds = []
    for _ in range(repeat):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def _row(result: Result) -> dict[str, str]:
    return {
        "format": result.format,
        "rows a tile": str(result.tile_rows),
        "decode G/s": _rate(result.decode_elements_per_second),
        "encode G/s": _rate(result.encode_elements_per_second),
    }


def _rate(per_second: float) -> str:
    """G elements/s; a dash for work that is none, as decoding float32."""
    return f"{per_second / 1e9:.3f}" if per_second < 1e11 else "-"


if __name__ == "__main__":
    main()
