"""GPUs: memory, bandwidth, architecture. Sources: the vendors' data sheets, docs/HARDWARE.md."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from requant.errors import RequantError
from requant.output import parse_size

Architecture = Literal[
    "volta", "turing", "ampere", "ada", "hopper", "blackwell",
    "cdna2", "cdna3", "cdna4", "rdna3", "cpu",
]  # fmt: skip
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

#: Most GPUs that are planned for.
MAX_GPUS = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it, in GB of 10^9 bytes and GB/s.

    `memory_gb` counts 10^9 bytes where the maker means 2^30 or leaves room for error correction:
    no card has less. `host_gb` is the link to the CPU in one direction.
    """

    name: str
    architecture: Architecture
    memory_gb: int
    bandwidth_gb: int
    host_gb: int
    source: str

    @property
    def model(self) -> str:
        """The name without its memory, which tells variants apart."""
        return re.sub(r" \d+GB$", "", self.name)


_PCIE_3, _PCIE_4, _PCIE_5 = 16, 32, 64  # 16 lanes, one direction

GPUS: tuple[Gpu, ...] = (
    Gpu("Tesla V100 16GB", "volta", 16, 900, _PCIE_3, "NVIDIA V100 data sheet"),
    Gpu("Tesla V100 32GB", "volta", 32, 900, _PCIE_3, "NVIDIA V100 data sheet"),
    Gpu("Tesla T4", "turing", 16, 300, _PCIE_3, "NVIDIA T4 data sheet"),
    Gpu("RTX 2080 Ti", "turing", 11, 616, _PCIE_3, "NVIDIA Turing architecture whitepaper"),
    Gpu("A10", "ampere", 24, 600, _PCIE_4, "NVIDIA A10 data sheet"),
    Gpu("A100 40GB", "ampere", 40, 1555, _PCIE_4, "NVIDIA A100 data sheet"),
    Gpu("A100 80GB", "ampere", 80, 1935, _PCIE_4, "NVIDIA A100 data sheet (PCIe; SXM: 2039)"),
    Gpu("RTX A6000", "ampere", 48, 768, _PCIE_4, "NVIDIA RTX A6000 data sheet"),
    Gpu("RTX 3060", "ampere", 12, 360, _PCIE_4, "NVIDIA GeForce RTX 3060 specifications"),
    Gpu("RTX 3080", "ampere", 10, 760, _PCIE_4, "NVIDIA Ampere GA102 whitepaper"),
    Gpu("RTX 3090", "ampere", 24, 936, _PCIE_4, "NVIDIA Ampere GA102 whitepaper"),
    Gpu("L4", "ada", 24, 300, _PCIE_4, "NVIDIA L4 data sheet"),
    Gpu("L40S", "ada", 48, 864, _PCIE_4, "NVIDIA L40S data sheet"),
    Gpu("RTX 4060 Ti", "ada", 16, 288, 16, "NVIDIA GeForce RTX 4060 Ti specifications (8 lanes)"),
    Gpu("RTX 4080", "ada", 16, 717, _PCIE_4, "NVIDIA Ada architecture whitepaper"),
    Gpu("RTX 4090", "ada", 24, 1008, _PCIE_4, "NVIDIA Ada architecture whitepaper"),
    Gpu("RTX 6000 Ada", "ada", 48, 960, _PCIE_4, "NVIDIA RTX 6000 Ada data sheet"),
    Gpu("H100 SXM", "hopper", 80, 3350, _PCIE_5, "NVIDIA H100 data sheet"),
    Gpu("H100 PCIe", "hopper", 80, 2000, _PCIE_5, "NVIDIA H100 PCIe product brief"),
    Gpu("H100 NVL", "hopper", 94, 3900, _PCIE_5, "NVIDIA H100 data sheet"),
    Gpu("H200", "hopper", 141, 4800, _PCIE_5, "NVIDIA H200 data sheet"),
    Gpu("H20", "hopper", 96, 4000, _PCIE_5, "no public data sheet; resellers' pages agree"),
    Gpu("GH200 96GB", "hopper", 96, 4000, 450, "NVIDIA GH200 data sheet (NVLink-C2C to the CPU)"),
    Gpu("GH200 144GB", "hopper", 144, 4900, 450, "NVIDIA GH200 data sheet (NVLink-C2C to the CPU)"),
    Gpu("B200", "blackwell", 180, 8000, _PCIE_5, "NVIDIA DGX B200 data sheet (1,440 GB for 8)"),
    Gpu("B300", "blackwell", 288, 8000, _PCIE_5, "NVIDIA DGX B300 data sheet (2.3 TB for 8)"),
    Gpu("RTX 5060 Ti", "blackwell", 16, 448, 32, "NVIDIA GeForce RTX 5060 Ti specifications"),
    Gpu("RTX 5070 Ti", "blackwell", 16, 896, _PCIE_5, "NVIDIA RTX Blackwell whitepaper"),
    Gpu("RTX 5080", "blackwell", 16, 960, _PCIE_5, "NVIDIA RTX Blackwell whitepaper"),
    Gpu("RTX 5090", "blackwell", 32, 1792, _PCIE_5, "NVIDIA RTX Blackwell whitepaper"),
    Gpu("RTX PRO 6000", "blackwell", 96, 1792, _PCIE_5, "NVIDIA RTX PRO 6000 Blackwell data sheet"),
    Gpu("MI250X", "cdna2", 64, 1638, _PCIE_4, "AMD Instinct MI250X data sheet, one of two dies"),
    Gpu("MI300X", "cdna3", 192, 5300, _PCIE_5, "AMD Instinct MI300X data sheet"),
    Gpu("MI325X", "cdna3", 256, 6000, _PCIE_5, "AMD Instinct MI325X data sheet"),
    Gpu("MI355X", "cdna4", 288, 8000, _PCIE_5, "AMD Instinct MI355X data sheet"),
    Gpu("RX 7900 XTX", "rdna3", 24, 960, _PCIE_4, "AMD Radeon RX 7900 XTX specifications"),
)  # fmt: skip

