"""What each format costs the demo model: `python bench/quality.py [--json] [FORMAT ...]`.

Converts `demo` into each format, verifies it, and prints bits per weight, KL, top-1 agreement,
perplexity and size. Deterministic on one machine; about seven minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.quant import parse_format
from requant.quant.codec import bits_per_weight
from requant.verify.comparison import verify

FORMATS = [
    "fp32",
    "fp16",
    "bf16",
    "fp8-block",
    "fp8-block[scale=ue8m0]",
    "fp8-channel",
    "fp8-tensor",
    "mxfp8",
    "int8-block",
    "int8-channel",
    "int8-channel[method=mse]",
    "int8-channel[arithmetic=bf16]",
    "int4",
    "int4[method=mse]",
    "int4[arithmetic=bf16]",
    "int4[symmetric=false]",
    "int4[symmetric=false,method=mse]",
    "int4[group_size=32]",
    "int4[group_size=32,method=mse]",
    "int4-awq",
    "int4-awq[method=mse]",
    "int4-gptq",
    "int4-gptq[method=mse]",
    "nf4",
    "nf4[double_quant=true]",
    "bnb-fp4",
    "mxfp4",
    "mxfp4[method=mse]",
    "nvfp4",
    "nvfp4[method=mse]",
]


def measure(text: str, folder: Path, tokens: int) -> dict[str, object]:
    """One row of the table."""
    cpu = torch.device("cpu")
    plan = make_plan(Checkpoint.open(demo_path()), default_recipe(text))
    convert(plan, folder, Runtime(cpu, 2))
    verdict = verify(demo_path(), folder, device=cpu, max_kl=None, tokens=tokens)
    return {
        "format": text,
        "bits_per_weight": round(bits_per_weight(parse_format(text)), 3),
        "kl": verdict["kl"],
        "top1_agreement": verdict["top1_agreement"],
        "perplexity": verdict["perplexity_output"],
        "tokens": verdict["tokens"],
        "written_bytes": plan.written_bytes,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for text in arguments.formats:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measure(text, Path(scratch, "out"), arguments.tokens))
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| format | bits per weight | KL | top-1 | perplexity | MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| `{format}` | {bits_per_weight:.3f} | {kl:.5f} | {top1_agreement:.3f} "
            "| {perplexity:.3f} | {mb:.2f} |".format(mb=row["written_bytes"] / 1e6, **row)  # type: ignore[operator]
        )
    print(f"\n{rows[0]['tokens']} tokens")


if __name__ == "__main__":
    main()
