"""Measure `requant convert` against other tools, on the same files in the same run.

python bench/peers.py [--size-gb 8] [--dir DIR] [--python PYTHON] [--only TEXT] [--json]

--python: the interpreter whose packages are compared with (they ask for other versions of torch
than requant; an environment of their own serves). A tool that is not installed there is left out.
Peers, each with the entry point that needs no model definition and as many workers as cores:
compressed-tensors' convert_checkpoint, llm-compressor's model_free_ptq, AutoRound's model-free mode
without iterations. All start with the source out of the page cache; only requant syncs its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from child import options_parser, requant, run, say
from convert import SOURCES, make_source
from floor import drop_cache
from table import markdown

#: Arguments of each program: source, output, workers.
_DEQUANTIZE = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint
source, out, workers = sys.argv[1:]
linear = FP8BlockDequantizer(targets=[r"re:.*(mlp|self_attn).*_proj.*"])
convert_checkpoint(source, out, linear, max_workers=int(workers), device="cpu")
"""
_COMPRESS = """
import sys
from llmcompressor import model_free_ptq
source, out, workers = sys.argv[1:]
kept = ["re:.*gate$", "lm_head", "re:.*embed_tokens$", "re:.*kv_b_proj$"]
model_free_ptq(source, out, scheme="{scheme}", ignore=kept, max_workers=int(workers), device="cpu")
"""
_ROUND = """
import sys
from auto_round import AutoRound
source, out, workers = sys.argv[1:]
rounding = AutoRound(model=source, scheme="W4A16", iters=0, model_free=True, device_map="cpu")
rounding.quantize_and_save(out, format="auto_round")
"""


class Pair(NamedTuple):
    """A conversion that another tool can do, too: `package` must be importable."""

    source: str
    target: str
    tool: str
    package: str
    program: str


PAIRS = [
    Pair("fp8-block", "bf16", "compressed-tensors", "compressed_tensors", _DEQUANTIZE),
    Pair("fp8-block", "int4", "AutoRound", "auto_round", _ROUND),
    *(
        Pair("bf16", target, "llm-compressor", "llmcompressor", _COMPRESS.format(scheme=scheme))
        for target, scheme in {"int4": "W4A16", "int8-channel": "W8A8", "fp8-block": "FP8_BLOCK",
                               "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}.items()
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One pair: seconds, the ratio of them, and peak memory of both."""

    source: str
    target: str
    tool: str
    tool_seconds: float
    tool_peak_rss_bytes: int
    requant_seconds: float
    requant_peak_rss_bytes: int
    times_faster: float


def main() -> None:
    """Parse, measure, print."""
    parser = options_parser(__doc__, size_gb=8)
    parser.add_argument("--python", default=sys.executable, help="the peers' interpreter")
    parser.add_argument("--only", default="", help="pairs whose text, `bf16 -> int4`, holds this")
    options = parser.parse_args()
    results = []
    for pair in PAIRS:
        if options.only not in f"{pair.source} -> {pair.target}":
            continue
        if subprocess.run([options.python, "-c", f"import {pair.package}"], check=False,
                          capture_output=True).returncode:  # fmt: skip
            say(f"{pair.tool} is not installed for {options.python}: left out")
            continue
        size_gb = options.size_gb * SOURCES[pair.source]
        source = make_source(options.dir, pair.source, size_gb)
        say(f"{pair.source} -> {pair.target}: {pair.tool}, then requant")
        results.append(_measure(pair, source, options.dir, options.python))
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    elif results:
        print(markdown([_row(result) for result in results]))


def _measure(pair: Pair, source: Path, folder: Path, python: str) -> Result:
    workers = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="peer-", dir=folder) as out:
        drop_cache(sorted(source.glob("*.safetensors")))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        theirs = run([python, "-c", pair.program, str(source), out, workers], environment)
    with tempfile.TemporaryDirectory(prefix="out-", dir=folder) as out:
        drop_cache(sorted(source.glob("*.safetensors")))
        ours = requant("convert", str(source), out, "--to", pair.target)
    return Result(
        source=pair.source,
        target=pair.target,
        tool=pair.tool,
        tool_seconds=theirs.wall_seconds,
        tool_peak_rss_bytes=theirs.peak_rss_bytes,
        requant_seconds=ours.wall_seconds,
        requant_peak_rss_bytes=ours.peak_rss_bytes,
        times_faster=theirs.wall_seconds / ours.wall_seconds,
    )


def _row(result: Result) -> dict[str, str]:
    return {
        "pair": f"{result.source} -> {result.target}",
        "tool": result.tool,
        "tool s": f"{result.tool_seconds:.1f}",
        "requant s": f"{result.requant_seconds:.1f}",
        "times faster": f"{result.times_faster:.1f}",
        "tool RSS MB": f"{result.tool_peak_rss_bytes / 1e6:.0f}",
        "requant RSS MB": f"{result.requant_peak_rss_bytes / 1e6:.0f}",
    }


if __name__ == "__main__":
    main()
