"""Sizes that people write."""

from __future__ import annotations

import pytest

from requant.errors import RequantError
from requant.output import parse_size, size

SIZES = {
    "0": 0, "1": 1, "700MB": 700_000_000, "700 mb": 700_000_000, " 1.5 GB ": 1_500_000_000,
    "2GiB": 2 << 30, "0.5KiB": 512, "3TB": 3 * 10**12, "1TiB": 1 << 40, "12b": 12, "600000000":
    600_000_000, "1.1GB": 1_100_000_000, "007kB": 7000,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_a_size(text: str) -> None:
    assert parse_size("--ram", text) == SIZES[text]


@pytest.mark.parametrize(
    "text",
    ["", "MB", "-1MB", "1,5GB", "1.GB", ".5GB", "1e9", "700M", "1 PB", "1GB2", "nan", "inf", "0x10",
     "\u0663MB", "1\nMB2", "9" * 400, "9" * 5000 + "GB"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequantError, match="expected a size such as 700MB or 2GiB") as caught:
        parse_size("--ram", text)
    assert str(caught.value).startswith(f"--ram {text}"[:100])


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 10**6, 2 * 10**9, 5 * 10**12])
def test_what_is_printed_can_be_given(nbytes: int) -> None:
    assert parse_size("--ram", size(nbytes)) == nbytes
