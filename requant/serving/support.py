"""Which engine runs which format on which generation of GPUs.

Of what requant writes: NVFP4 and MXFP4 of weights only, everything in the containers that `requant
formats` names. What no source tells is unknown, never guessed. Sources by row; docs/HARDWARE.md
has their addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from requant.serving.hardware import ARCHITECTURES, Architecture

Engine = Literal["vLLM", "SGLang", "transformers"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

#: native: multiplied in the format. weight-only: kept in its bits, expanded to 16 in the kernel.
#: dequantized: expanded to 16 bits at loading, so that no memory is saved.
Status = Literal["native", "weight-only", "dequantized", "no", "unknown"]
LETTERS: Mapping[str, Status] = {
    "N": "native", "W": "weight-only", "D": "dequantized", "-": "no", "?": "unknown"
}  # fmt: skip
RUNS: frozenset[Status] = frozenset({"native", "weight-only"})

#: What a GPU of unknown make is taken for: the format must run on all of them.
COMMON: tuple[Architecture, ...] = ("ampere", "ada", "hopper", "blackwell")


@dataclass(frozen=True)
class Support:
    """One letter for each of ARCHITECTURES, in order."""

    engine: Engine
    formats: tuple[str, ...]
    letters: str
    source: str


_FP8 = ("fp8-block", "fp8-channel", "fp8-tensor")
_BNB = ("nf4", "bnb-fp4")
_TABLE = "hardware table"

# Volta Turing Ampere Ada Hopper Blackwell CDNA2 CDNA3 CDNA4 RDNA3 CPU
TABLE: tuple[Support, ...] = (
    Support("vLLM", ("fp16", "fp32"), "-NNNNNNNNNN", "installation (SM 7.5 and newer)"),
    Support("vLLM", ("bf16",), "-WNNNNNNNNN", "installation; Turing: cast by --dtype half"),
    Support("vLLM", _FP8, "-WWNNN?N??-", f"{_TABLE}, FP8 page (Marlin from SM 7.5)"),
    Support("vLLM", ("mxfp8",), "-??????????", "none"),
    Support("vLLM", ("int8-channel",), "-NNNN-----N", f"{_TABLE}, INT8 page"),
    Support("vLLM", ("int8-block",), "-----------", "requant formats: not loaded"),
    Support("vLLM", ("int4",), "-?WWWW????-", "INT4 page (SM 8.0 and newer)"),
    Support("vLLM", ("int4-awq",), "-WWWW?----W", _TABLE),
    Support("vLLM", ("int4-gptq",), "-WWWW?----W", _TABLE),
    Support("vLLM", _BNB, "-WWWW?-----", _TABLE),
    Support("vLLM", ("mxfp4",), "--WWWW????-", f"{_TABLE}, issue 35528 (Marlin on Blackwell)"),
    Support("vLLM", ("nvfp4",), "-WWWWW-----", f"{_TABLE}, CompressedTensorsW4A16Fp4 (SM 7.5)"),
    Support("SGLang", ("fp16", "fp32", "bf16"), "??NNNN?NN??", "installation"),
    Support("SGLang", _FP8, "???NNN?NN??", "quantization page; Ampere: issues 7715, 12887"),
    Support("SGLang", ("mxfp8",), "???????????", "none"),
    Support("SGLang", ("int8-channel",), "??NNN??NN??", "quantization page (w8a8_int8)"),
    Support("SGLang", ("int8-block",), "??NNN??NN??", "quantization page (blockwise_int8)"),
    Support("SGLang", ("int4",), "??WWWW?????", "quantization page (compressed-tensors)"),
    Support("SGLang", ("int4-awq", "int4-gptq"), "??WWWW?WW??", "quantization page"),
    Support("SGLang", _BNB, "??WWW??????", "quantization page (bitsandbytes)"),
    Support("SGLang", ("mxfp4",), "????WW??W??", "quantization page, pull request 33589"),
    Support("SGLang", ("nvfp4",), "???????????", "none for weights only"),
    Support("transformers", ("fp16", "fp32"), "NNNNNNNNNNN", "torch"),
    Support("transformers", ("bf16",), "??NNNNNNNNN", "torch"),
    Support("transformers", ("fp8-block",), "DDDNNN????D", "quantizer_finegrained_fp8.py, 5.23"),
    Support(
        "transformers",
        ("fp8-channel", "fp8-tensor", "mxfp8", "int8-channel", "int4", "mxfp4", "nvfp4"),
        "WWWWWW????W", "quantizer_compressed_tensors.py, 5.23",
    ),
    Support("transformers", ("int8-block",), "-----------", "requant formats: not loaded"),
    Support("transformers", ("int4-awq", "int4-gptq"), "??WWWW?WW??", "quantization overview"),
    Support("transformers", _BNB, "??WWWW?????", "quantization overview"),
)  # fmt: skip

_CELLS: dict[tuple[str, str, str], Status] = {
    (row.engine, name, architecture): LETTERS[letter]
    for row in TABLE
    for name in row.formats
    for architecture, letter in zip(ARCHITECTURES, row.letters, strict=True)
}


def status(engine: Engine, format_name: str, architecture: Architecture) -> Status:
    """How an engine runs a format, with or without options, on an architecture."""
    return _CELLS.get((engine, format_name.partition("[")[0], architecture), "unknown")


def runs(format_name: str, architecture: Architecture | None) -> dict[Engine, Status]:
    """How each engine runs a format. Of an unknown GPU the least that all of COMMON do."""
    order = list(LETTERS.values())
    places = COMMON if architecture is None else (architecture,)
    found = {engine: [status(engine, format_name, a) for a in places] for engine in ENGINES}
    return {engine: max(each, key=order.index) for engine, each in found.items()}


def common_engines(format_names: Iterable[str], architecture: Architecture | None) -> list[Engine]:
    """The engines that run all of these formats in their own bits."""
    each = [runs(name, architecture) for name in format_names]
    return [engine for engine in ENGINES if all(found[engine] in RUNS for found in each)]
