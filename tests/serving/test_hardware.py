"""Names of GPUs, what runs on them, and docs/HARDWARE.md, which says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.convert.parallel import Parallel
from requant.convert.recipe import load_recipe
from requant.errors import RequantError
from requant.quant import CODECS
from requant.serving.fit import Fit
from requant.serving.hardware import ARCHITECTURES, GPUS, MAX_GPUS, Gpus, parse_gpus
from requant.serving.inventory import Inventory
from requant.serving.memory import Demand
from requant.serving.quality import NOISE
from requant.serving.support import ENGINES, LETTERS, TABLE, common_engines, runs, status
from tests.test_docs import table

HARDWARE = (Path(__file__).parents[2] / "docs" / "HARDWARE.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "count", "memory", "name", "architecture"),
    [
        ("4x24GB", 4, 24 * 10**9, None, None),
        ("24GiB", 1, 24 * 2**30, None, None),
        ("16x 80 GB", 16, 80 * 10**9, None, None),
        ("4xH100", 4, 80 * 10**9, "H100 SXM", "hopper"),
        ("RTX 4090", 1, 24 * 10**9, "RTX 4090", "ada"),
        ("4090", 1, 24 * 10**9, "RTX 4090", "ada"),
        ("2x RTX 4090", 2, 24 * 10**9, "RTX 4090", "ada"),
        ("2 X NVIDIA GeForce RTX-4090", 2, 24 * 10**9, "RTX 4090", "ada"),
        ("8xH100:80GB", 8, 80 * 10**9, "H100 SXM", "hopper"),
        ("8xA100:80GB", 8, 80 * 10**9, "A100 80GB", "ampere"),
        ("A100 40GB", 1, 40 * 10**9, "A100 40GB", "ampere"),
        ("RTX 4090:48GB", 1, 48 * 10**9, "RTX 4090:48GB", "ada"),
        ("8xMI300X", 8, 192 * 10**9, "MI300X", "cdna3"),
        ("T4", 1, 16 * 10**9, "Tesla T4", "turing"),
    ],
)
def test_gpus_are_known_by_size_or_name(
    text: str, count: int, memory: int, name: str | None, architecture: str | None
) -> None:
    gpus = parse_gpus(text)
    assert (gpus.count, gpus.memory_bytes, gpus.name) == (count, memory, name)
    assert gpus.architecture == architecture
    assert abs(parse_gpus(str(gpus)).memory_bytes - gpus.memory_bytes) < 10**5  # 6 digits


def test_what_a_data_sheet_says_is_in_bytes_per_second() -> None:
    gpus = parse_gpus("RTX 4060 Ti")
    assert (gpus.bandwidth, gpus.host_bandwidth) == (288e9, 16e9)
    assert parse_gpus("24GB") == Gpus(1, 24 * 10**9)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("4xH101", "unknown GPU 'H101'; known are H100 SXM, H20 and A10; or give"),
        ("RTX 4091", "RTX 4090"),
        ("4xA100", "A100 has 40 GB or 80 GB; write A100:80GB"),
        ("0xH100", "0 of them, expected 1 to 1024"),
        (f"{MAX_GPUS + 1}x24GB", f"{MAX_GPUS + 1} of them"),
        ("4x5MB", "5000000 bytes each, expected at least 0.1 GB"),
        ("H100:much", "expected a size"),
        ("", "expected e.g. 4x24GB"),
        ("4x", "expected e.g. 4x24GB"),
    ],
)
def test_other_gpus_are_refused_with_what_is_known(text: str, told: str) -> None:
    with pytest.raises(RequantError, match=told):
        parse_gpus(text)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_its_own_name(gpu: object) -> None:
    assert parse_gpus(f"2x {gpu.name}").name == gpu.name  # type: ignore[attr-defined]


def test_support_is_told_for_every_format_engine_and_architecture_once() -> None:
    said = [(row.engine, name) for row in TABLE for name in row.formats]
    assert sorted(said) == sorted((e, codec.name) for e in ENGINES for codec in CODECS)
    assert all(len(row.letters) == len(ARCHITECTURES) for row in TABLE)
    assert {letter for row in TABLE for letter in row.letters} <= set(LETTERS)


def test_support_of_fp8_by_generation() -> None:
    assert status("vLLM", "fp8-block", "hopper") == "native"
    assert status("vLLM", "fp8-block[scale=ue8m0]", "ampere") == "weight-only"
    assert runs("fp8-block", "ampere")["transformers"] == "dequantized"
    assert common_engines(["fp8-block", "int4"], "ampere") == ["vLLM"]
    assert common_engines(["int8-channel"], "blackwell") == ["transformers"]


def test_an_unknown_gpu_runs_what_all_newer_ones_do() -> None:
    assert runs("fp8-block", None)["vLLM"] == "weight-only"  # Ampere's way
    assert runs("int8-channel", None)["vLLM"] == "no"  # not on Blackwell
    assert runs("fp8-block", None)["SGLang"] == "unknown"


def test_the_page_lists_the_gpus() -> None:
    rows = [
        [g.name, g.architecture, str(g.memory_gb), str(g.bandwidth_gb), str(g.host_gb), g.source]
        for g in GPUS
    ]
    assert table(HARDWARE, "GPU") == rows


def test_the_page_lists_what_runs_where() -> None:
    rows = [
        [row.engine, " ".join(f"`{name}`" for name in row.formats), *row.letters, row.source]
        for row in TABLE
    ]
    assert table(HARDWARE, "engine") == rows


def test_the_page_lists_the_errors() -> None:
    rows = [[f"`{name}`", f"{error:.2g}"] for name, error in NOISE.items()]
    assert table(HARDWARE, "format | relative squared error") == rows


def test_the_page_tells_what_deepseek_v3_needs(v3: Inventory) -> None:
    said = table(HARDWARE, "format | GPUs")
    assert len(said) == 4
    for recipe, gpus, *numbers in said:
        assert numbers == needs(v3, recipe.strip("`"), gpus)


def needs(v3: Inventory, recipe: str, gpus: str) -> list[str]:
    """A row of the page: weights, KV cache, all, and whether it fits."""
    made = parse_gpus(gpus)
    parallel = Parallel(made.count, made.count)
    weights = v3.rank_bytes(load_recipe(recipe), parallel)
    assert weights is not None
    fit = Fit.of(v3.checkpoint.config, made, parallel, Demand(131072), weights)
    sizes = [f"{n / 1e9:.2f} GB" for n in (fit.weights, fit.kv_cache, fit.needed)]
    return [*sizes, "yes" if fit.fits else "no"]
