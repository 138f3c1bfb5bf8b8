"""What lies beside the weights: copied byte for byte, or refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import requant.convert.run as run
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from tests.helpers import CPU, hashes, load


def start(folder: Path, out: Path) -> None:
    convert(make_plan(Checkpoint.open(folder), default_recipe("bf16")), out, Runtime(CPU, 2))


SIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (lambda f: (f / "x").symlink_to("/etc/passwd"), "links to /etc/passwd, out of the"),
    "link up": (lambda f: (f / "x").symlink_to("../secret"), "links to .*secret, out of the"),
    "dangling link": (lambda f: (f / "x").symlink_to("nowhere"), "x: not a regular file"),
    "link to itself": (lambda f: (f / "x").symlink_to("x"), "x: not a regular file"),
    "pipe": (lambda f: os.mkfifo(f / "x"), "x: not a regular file; remove it"),
    "linked folder": (lambda f: (f / "x").symlink_to(f / "figures"), "x: a link to a folder"),
}


@pytest.mark.parametrize("case", SIDE)
def test_side_files_that_cannot_be_copied(
    case: str, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = SIDE[case]
    make(folder)
    monkeypatch.setattr(run, "_write_files", None)  # no weight may be written before
    with pytest.raises(CheckpointError, match=message):
        start(folder, out)
    assert not out.exists()


def test_what_is_no_side_file(folder: Path, out: Path) -> None:
    left_out = ["hf_quant_config.json", "requant.json", "pytorch_model.bin", "model.gguf",
                "consolidated.pth", "stale.safetensors", ".gitattributes", ".cache/x",
                "pytorch_model.bin.index.json", "a.safetensors.partial"]  # fmt: skip
    for name in left_out:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    (folder / "inside.txt").symlink_to("LICENSE")
    start(folder, out)
    assert not [name for name in left_out if name != "requant.json" and (out / name).exists()]
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    assert plan.summary()["ignored_files"] == ["stale.safetensors"]
    assert (out / "inside.txt").read_bytes() == b"MIT\n" and not (out / "inside.txt").is_symlink()


def test_the_blobs_of_a_hub_cache_are_followed(folder: Path, out: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    blobs = tmp_path / "hub/models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    start(snapshot, out)
    start(folder, tmp_path / "plain")
    assert load(out).keys() == load(tmp_path / "plain").keys()
    assert hashes(out)["tokenizer.json"] == hashes(folder)["tokenizer.json"]


def test_a_config_that_is_not_unicode(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["odd"] = "\ud800 \u00e9"
    (folder / "config.json").write_text(json.dumps(config))
    start(folder, out)
    assert json.loads((out / "config.json").read_text())["odd"] == "\ud800 \u00e9"
