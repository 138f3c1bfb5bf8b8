"""Disks that fail, sources that change, folders without permission: what is said, what is left, and
that the same command continues once the cause is gone."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import requant.convert.readahead as readahead
import requant.convert.reader as reader
import requant.convert.steps as steps
import requant.convert.writer as writer
from requant.convert.folder import INDEX_NAME
from requant.convert.header import read_header
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from tests.convert.team import together, without_privileges
from tests.helpers import CPU, INDEX, Tensors, hashes

FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
PREADV = os.preadv


def start(folder: Path, out: Path, to: str = "bf16", overwrite: bool = False) -> dict[str, Any]:
    plan = make_plan(Checkpoint.open(folder), default_recipe(to))
    return convert(plan, out, Runtime(CPU, 2), overwrite=overwrite)


def nothing_looks_complete(out: Path) -> bool:
    left = set(hashes(out)) if out.exists() else set()
    partial = [name for name in left if name.endswith(".partial")]
    return not left & {"config.json", MANIFEST_NAME} and not partial


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many reads and writes of a small checkpoint, all of the kinds that a large one takes."""
    for module in (readahead, writer):
        monkeypatch.setattr(module, "WINDOW_BYTES", 1 << 14)
    monkeypatch.setattr(reader, "DIRECT_BYTES", 1 << 12)
    monkeypatch.setattr(steps, "TILE_ELEMENTS", 1 << 13)
    monkeypatch.setattr(steps, "CHUNK_ELEMENTS", 1 << 13)


