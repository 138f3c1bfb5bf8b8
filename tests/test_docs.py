"""docs/FORMATS.md and CONTRIBUTING.md say what the code does: configs, examples, options, code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from requant.quant import CODECS, Codec, describe_formats, parse_format
from requant.quant.codec import Codes, bits_per_weight
from requant.quant.integer import _CLIP_PAIRS
from requant.quant.nf4 import MAPS
from requant.quant.nvfp4 import _STEPS
from requant.quant.packing import unpack_nibbles
from requant.quant.search import CLIPS

ROOT = Path(__file__).resolve().parent.parent
FORMATS = (ROOT / "docs" / "FORMATS.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")

#: Heading -> text of its section, up to the next one.
SECTIONS = dict(re.findall(r"^##+ (.+)\n((?:(?!^##+ ).*\n?)*)", FORMATS, re.MULTILINE))
#: What stays in plain floats in the configs of the page.
KEPT = ["lm_head"]


def table(text: str, first: str) -> list[list[str]]:
    """The cells below the header that begins with the column `first`."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines[2:]]


def words(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def anchor(heading: str) -> str:
    """What a link to a heading says after `#`, as GitHub makes it."""
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


def named(heading: str) -> set[str]:
    """The formats that a section is about."""
    found = set(re.findall(r"[\w-]+", heading)) - {"and"}
    return found if found <= {codec.name for codec in CODECS} else set()


def numbers(values: torch.Tensor) -> str:
    """Values as the page writes them."""
    return ", ".join(f"{float(value):.7g}" for value in values.flatten())


def digits(codes: torch.Tensor) -> str:
    """Codes of 4 bits as the page writes them."""
    return " ".join(f"{int(code):x}" for code in codes)


OVERVIEW = {
    name: (format_row, place)
    for format_row in table(FORMATS, "format")
    for place, name in enumerate(words(format_row[0]))
}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(codec.name))
def test_every_format_has_a_row_and_a_section(codec: Codec) -> None:
    row, place = OVERVIEW[codec.name]
    (link,) = re.findall(r"\(#(.+)\)", row[0])
    assert link in map(anchor, SECTIONS)
    assert words(row[1]) == list(codec.specs(128, 128))
    bits = f"{bits_per_weight(codec):.3f}".rstrip("0").rstrip(".")
    assert bits == re.findall(r"[\d.]+", row[2])[place]
    assert (codec.quant_method or "none") in row[3].split("; ")


def test_overview_has_no_other_formats() -> None:
    assert set(OVERVIEW) == {codec.name for codec in CODECS}
    (_, _, bits, _), _ = OVERVIEW["int4"]
    assert f"{bits_per_weight(parse_format('int4[group_size=32]')):.1f})" in bits


CONFIGS = re.findall(r"`([^`\n]+)`:\n```json\n(.*?)```", FORMATS, re.DOTALL)
SCHEMES = table(FORMATS, "scheme of")


@pytest.mark.parametrize(("text", "config"), CONFIGS, ids=[text for text, _ in CONFIGS])
def test_configs(text: str, config: str) -> None:
    expected: Any = parse_format(text).config(KEPT)
    shown = json.loads(config)
    for each in (expected, shown):
        each.pop("producer", None)  # has the version
    assert list(shown) == list(expected) and shown == expected


def test_configs_of_compressed_tensors() -> None:
    (config,) = re.findall(r"that of `int4`:\n```json\n(.*?)```", FORMATS, re.DOTALL)
    assert json.loads(config) == parse_format("int4").config(KEPT)
    for text, weights, activations, container in SCHEMES:
        assert parse_format(*words(text)).scheme() == {
            "weights": json.loads(*words(weights)),
            "input_activations": json.loads(*words(activations)),
            "output_activations": None,
            "format": container,
        }


def test_every_format_has_its_config_on_the_page() -> None:
    shown = {parse_format(text).name for text, _ in CONFIGS}
    shown |= {parse_format(*words(row[0])).name for row in SCHEMES}
    with_config = {codec.name for codec in CODECS if codec.quant_method is not None}
    assert shown | {"bnb-fp4"} == with_config  # nf4's but for one word


@pytest.mark.parametrize("described", describe_formats(), ids=lambda d: str(d["name"]))
def test_options_and_their_defaults(described: dict[str, Any]) -> None:
    (section,) = (text for heading, text in SECTIONS.items() if described["name"] in named(heading))
    lines = re.findall(r"\*\*Options\.\*\*(.*?)\n\n", section, re.DOTALL)
    options = re.findall(r"`(\w+)=([\w.-]+)`\s\(", "".join(lines))
    assert dict(options) == {k: str(v).lower() for k, v in described["options"].items()}
    assert len(options) == len(described["options"])


def test_formats_with_options_can_be_parsed() -> None:
    texts = re.findall(r"`([a-z][a-z0-9-]*\[\w+=[^`]*\])`", FORMATS)
    assert len(texts) > 20
    for text in texts:
        parse_format(text)


def examples() -> list[tuple[str, str, str, str, str]]:
    """(vector, format, part, bytes, read as)."""
    found, vector, text = [], "", ""
    for rows in re.findall(r"\| example \|.*\n\|[-|]+\n((?:\|.*\n)+)", FORMATS):
        for row in rows.splitlines():
            example, part, content, read = (cell.strip() for cell in row[1:-1].split("|"))
            vector, text = words(example) or (vector, text)
            found.append((vector, text, part.strip("`"), content.strip("`"), read))
    return found


