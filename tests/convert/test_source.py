"""Folders that are no usable checkpoint are refused with a message that says why and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from requant.convert.folder import INDEX_NAME, SINGLE_NAME, read_json
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError, FormatError, RequantError
from tests.helpers import CONFIG, LINEAR, decode, load, make_source, same, write_checkpoint

Edit = Callable[[Path], object]
FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def folder(source: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the FP8 checkpoint to spoil."""
    return shutil.copytree(source("fp8-block"), tmp_path / "model")


def edit_index(**changes: Any) -> Edit:
    """Place tensors elsewhere: `weight_map` entries by index of the sorted names."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        name = sorted(index["weight_map"])[0]
        index["weight_map"][name] = changes["file"]
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return edit


def edit_file(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Rewrite one weight file, and the index to match."""

    def edit(folder: Path) -> None:
        tensors = dict(load_one(folder / file))
        change(tensors)
        save_file(tensors, folder / file)
        weight_map = {}
        for name in FILES:
            weight_map |= dict.fromkeys(load_one(folder / name), name)
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def load_one(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def truncate(file: str, nbytes: int) -> Edit:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - nbytes)


def write(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


Q_PROJ = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Edit, str]] = {
    "no folder": (shutil.rmtree, r"model: no such folder"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), r"config\.json: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        r"config\.json: not a regular file of at most 100000000 bytes",
    ),
    "config is not JSON": (write("config.json", b"{"), r"config\.json: not valid JSON"),
    "config is not text": (write("config.json", b"\x80\xff"), r"config\.json: not valid JSON"),
    "config is deep": (write("config.json", b"[" * 200_000), r"config\.json: not valid JSON"),
    "config is a list": (write("config.json", b"[]"), r"config\.json: not a JSON object"),
    "index is not JSON": (write(INDEX_NAME, b"{"), r"index\.json: not valid JSON"),
    "index without map": (write(INDEX_NAME, b"{}"), r"index\.json: has no weight_map"),
    "index with empty map": (write(INDEX_NAME, b'{"weight_map":{}}'), "has no weight_map"),
    "index with a list": (write(INDEX_NAME, b'{"weight_map":[1]}'), "has no weight_map"),
    "absent file": (lambda f: (f / FILES[1]).unlink(), f"names {FILES[1]}, which is absent"),
    "file is a folder": (
        lambda f: ((f / FILES[1]).unlink(), (f / FILES[1]).mkdir()),
        f"names {FILES[1]}, which is absent",
    ),
    "file is a pipe": (
        lambda f: ((f / FILES[1]).unlink(), os.mkfifo(f / FILES[1])),
        f"names {FILES[1]}, which is absent",
    ),
    "path climbs out": (edit_index(file="../x.safetensors"), r"names '\.\./x\.safetensors', which"),
    "absolute path": (edit_index(file="/etc/x.safetensors"), "not a .safetensors file of this"),
    "path goes down": (edit_index(file="a/x.safetensors"), "not a .safetensors file of this"),
    "a pickle": (edit_index(file="pytorch_model.bin"), "not a .safetensors file of this"),
    "a number": (edit_index(file=3), "not a .safetensors file of this"),
    "a list": (edit_index(file=[]), "not a .safetensors file of this"),
    "a long name": (edit_index(file="x" * 300 + ".safetensors"), "File name too long"),
    "a name with NUL": (edit_index(file="\0.safetensors"), "which is absent"),
    "index and model.safetensors": (
        lambda f: shutil.copy(f / FILES[0], f / SINGLE_NAME),
        "holds both model.safetensors and model.safetensors.index.json",
    ),
    "files without index": (
        lambda f: (f / INDEX_NAME).unlink(),
        r"holds 3 \.safetensors files .* and no model\.safetensors\.index\.json",
    ),
    "only pickles": (
        lambda f: ([p.unlink() for p in f.glob("*.safetensors*")], write("a.bin", b"")(f)),
        r"no \.safetensors file; it has a\.bin, but pickle files are never opened",
    ),
    "no weights at all": (
        lambda f: [p.unlink() for p in f.glob("*.safetensors*")],
        r"holds no \.safetensors file$",
    ),
    "truncated file": (truncate(FILES[2], 1), rf"{FILES[2]}: the header describes .* truncated"),
    "tensor in another file than the index says": (
        edit_index(file=FILES[2]),
        f"places lm_head.weight in {FILES[2]}, which does not hold it",
    ),
    "tensor in two files": (
        lambda f: shutil.copy(f / FILES[0], f / FILES[1]),
        f"is in both {FILES[0]} and {FILES[1]}; remove the stale file",
    ),
    "weight without scale": (
        edit_file(FILES[1], lambda t: t.pop(f"{Q_PROJ}.weight_scale_inv")),
        rf"{Q_PROJ}\.weight: weight is F8_E4M3 and has no weight_scale_inv",
    ),
    "scale without weight": (
        edit_file(FILES[0], lambda t: t.pop(f"{Q_PROJ}.weight")),
        rf"{Q_PROJ}\.weight_scale_inv lies alone, the rest of its weight",
    ),
    "scale of another shape": (
        edit_file(FILES[1], lambda t: t.update({f"{Q_PROJ}.weight_scale_inv": torch.ones(1, 2)})),
        rf"{Q_PROJ}\.weight: weight_scale_inv is \[1, 2\], expected \[2, 2\] for a \[160, 256\]",
    ),
    "two scales": (
        edit_file(FILES[1], lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(2, 2)})),
        rf"{Q_PROJ}\.weight: stored as .*, which no format",
    ),
    "fused FP8 experts": (
        edit_file(FILES[0], lambda t: t.update(
            {"experts.gate_up_proj": torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)}
        )),
        r"experts\.0\.gate_proj\.weight: weight is F8_E4M3 and has no weight_scale_inv",
    ),
    "packed experts of another format": (
        edit_file(FILES[0], lambda t: t.update(
            {"experts.gate_up_proj_blocks": torch.zeros(2, 4, 4, dtype=torch.uint8)}
        )),
        r"experts\.gate_up_proj_blocks is U8 \[2, 4, 4\]: quantized, but in no format",
    ),
    "two names for one weight": (
        edit_file(FILES[0], lambda t: t.update(
            {"weight": torch.ones(1, 2), ".weight": torch.zeros(1, 2)}
        )),
        "are one name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folder: Path) -> None:
    edit, message = REFUSED[case]
    edit(folder)
    with pytest.raises(RequantError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_too_long_or_a_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        Checkpoint.open(folder / ("x" * 300))
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(folder / "config.json")


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        Checkpoint.open(tmp_path)


def test_an_index_beside_the_only_file_is_welcome(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(3)}
    folder = write_checkpoint(tmp_path / "m", tensors, CONFIG, lambda name: SINGLE_NAME)
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE_NAME)})
    )
    assert Checkpoint.open(folder).files == (SINGLE_NAME,)


