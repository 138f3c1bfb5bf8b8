"""The safetensors container: bytes equal to the reference writer's, and nothing else accepted."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from requant.convert import header
from requant.convert.header import layout, read_exactly, read_header
from requant.errors import CheckpointError
from requant.quant.codec import DTYPE_BITS, TORCH_DTYPES, TensorSpec

Opened = dict[str, tuple[str, list[int]]]


def raw(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def container(entries: object, data: bytes = b"") -> bytes:
    """A file whose data starts at byte 200 (later for a longer header)."""
    return raw(json.dumps(entries).encode().ljust(192), data)


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def ours(path: Path) -> Opened:
    return {n: (spec.dtype, list(spec.shape)) for n, (spec, _) in read_header(path).items()}


def theirs(path: Path) -> Opened | None:
    try:
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}
    except SafetensorError:
        return None


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Every dtype in three shapes, and names that need escaping."""
    tensors: dict[str, torch.Tensor] = {}
    for number, dtype in enumerate(TORCH_DTYPES.values()):
        values = torch.ones(3, 5).to(dtype)
        tensors[f"z{number}.weight"] = values
        tensors[f"a{number}.weight"] = values[:1].clone()
        tensors[f"empty{number}"] = values[:0].clone()
    names = ["scalar", "\u00e9\u65e5\u672c\U0001f600", 'quote"back\\slash/', "", "UPPER", "a b"]
    return tensors | {name: torch.tensor(float(i)) for i, name in enumerate(names)}


