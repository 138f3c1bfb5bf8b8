"""Measure every codec on one core: elements per second of decode and encode.

python bench/codecs.py [--values bf16] [--format int4 ...] [--repeat 100] [--json]

The tile is the first that `convert` makes of a [2048, 7168] weight (an expert's up_proj in
DeepSeek-V3). --values names the format whose decoded values are encoded: FP8's encoder works harder
on values that came from FP8 than on values that came from BF16.

The model beside each rate is what memory allows: the bytes that one pass must move, at the
bandwidth that torch's `copy_` of a float32 tile reaches on this core in the same run (read +
written, warm). Decoding reads what is stored and writes 4 bytes an element. Encoding reads 4 bytes
twice, as the scale must be known before the first code, and writes what is stored; plain floats
need no scale. FP8 blocks of values that came from FP8 are compared with what their codes decode to:
1 + 4 to decode them, 4 + 4 to compare. The model asks that arithmetic costs nothing: the ratio
tells what it costs.
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
from requant.quant.codec import bits_per_weight
from requant.quant.plain import Plain

SHAPE = (2048, 7168)

#: Bytes an element that a second look at FP8 blocks moves.
SECOND_LOOK = 5 + 8


@dataclass(frozen=True)
class Result:
    """One codec; the best repetition of each."""

    format: str
    tile_rows: int
    decode_elements_per_second: float
    encode_elements_per_second: float
    decode_model: float
    encode_model: float


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--values", default="bf16", metavar="FORMAT", help="default: bf16")
    parser.add_argument("--format", action="append", metavar="FORMAT", help="default: all")
    parser.add_argument("--repeat", type=int, default=100, help="keep the best of so many (100)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codecs = [parse_format(name) for name in options.format] if options.format else CODECS
    source = parse_format(options.values)
    values = _values(source)
    results = [_measure(codec, values, source, options.repeat) for codec in codecs]
    if options.json:
        print(json.dumps({"values": options.values, "results": [asdict(r) for r in results]}))
    else:
        print(markdown([_row(result) for result in results]))


def _values(codec: Codec) -> torch.Tensor:
    """A normally distributed weight [rows, cols] as `codec` stores it."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    return codec.decode(codec.encode(weight, SHAPE), SHAPE)


def _moved_bytes(codec: Codec, source: Codec) -> tuple[float, float]:
    """Bytes an element that decoding and encoding values of `source` move at least."""
    stored = bits_per_weight(codec) / 8
    if isinstance(codec, Plain):
        return (0 if stored == 4 else stored + 4), 4 + stored
    second = SECOND_LOOK if codec.name == source.name == "fp8-block" else 0
    return stored + 4, 4 + 4 + stored + second


def _bandwidth(elements: int, repeat: int) -> float:
    """Bytes a second, read and written, of copying one warm float32 tile to another."""
    tile = torch.ones(elements)
    copy = torch.zeros(elements)
    return 8 * elements / _best(lambda: copy.copy_(tile), repeat)


def _measure(codec: Codec, values: torch.Tensor, source: Codec, repeat: int) -> Result:
    """Time both directions of one tile, warm, as if just read or decoded."""
    ranges = iter_tiles(*SHAPE, codec.row_alignment(SHAPE[1]), TILE_ELEMENTS)
    start, stop = next(iter(ranges))
    tile = values[start:stop].clone()
    # As `convert` does, whose first pass takes the amax of what is stored.
    summary = codec.summarize([codec.measure(values)]) if codec.two_pass else None
    parts = codec.encode(tile, SHAPE, summary)
    shape = (len(tile), SHAPE[1])
    decoding, encoding = _moved_bytes(codec, source)
    bandwidth = _bandwidth(tile.numel(), repeat)
    return Result(
        format=format_name(codec),
        tile_rows=len(tile),
        decode_elements_per_second=tile.numel() / _best(lambda: codec.decode(parts, shape), repeat),
        encode_elements_per_second=tile.numel()
        / _best(lambda: codec.encode(tile, SHAPE, summary), repeat),
        decode_model=bandwidth / decoding if decoding else math.inf,
        encode_model=bandwidth / encoding,
    )


def _best(work: Callable[[], object], repeat: int) -> float:
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
        "model": _rate(result.decode_model),
        "ratio": _ratio(result.decode_model, result.decode_elements_per_second),
        "encode G/s": _rate(result.encode_elements_per_second),
        "model ": _rate(result.encode_model),
        "ratio ": _ratio(result.encode_model, result.encode_elements_per_second),
    }


def _ratio(model: float, measured: float) -> str:
    """How many times slower than the model."""
    return f"{model / measured:.2f}" if math.isfinite(model) else "-"


def _rate(per_second: float) -> str:
    """G elements/s; a dash for work that is none, as decoding float32."""
    return f"{per_second / 1e9:.3f}" if per_second < 1e11 else "-"


if __name__ == "__main__":
    main()