#: What is meant by names of a family.
_ALIASES = {"h100": "H100 SXM", "a6000": "RTX A6000"}
#: Words that people write before the model, or leave out.
_MAKERS = frozenset("nvidia geforce rtx tesla amd instinct radeon rx".split())


@dataclass(frozen=True)
class Gpus:
    """`count` GPUs of `memory_bytes` each. Of GPUs told by their memory alone all else is None;
    bandwidths are bytes/s, `host_bandwidth` that of one GPU's link to the CPU."""

    count: int
    memory_bytes: int
    name: str | None = None
    architecture: Architecture | None = None
    bandwidth: float | None = None
    host_bandwidth: float | None = None

    def __str__(self) -> str:
        return f"{self.count}x {self.name or f'{self.memory_bytes / 1e9:g} GB'}"


def parse_gpus(text: str) -> Gpus:
    """`4x24GB`, `4xH100`, `RTX 4090`, `2x RTX 4090`, `8xA100:80GB` -> GPUs.

    Raises RequantError for a name that is not known, listing close ones, or that means several.
    """
    match = re.fullmatch(
        r"\s*(?:(\d{1,9})\s*[x*]\s*)?((?!\d+\s*[x*]\s*$)[^:]*[^:\s])(?:\s*:\s*([^:]+))?", text, re.I
    )
    if match is None:
        raise RequantError(f"GPUs {text!r}: expected e.g. 4x24GB, 4xH100, RTX 4090, 8xA100:80GB")
    number, what, memory = match.groups()
    count = int(number or 1)
    if not 0 < count <= MAX_GPUS:
        raise RequantError(f"GPUs {text!r}: {count} of them, expected 1 to {MAX_GPUS}")
    if re.fullmatch(r"[\d.]+\s*[kmgt]i?b", what, re.I) and memory is None:
        return Gpus(count, _bytes(text, what))
    nbytes = None if memory is None else _bytes(text, memory)
    gpu = _named(text, what, nbytes)
    own = gpu.memory_gb * 10**9
    name = gpu.name if nbytes in (None, own) else f"{gpu.model}:{(nbytes or 0) / 1e9:g}GB"
    return Gpus(
        count, nbytes or own, name, gpu.architecture,
        gpu.bandwidth_gb * 1e9, gpu.host_gb * 1e9,
    )  # fmt: skip


def _bytes(text: str, size: str) -> int:
    nbytes = parse_size("GPU memory", size)
    if nbytes < 10**8:
        raise RequantError(f"GPUs {text!r}: {nbytes} bytes each, expected at least 0.1 GB")
    return nbytes


def _named(text: str, what: str, nbytes: int | None) -> Gpu:
    key = _key(what)
    alias = _ALIASES.get(key)
    found = [g for g in GPUS if g.name == alias or key in (_key(g.name), _key(g.model))]
    if not found:
        models = {_key(gpu.model): gpu.model for gpu in GPUS} | _ALIASES
        close = difflib.get_close_matches(key, models, n=3, cutoff=0.5) or list(models)
        raise RequantError(
            f"GPUs {text!r}: unknown GPU {what!r}; known are "
            f"{_listed([models[k] for k in close])}; or give the memory of one, e.g. 4x24GB"
        )
    alike = [gpu for gpu in found if gpu.memory_gb * 10**9 == nbytes] or found
    if len(alike) > 1:
        raise RequantError(
            f"GPUs {text!r}: {what} has {_listed([f'{g.memory_gb} GB' for g in alike], 'or')}; "
            f"write {alike[-1].model}:{alike[-1].memory_gb}GB"
        )
    return alike[0]


def _key(name: str) -> str:
    """A name as it is compared: without maker, blanks, dashes and case."""
    words = re.split(r"[\s_-]+", name.lower())
    return "".join(word for word in words if word not in _MAKERS)


def _listed(words: Sequence[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