@pytest.mark.parametrize(
    "format_text", ["bf16", "fp8-block", "int8-channel", "int4[group_size=32]"]
)
def test_decodes_what_the_codec_decodes(format_text: str, tmp_path: Path) -> None:
    from requant.quant import parse_format

    folder = make_source(tmp_path / "m", format_text)
    checkpoint, stored = Checkpoint.open(folder), load(folder)
    expected = decode(stored, parse_format(format_text))
    for module, shape in LINEAR.items():
        weight = checkpoint.weights[f"{module}.weight"]
        assert weight.shape == shape and weight.format == format_text
        assert same(checkpoint.decode(weight.name), expected[weight.name])
    assert checkpoint.nbytes == sum(t.nbytes for t in stored.values())
    assert same(checkpoint.decode("model.layers.1.steps"), torch.tensor(7.0))
    with pytest.raises(CheckpointError, match="has no tensor nowhere"):
        checkpoint.decode("nowhere")


def test_scales_lie_in_other_files(source: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(source("fp8-block"))
    parts = checkpoint.weights[f"{Q_PROJ}.weight"].parts
    assert parts["weight"].location.file == FILES[0]
    assert parts["weight_scale_inv"].location.file == FILES[1]


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / FILES[0], 5000)
    with pytest.raises(CheckpointError, match=rf"{FILES[0]}: has 5000 bytes, \d+ are needed"):
        checkpoint.decode(f"{Q_PROJ}.weight")


def test_a_file_that_is_gone_when_it_is_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{FILES[0]}: No such file"):
        checkpoint.decode(f"{Q_PROJ}.weight")


def test_the_block_size_comes_from_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 128]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"expected \[\d+, \d+\] .* in 64x128 blocks"):
        Checkpoint.open(folder)


def test_a_nested_quantization_config_counts(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    nested = {"quantization_config": config.pop("quantization_config"), **CONFIG}
    (folder / "config.json").write_text(json.dumps({"text_config": nested}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.quantization_config == nested["quantization_config"]
    assert checkpoint.weights["model.layers.2.eh_proj.weight"].role == "mtp"


def test_empty_matrices_are_copied_not_read_as_weights(tmp_path: Path) -> None:
    tensors = {f"{Q_PROJ}.weight": torch.empty(0, 4), "a.weight": torch.empty(4, 0)}
    weights = Checkpoint.open(write_checkpoint(tmp_path / "m", tensors, CONFIG)).weights
    assert all(weight.codec is None for weight in weights.values())


def test_json_nested_too_deep_is_refused(tmp_path: Path) -> None:
    """What json still reads, and recursive functions would not survive."""
    path = tmp_path / "config.json"
    for depth, fits in ((64, True), (65, False), (700, False)):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        if fits:
            read_json(path, "")
            continue
        with pytest.raises(CheckpointError, match="config.json: nested deeper than 64 levels"):
            read_json(path, "")