class BadSectors:
    """os.preadv of a disk that cannot read some bytes of a file."""

    def __init__(self, path: Path, begin: int, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.begin, self.end = path, begin, end
        monkeypatch.setattr(os, "preadv", self.read)

    def read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        same = os.path.samestat(os.fstat(descriptor), self.path.stat())
        if same and offset < self.end and offset + len(buffers[0]) > self.begin:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return PREADV(descriptor, buffers, offset)


@pytest.mark.parametrize("to", ["bf16", "nvfp4"])  # one pass, and two
@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_cannot_be_read(
    seed: int, to: str, folder: Path, out: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder, out.parent / "whole", to)
    chance = random.Random(seed)
    path = folder / chance.choice(FILES)
    bad = chance.randrange(10_000, path.stat().st_size)  # behind the header
    message = rf"{path}: Input/output error at byte (\d+); check the disk"
    with monkeypatch.context() as patch:
        BadSectors(path, bad, bad + 1, patch)
        with pytest.raises(CheckpointError, match=message):
            start(folder, out, to)
    assert nothing_looks_complete(out)
    assert start(folder, out, to)["resumed_files"] <= FILES.index(path.name)
    assert hashes(out) == hashes(out.parent / "whole")


def test_scales_that_cannot_be_read(
    folder: Path, out: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in another file than their weight's, which is read ahead."""
    start(folder, out.parent / "whole")
    checkpoint = Checkpoint.open(folder)
    weight = next(w for w in checkpoint.weights.values() if len(w.parts) == 2)
    scale = next(part for part in weight.parts.values() if part is not weight.codes)
    place = scale.location
    assert place.file != weight.file
    with monkeypatch.context() as patch:
        BadSectors(folder / place.file, place.begin, place.end, patch)
        with pytest.raises(CheckpointError, match=f"{place.file}: Input/output error at byte "):
            start(folder, out)
    assert nothing_looks_complete(out)
    start(folder, out)
    assert hashes(out) == hashes(out.parent / "whole")


def test_content_that_the_plan_looks_at_and_cannot_read(
    source: Callable[[str], Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source("nf4[double_quant=true]")
    (name, location) = next(
        (name, location)
        for file in FILES
        for name, (_, location) in read_header(folder / file).items()
        if "quant_state" in name
    )
    with monkeypatch.context() as patch:
        BadSectors(folder / location.file, location.begin, location.end, patch)
        message = f"{location.file}: Input/output error at byte {location.begin}; check the disk"
        with pytest.raises(CheckpointError, match=message):
            start(folder, out)
    assert not out.exists()
    start(folder, out)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    before = path.read_bytes()
    path.write_bytes(before[:-8] + b"\0" * 8)


def replace(path: Path) -> None:
    """As a download does: another file under the same name, the old one still open."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


CHANGES = [shrink, grow, rewrite, replace]


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_read(
    change: Callable[[Path], None], folder: Path, out: Path, small_steps: None
) -> None:
    original = (folder / FILES[1]).read_bytes()
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    changed = False

    def progress(nbytes: int) -> None:
        nonlocal changed
        if (out / FILES[0]).exists() and not changed:
            changed = True
            change(folder / FILES[1])

    with pytest.raises(CheckpointError, match=FILES[1]) as caught:
        convert(plan, out, Runtime(CPU, 2), progress)
    assert "while being read" in str(caught.value)
    assert nothing_looks_complete(out) and set(hashes(out)) == {FILES[0], JOURNAL_NAME}
    # What was finished came from another source: it is kept, and not continued.
    (folder / FILES[1]).write_bytes(original)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source"):
        start(folder, out)
    start(folder, out, overwrite=True)
    start(folder, out.parent / "whole")
    assert hashes(out) == hashes(out.parent / "whole")


@pytest.mark.parametrize("change", [grow, rewrite])
def test_a_file_of_nothing_but_scales_that_changes(
    change: Callable[[Path], None], folder: Path, out: Path
) -> None:
    """No output file mirrors it; it is read to the end when all others are done."""
    place = "scales.safetensors"
    split_scales(folder, place)
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    assert place in plan.source.files and place not in [file.name for file in plan.files]
    changed = False

    def progress(nbytes: int) -> None:
        nonlocal changed
        if not changed:
            changed = True
            change(folder / place)

    with pytest.raises(CheckpointError, match=f"{place}: changed while being read"):
        convert(plan, out, Runtime(CPU, 2), progress)
    assert nothing_looks_complete(out)


def split_scales(folder: Path, place: str) -> None:
    """Move all scales into a file of their own."""
    index = json.loads((folder / INDEX).read_text())
    scales: Tensors = {}
    for file in FILES:
        tensors = load_file(folder / file)
        moved = {name: t for name, t in tensors.items() if name.endswith("scale_inv")}
        scales |= moved
        save_file({n: t for n, t in tensors.items() if n not in moved}, folder / file)
    save_file(scales, folder / place)
    index["weight_map"] |= dict.fromkeys(scales, place)
    (folder / INDEX).write_text(json.dumps(index))


class Refusal:
    """An os function that fails for paths, or descriptors of files, that end in something."""

    def __init__(self, call: str, ending: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ending, self.code, self.refused = ending, code, 0
        real = getattr(os, call)

        def refusing(target: Any, *args: Any, **options: Any) -> Any:
            path = f"/proc/self/fd/{target}" if isinstance(target, int) else None
            name = os.readlink(path) if path else str(target)
            if name.endswith(ending) and os.path.exists(name):
                self.refused += 1
                raise OSError(code, os.strerror(code))
            return real(target, *args, **options)

        monkeypatch.setattr(os, call, refusing)


@pytest.mark.parametrize(
    ("call", "ending"),
    [
        ("fsync", f"{FILES[1]}.partial"),
        ("rename", f"{FILES[1]}.partial"),
        ("rename", f"{INDEX_NAME}.partial"),
        ("rename", "config.json.partial"),
        ("rename", f"{MANIFEST_NAME}.partial"),
        ("fsync", "tokenizer.json.partial"),
        ("pwrite", "accuracy.png.partial"),
        ("fsync", JOURNAL_NAME),
    ],
)
def test_a_disk_that_is_full_at_the_last_moment(
    call: str, ending: str, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder, out.parent / "whole")
    with monkeypatch.context() as patch:
        refusal = Refusal(call, ending, errno.ENOSPC, patch)
        with pytest.raises(CheckpointError, match=r"No space left on device \(\d+ bytes free\)"):
            start(folder, out)
    assert refusal.refused == 1
    left = hashes(out) if out.exists() else {}
    assert MANIFEST_NAME not in left and not [n for n in left if n.endswith(".partial")]
    start(folder, out)
    assert hashes(out) == hashes(out.parent / "whole")


def test_a_disk_that_turns_read_only(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the unfinished file cannot be removed either; that must not hide what happened."""
    start(folder, out.parent / "whole")
    with monkeypatch.context() as patch:
        for call in ("pwrite", "unlink"):
            Refusal(call, f"{FILES[1]}.partial", errno.EROFS, patch)
        with pytest.raises(CheckpointError, match=f"{FILES[1]}.*: Read-only file system"):
            start(folder, out)
    assert (out / f"{FILES[1]}.partial").exists() and not (out / "config.json").exists()
    assert start(folder, out)["resumed_files"] == 1
    assert hashes(out) == hashes(out.parent / "whole")


@pytest.mark.parametrize(
    ("closed", "mode", "message"),
    [
        (f"model/{FILES[1]}", 0, f"{FILES[1]}: Permission denied"),
        ("model", 0, "config.json: Permission denied"),
        ("model/tokenizer.json", 0, "tokenizer.json: Permission denied; cannot copy it"),
        ("out", 0o555, "out/.requant-journal.jsonl|out/requant.json: cannot write: Permission"),
        (".", 0o555, "out: cannot write: Permission denied"),
    ],
)
def test_without_permission(
    closed: str, mode: int, message: str, folder: Path, out: Path, tmp_path: Path
) -> None:
    """Said in one line."""
    said = tmp_path / "said"
    said.mkdir()
    if closed == "out":
        out.mkdir()
    place = tmp_path / closed
    place.chmod(mode)
    try:
        arguments = [folder, out, "--to", "bf16", "--json"]
        codes, (child,) = together(1, arguments, said, without_privileges)
    finally:
        place.chmod(0o755)
    assert codes == [2] and child.stdout == "", child.stderr
    assert re.fullmatch(f"error: .*({message}).*\n", child.stderr), child.stderr
    assert nothing_looks_complete(out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """A file system of a size that can be changed, at tmp_path/disk."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(place)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not shutil.which("mount") or not mount("size=64k"):
        pytest.skip("needs to mount a file system")
    try:
        yield lambda kilobytes: None if mount(f"size={kilobytes}k", "remount") else pytest.fail()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    folder: Path, tmp_path: Path, disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused beforehand; filled by somebody else meanwhile; and continued on a larger one."""
    start(folder, tmp_path / "whole")
    out = tmp_path / "disk" / "out"
    with pytest.raises(CheckpointError, match=r"\d+ bytes are to be written, \d+ are free"):
        start(folder, out)
    assert not out.exists()
    total = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    disk(total // 1024 + 200)
    filler = tmp_path / "disk" / "filler"

    def progress(nbytes: int) -> None:
        if (out / FILES[0]).exists() and not filler.exists():
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    if file.write(bytes(4096)) < 4096:
                        raise OSError

    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    with pytest.raises(CheckpointError, match=r"No space left on device \(\d+ bytes free\)"):
        convert(plan, out, Runtime(CPU, 2), progress)
    assert nothing_looks_complete(out)
    disk(total // 1024 * 3 + 1000)
    assert start(folder, out)["resumed_files"] == 1
    assert hashes(out) == hashes(tmp_path / "whole")