#: Has an exact half among its first codes, which may fall either way (test_int4_gptq.py).
TIES = {("gptq_asym_g32", "qweight")}


@pytest.mark.parametrize(("vector", "text", "part", "content", "read"), examples())
def test_examples(vector: str, text: str, part: str, content: str, read: str) -> None:
    """The bytes are the vector's and what encode gives; the numbers are what they stand for."""
    tensors = load_file(ROOT / "tests" / "vectors" / f"{vector}.safetensors")
    source = tensors["input.weight"].to(torch.float32)
    assert numbers(source[0, :4]) == "-0.4882812, -0.2460938, -0.00390625, 0.2382812"
    codec = parse_format(text)
    prefixes = ("stored.", f"stored_v{getattr(codec, 'version', '')}.")
    stored = {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(prefixes)}
    rows, cols = source.shape
    if part == "decoded":
        assert read == numbers(codec.decode(stored, (rows, cols))[0, :4])
        return
    encoded = codec.encode(source, (rows, cols))
    for tensor in (stored[part], stored[part] if (vector, part) in TIES else encoded[part]):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)[: len(content.split())]
        assert bytes(raw.tolist()).hex(" ") == content
    if not read.startswith(("codes", "zero points")):
        count = len(content.split()) // stored[part].itemsize
        assert read == numbers(stored[part].reshape(-1)[:count].to(torch.float32))
    elif codec.alphabet is None:  # the high nibble first
        assert read == "codes " + " ".join(content.replace(" ", ""))
    else:
        assert read == read_words(codec.unpack(stored, (rows, cols)), codec.name, read)


def read_words(codes: Codes, name: str, read: str) -> str:
    """The first eight codes or zero points, in the order that they are packed in."""
    if read.startswith("zero points"):
        zero = codes.zero if codes.zero is not None else torch.full((8, 1), 8)
        return f"zero points {digits(zero[:8, 0])}"
    assert codes.codes is not None
    held = codes.codes
    if codes.alphabet in ("int4", "e2m1"):
        held = unpack_nibbles(held, 2 * held.shape[1])
    return f"codes {digits(held[:8, 0] if name == 'int4-awq' else held[0, :8])}"


def test_example_of_fp4_raised_to_fp8() -> None:
    (content, scale) = re.findall(r"becomes FP8 codes `([^`]+)` .* scale byte\s+`(\w+)`", FORMATS)[
        0
    ]
    tensors = load_file(ROOT / "tests" / "vectors" / "deepseek_v4_fp4_128x256.safetensors")
    parts = {part: tensors[f"stored.{part}"] for part in ("weight", "scale")}
    codes = parse_format("mxfp4[container=deepseek-v4]").unpack(parts, (128, 256))
    raised = parse_format("fp8-block[container=deepseek-v4,scale=e8m0]").pack(codes, (128, 256))
    assert bytes(raised["weight"].view(torch.uint8)[0, :4].tolist()).hex(" ") == content
    assert bytes(raised["scale"].view(torch.uint8)[0, :1].tolist()).hex() == scale


def test_maps_and_quant_state_of_bitsandbytes() -> None:
    rows = table(SECTIONS["nf4 and bnb-fp4"], "code")
    cells = [row[:3] for row in rows] + [row[3:] for row in rows]
    assert [int(code, 16) for code, _, _ in cells] == list(range(16))
    for place, kind in enumerate(("nf4", "fp4"), start=1):
        assert [cell[place] for cell in cells] == [f"{value:.7g}" for value in MAPS[kind]]
    shown = re.findall(r"^\{\"quant_type\".*?\}$", FORMATS, re.MULTILINE | re.DOTALL)
    for text, vector in zip(shown, ("bnb_nf4", "bnb_nf4_dq"), strict=True):
        tensors = load_file(ROOT / "tests" / "vectors" / f"{vector}.safetensors")
        state = bytes(tensors["stored.weight.quant_state.bitsandbytes__nf4"].tolist())
        assert text.replace("\n", "") == state.decode()


def test_numbers_of_candidates() -> None:
    rows = table(SECTIONS["method=mse"], "format")
    counts = [int(row[1].rpartition(": ")[2]) for row in rows]
    assert counts == [len(CLIPS), len(_CLIP_PAIRS), len(CLIPS), 2, len(_STEPS)]
    assert f"{', '.join(map(str, _STEPS))} E4M3 codes" in rows[-1][1]


@pytest.mark.parametrize("page", ["docs/FORMATS.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    headings = set(map(anchor, re.findall(r"^##* (.+)$", text, re.MULTILINE)))
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", prose):
        path, _, heading = target.partition("#")
        assert (ROOT / page).parent.joinpath(path).exists() if path else heading in headings, target


QUOTES = re.findall(r"`([\w/.]+)`:\n+```\w*\n(.*?)```", CONTRIBUTING, re.DOTALL)


@pytest.mark.parametrize(("file", "quote"), QUOTES)
def test_quoted_lines_are_in_the_file(file: str, quote: str) -> None:
    """In order, but for `...`, which stands for lines that are left out."""
    lines = iter((ROOT / file).read_text("utf-8").splitlines())
    for line in quote.splitlines():
        assert not line.strip() or line.strip() == "..." or line in lines, line


def test_the_walk_through_quotes_all_that_it_takes() -> None:
    files = [file for file, _ in QUOTES]
    assert "requant/quant/fp8_channel.py" in files and "requant/quant/__init__.py" in files