def test_the_reference_reader_finds_every_tensor(tmp_path: Path) -> None:
    """Laid out in any order, each at a multiple of its element's size, the data at one of 4096."""
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    specs = {name: spec for name, (spec, _) in read_header(tmp_path / "a.safetensors").items()}
    for order in (sorted(specs), sorted(specs, reverse=True)):
        header, ranges = layout({name: specs[name] for name in order})
        written = bytearray(header.ljust(max(end for _, end in ranges.values()), b"\0"))
        for name, (begin, end) in ranges.items():
            assert begin % tensors[name].element_size() == 0
            written[begin:end] = bytes(tensors[name].reshape(-1).view(torch.uint8).numpy())
        (tmp_path / "b.safetensors").write_bytes(written)
        assert len(header) % 4096 == 0
        found = load_file(tmp_path / "b.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
            flat = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(*flat), name


def test_reads_what_the_reference_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(mixed_tensors(), path)
    assert ours(path) == theirs(path)
    data = path.read_bytes()
    with safe_open(path, "pt") as opened:
        for name, (_, where) in read_header(path).items():
            flat = opened.get_tensor(name).reshape(-1).view(torch.uint8)
            assert bytes(flat.numpy()) == data[where.begin : where.end], name


def test_every_dtype_of_the_reference_has_a_size(tmp_path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(container({"a": entry(dtype, [8], 0, bits)}, bytes(bits)))
        assert ours(path) == theirs(path) == {"a": (dtype, [8])}


def test_no_tensors_is_a_file(tmp_path: Path) -> None:
    header, ranges = layout({})
    (tmp_path / "a.safetensors").write_bytes(header)
    assert theirs(tmp_path / "a.safetensors") == ours(tmp_path / "a.safetensors") == {}
    assert not ranges


def test_a_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    good = container({"a": entry("F32", [3], 0, 12), "b": entry("U8", [2], 12, 14)}, bytes(14))
    path = tmp_path / "cut.safetensors"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(
            CheckpointError, match=r"cut\.safetensors: header .*truncated|describes"
        ):
            read_header(path)
    path.write_bytes(good)
    assert len(read_header(path)) == 2


GOOD = entry("U8", [1], 0, 1)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "trailing bytes": (container({"a": GOOD}, b"xy"), r"describes 201 bytes, the file has 202"),
    "data missing": (container({"a": GOOD}), r"describes 201 bytes, the file has 200; truncated"),
    "header longer than the file": (b"\xff" * 8 + b"{}", r"header of 18446744073709551615 bytes"),
    "not JSON": (raw(b"PK\x03\x04"), "not valid JSON"),
    "nothing": (raw(b""), "not valid JSON"),
    "UTF-16": (raw(json.dumps({"a": GOOD}).encode("utf-16-le"), b"x"), "not valid JSON"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff":{}}'), "not valid JSON"),
    "NaN": (raw(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"), "NaN is not"),
    "5000 digits": (raw(b'{"a":%s}' % (b"9" * 5000)), "not valid JSON"),
    "deep list": (raw(b"[" * 200_000), "not valid JSON"),
    "deep object": (raw(b'{"a":' * 200_000), "not valid JSON"),
    "a list": (container([]), "not a JSON object"),
    "same name twice": (raw(b'{"a":1,"b":2,"a":1}'), "'a' is given twice"),
    "same field twice": (raw(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "'dtype' is given twice"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (container({"__metadata__": []}), "__metadata__"),
    "lone surrogate": (raw(b'{"\\ud800":{}}'), r"'\\ud800': unprintable"),
    "escape sequence": (container({"\x1b[2J": GOOD}, b"x"), r"'\\x1b\[2J': unprintable"),
    "entry is null": (container({"a": None}), "a: header entry is not an object"),
    "no offsets": (container({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "a: shape .* not sizes"),
    "unknown dtype": (container({"a": entry("Q4", [1], 0, 1)}, b"x"), "a: unknown dtype 'Q4'"),
    "dtype a list": (container({"a": entry([], [1], 0, 1)}, b"x"), r"a: unknown dtype \[\]"),
    "dtype an object": (container({"a": entry({}, [1], 0, 1)}, b"x"), "a: unknown dtype {}"),
    "negative size": (container({"a": entry("U8", [-1], 0, 1)}, b"x"), r"a: shape \[-1\]"),
    "negative offset": (container({"a": entry("U8", [1], -1, 0)}, b"x"), "a: shape .* not sizes"),
    "float size": (container({"a": entry("U8", [1.0], 0, 1)}, b"x"), r"a: shape \[1\.0\]"),
    "bool size": (container({"a": entry("U8", [True], 0, 1)}, b"x"), r"a: shape \[True\]"),
    "bool offset": (container({"a": entry("U8", [1], False, True)}, b"x"), "a: shape .* not sizes"),
    "three offsets": (container({"a": entry("U8", [1], 0, 1, 1)}, b"x"), "a: shape .* not sizes"),
    "2**60 elements": (
        container({"a": entry("U8", [2**60], 0, 1)}, b"x"),
        "takes 1152921504606846976 bytes",
    ),
    "2**63 elements": (container({"a": entry("U8", [2**63], 0, 1)}, b"x"), "a: shape"),
    "2**60 offsets": (
        container({"a": entry("U8", [2**60], 0, 2**60)}, b"x"),
        r"describes 1152921504606847176 bytes, the file has 201",
    ),
    "product overflows": (
        container({"a": entry("U8", [2**62, 4], 0, 0)}),
        "takes 18446744073709551616 bytes, data_offsets hold 0",
    ),
    "a million sides": (
        container({"a": entry("F32", [2**62] * 100_000, 0, 4)}, b"data"),
        "data_offsets hold 4",
    ),
    "size and offsets differ": (
        container({"a": entry("F32", [3], 0, 8)}, bytes(8)),
        r"a: F32 \[3\] takes 12 bytes, data_offsets hold 8",
    ),
    "offsets too wide": (container({"a": entry("U8", [1], 0, 2)}, b"xy"), "takes 1 bytes, .* 2$"),
    "half a byte": (container({"a": entry("F4", [3], 0, 1)}, b"x"), "takes 1.5 bytes"),
    "offsets swapped": (container({"a": entry("U8", [1], 1, 0)}, b"x"), "data_offsets hold -1"),
    "overlap": (
        container({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz"),
        "b starts at byte 201, expected 202",
    ),
    "hole": (
        container({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz"),
        "b starts at byte 202, expected 201",
    ),
    "hole at the start": (
        container({"a": entry("U8", [1], 1, 2)}, b"xy"),
        "a starts at byte 201, expected 200",
    ),
    "empty inside another": (
        container({"a": entry("U8", [2], 0, 2), "b": entry("U8", [0], 1, 1)}, b"xy"),
        "b starts at byte 201, expected 202",
    ),
    "empty beyond the end": (container({"a": entry("U8", [0], 9, 9)}), "a starts at byte 209"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_with_one_line(case: str, tmp_path: Path) -> None:
    content, message = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def mutate(good: bytes, chance: random.Random) -> bytes:
    """Change, insert, drop or repeat a few bytes, most of them in the header."""
    content = bytearray(good)
    for _ in range(chance.choice((1, 1, 2, 4))):
        where = chance.randrange(len(content) if chance.random() < 0.3 else len(content) - 60)
        kind = chance.randrange(4)
        if kind == 0:
            content[where] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[where] = chance.choice(b'0123456789{}[]",: ')
        elif kind == 2:
            del content[where : where + chance.randrange(1, 4)]
        else:
            content[where:where] = content[where : where + chance.randrange(1, 60)]
    if chance.random() < 0.6:  # a header length that fits again
        content[:8] = (len(content) - 48).to_bytes(8, "little")
    return bytes(content)


def test_mutated_files_open_as_the_reference_opens_them_or_are_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "a.safetensors"
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.ones(0), "c": torch.ones(4).half()}
    save_file(tensors | {"d": torch.tensor(1)}, path, {"format": "pt", "by": "x"})
    good = path.read_bytes()
    opened = 0
    for number in range(500):
        path.write_bytes(mutate(good, chance))
        try:
            found = ours(path)
        except CheckpointError:
            continue
        assert found == theirs(path), f"case {number}"
        opened += 1
    assert 20 < opened < 480  # both ways are exercised


def test_read_exactly_names_both_numbers_when_a_file_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    with (
        path.open("rb") as file,
        pytest.raises(CheckpointError, match="has 10 bytes, 14 are needed"),
    ):
        read_exactly(file.fileno(), 4, 14, memoryview(bytearray(10)), path)


def test_layout_keeps_the_order_but_puts_odd_sizes_last() -> None:
    parts = (("b", "U8", 8), ("odd", "U8", 3), ("two", "BF16", 1), ("a", "F32", 2), ("z", "F32", 1))
    specs = {name: TensorSpec(dtype, (count,)) for name, dtype, count in parts}
    _, ranges = layout(specs)
    assert list(ranges) == ["b", "a", "z", "two", "odd"]
    assert sorted(ranges, key=lambda name: ranges[name]) == list(ranges)


def test_a_header_over_the_references_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # a sparse file: nothing is written, and nothing may be read
        file.write((100_000_001).to_bytes(8, "little") + b"{}")
        file.truncate(200_000_000)
    assert theirs(path) is None
    with pytest.raises(CheckpointError, match="header of 100000001 bytes in a file of 200000000"):
        read_header(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    paths: list[Any] = [tmp_path / "none.safetensors", tmp_path, tmp_path / ("a" * 300)]
    for path in paths:
        with pytest.raises(CheckpointError, match="cannot read it"):
            read_header(path)


def test_a_usual_header_is_read_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all serializers write is matched in one pass. Damaged in any place, it is read, or
    refused, as if it were not."""
    specs = {
        "a.0": TensorSpec("BF16", (2, 4)),
        "b": TensorSpec("F32", ()),
        "c": TensorSpec("U8", (0,)),
    }
    text = layout(specs)[0][8:].rstrip()
    rng = random.Random(0)
    edits = [
        b"",
        b",",
        b"}",
        b"{",
        b'"',
        b"0",
        b"1",
        b"-",
        b" ",
        b"[",
        b"\\",
        b"\xff",
        b"\n",
        b".5",
    ]
    texts = [text, text.replace(b'"c"', b'"b"'), text.replace(b'"c"', b'"__metadata__"')]
    texts += [
        text.replace(b'{"format":"pt"}', v) for v in (b"null", b"[]", b'{"x":1}', b"{}", b"0")
    ]
    texts += [text.replace(b'"__metadata__":{"format":"pt"},', v) for v in (b"", b",", b'"z":{},')]
    for _ in range(1500):
        at = rng.randrange(len(text))
        texts.append(text[:at] + rng.choice(edits) + text[at + rng.randrange(2) :])
    outcomes: list[list[object]] = [[], []]
    path = tmp_path / "model.safetensors"
    for outcome, usual in zip(outcomes, (True, False), strict=True):
        if not usual:
            monkeypatch.setattr(header, "_ENTRY", re.compile("(?!)"))
        for changed in texts:
            path.write_bytes(raw(changed, bytes(20)))
            try:
                outcome.append(read_header(path))
            except CheckpointError as error:
                outcome.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert 10 < sum(isinstance(found, dict) for found in outcomes[0]) < 1000
