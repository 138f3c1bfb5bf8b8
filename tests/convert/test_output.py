"""What may lie in OUT, disks that say no, and what a repeated command finds."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import requant.convert.run as run
import requant.convert.writer as writer
from requant.convert.folder import INDEX_NAME
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, Journal
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from tests.helpers import CPU, hashes

FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def start(folder: Path, out: Path, to: str = "bf16") -> dict[str, Any]:
    plan = make_plan(Checkpoint.open(folder), default_recipe(to))
    return convert(plan, out, Runtime(CPU, 2))


def refuse(folder: Path, out: Path, message: str, to: str = "bf16") -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        start(folder, out, to)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["notes.txt", ".hidden", "config.json", "sub/file", FILES[0]])
def test_a_folder_with_something_else_is_left_alone(content: str, folder: Path, out: Path) -> None:
    (out / content).parent.mkdir(parents=True)
    (out / content).write_text("mine")
    before = hashes(out)
    refuse(folder, out, rf"already holds something else \({Path(content).parts[0]}, \.\.\.\)")
    assert hashes(out) == before


def test_another_finished_conversion_is_left_alone(folder: Path, out: Path) -> None:
    start(folder, out)
    before = hashes(out)
    refuse(folder, out, "already holds something else", to="fp32")
    assert hashes(out) == before


@pytest.mark.parametrize("inside", ["", "out", "a/b/out"])
def test_out_inside_the_source(inside: str, folder: Path, tmp_path: Path) -> None:
    before = hashes(folder)
    refuse(folder, folder / inside, "lies in the source folder")
    (tmp_path / "link").symlink_to(folder)
    refuse(folder, tmp_path / "link" / inside, "lies in the source folder")
    assert hashes(folder) == before and not (folder / "a").exists()


def test_out_that_cannot_be_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refuse(folder, tmp_path / "file", "is a file; choose a folder")
    refuse(folder, tmp_path / "file" / "out", "cannot write: Not a directory")
    refuse(folder, tmp_path / ("x" * 300), "cannot write: File name too long")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuse(folder, tmp_path / "loop", "cannot write: File exists")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_fine(folder: Path, out: Path) -> None:
    out.mkdir()
    start(folder, out)
    start(folder, out.parent / "a/b/c")
    assert hashes(out)["config.json"] == hashes(out.parent / "a/b/c")["config.json"]


def test_a_second_process_is_refused(folder: Path, out: Path) -> None:
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    out.mkdir()
    first = Journal(out, plan.key)
    refuse(folder, out, "another requant is writing to it; wait for it")
    assert first.path.exists()
    first.close()
    start(folder, out)


def test_a_disk_that_is_too_small(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    start(folder, out)
    total = (
        sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        - (out / MANIFEST_NAME).stat().st_size
    )
    shutil.rmtree(out)
    assert total > plan.written_bytes
    usage = shutil.disk_usage("/")._replace(free=total - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse(folder, out, f"{total} bytes are to be written, {usage.free} are free")
    assert not out.exists()


class Disk:
    """os.pwrite and os.write, until `room` calls are used up; then the disk is full."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        monkeypatch.setattr(os, "pwrite", self.counted(os.pwrite))
        monkeypatch.setattr(os, "ftruncate", self.counted(os.ftruncate))
        monkeypatch.setattr(os, "fsync", self.counted(os.fsync))

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def full(*args: Any) -> Any:
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args)

        return full


def test_a_disk_that_fills_up_at_any_moment(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WINDOW_BYTES", 1 << 15)
    start(folder, out)
    expected, room, refused = hashes(out), 0, 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch:
            Disk(room, patch)
            try:
                start(folder, out)
                break
            except CheckpointError as error:
                assert "No space left on device" in str(error), room
                refused += 1
        left = set(hashes(out)) if out.exists() else set()
        assert MANIFEST_NAME not in left or left >= set(expected), room
        assert not [name for name in left if name.endswith(".safetensors.partial")], room
        if room % 6 == 0:
            start(folder, out)
            assert hashes(out) == expected, room
        room += 2
    assert hashes(out) == expected and refused > 25


@pytest.mark.parametrize("state", ["finished", "unfinished", "absent", "empty"])
def test_overwrite_starts_over(state: str, folder: Path, out: Path, tmp_path: Path) -> None:
    start(folder, tmp_path / "whole", to="fp32")
    if state == "finished":
        start(folder, out)
    elif state == "unfinished":
        unfinished(folder, out)
    elif state == "empty":
        out.mkdir()
    plan = make_plan(Checkpoint.open(folder), default_recipe("fp32"))
    result = convert(plan, out, Runtime(CPU, 1), overwrite=True)
    assert result["resumed_files"] == 0 and hashes(out) == hashes(tmp_path / "whole")


def test_overwrite_removes_nothing_but_conversions(folder: Path, out: Path) -> None:
    plan = make_plan(Checkpoint.open(folder), default_recipe("fp32"))
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no conversion of requant's"):
        convert(plan, out, Runtime(CPU, 1), overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    for place in (folder, folder.parent):
        with pytest.raises(CheckpointError, match="source folder"):
            convert(plan, place, Runtime(CPU, 1), overwrite=True)
    assert Checkpoint.open(folder).weights


def test_overwrite_waits_for_nobody(folder: Path, out: Path) -> None:
    unfinished(folder, out)
    before = hashes(out)
    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    journal = Journal(out, plan.key)
    with pytest.raises(CheckpointError, match="another requant is writing to it"):
        convert(plan, out, Runtime(CPU, 1), overwrite=True)
    journal.close()
    assert hashes(out) == before


def test_a_conversion_of_something_else_is_not_resumed(folder: Path, out: Path) -> None:
    unfinished(folder, out)
    before = hashes(out)
    refuse(folder, out, "unfinished conversion of another source, recipe or version", to="fp32")
    os.utime(folder / FILES[0], ns=(1, 1))
    refuse(folder, out, "unfinished conversion of another source, recipe or version")
    assert hashes(out) == before


def unfinished(folder: Path, out: Path) -> None:
    """Stop after the first of three files."""

    def progress(nbytes: int) -> None:
        if (out / FILES[0]).exists():
            raise KeyboardInterrupt

    plan = make_plan(Checkpoint.open(folder), default_recipe("bf16"))
    with pytest.raises(KeyboardInterrupt):
        convert(plan, out, Runtime(CPU, 1), progress)
    assert set(hashes(out)) == {FILES[0], JOURNAL_NAME}


def test_an_interrupted_conversion_continues(folder: Path, out: Path) -> None:
    start(folder, out.parent / "whole")
    unfinished(folder, out)
    stat = (out / FILES[0]).stat()
    assert start(folder, out)["resumed_files"] == 1
    assert (out / FILES[0]).stat().st_mtime_ns == stat.st_mtime_ns
    assert hashes(out) == hashes(out.parent / "whole")


@pytest.mark.parametrize("spoil", ["shorter", "gone", "torn journal"])
def test_what_was_finished_is_checked_before_it_is_trusted(
    spoil: str, folder: Path, out: Path
) -> None:
    start(folder, out.parent / "whole")
    unfinished(folder, out)
    if spoil == "shorter":
        os.truncate(out / FILES[0], 100)
    elif spoil == "gone":
        (out / FILES[0]).unlink()
    else:
        os.truncate(out / JOURNAL_NAME, (out / JOURNAL_NAME).stat().st_size - 1)
    assert start(folder, out)["resumed_files"] == 0
    assert hashes(out) == hashes(out.parent / "whole")


@pytest.mark.parametrize("text", ["{}\n", "[]\n", "what\n", "\0\n", '{"key": 1}\n{}\n'])
def test_a_damaged_journal(text: str, folder: Path, out: Path) -> None:
    unfinished(folder, out)
    (out / JOURNAL_NAME).write_text(text)
    refuse(folder, out, rf"{JOURNAL_NAME}: damaged \(.*\); remove ")


def test_the_manifest_holds_the_hash_of_every_file(folder: Path, out: Path) -> None:
    """Hashed while writing, by a run and by the one that continues it."""
    unfinished(folder, out)
    start(folder, out)
    found = {name: digest for name, digest in hashes(out).items() if name != MANIFEST_NAME}
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert {name: facts["sha256"] for name, facts in manifest["written"].items()} == found
    read = {name: digest for name, digest in hashes(folder).items() if name in FILES}
    assert {name: facts["sha256"] for name, facts in manifest["source_files"].items()} == read
    assert all((out / n).stat().st_size == f["nbytes"] for n, f in manifest["written"].items())


def test_a_finished_conversion_is_left_as_it_is(folder: Path, out: Path) -> None:
    start(folder, out)
    before = hashes(out)
    (out / JOURNAL_NAME).write_text("")  # a run that was killed just before its end
    result = start(folder, out)
    assert result["resumed_files"] == result["files"] == 3 and hashes(out) == before


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda out: os.truncate(out / FILES[1], 1000), FILES[1]),
    "missing weights": (
        lambda out: (out / FILES[1]).unlink(),
        f"names {FILES[1]}, which is absent",
    ),
    "other weights": (lambda out: shutil.copy(out / FILES[0], out / FILES[1]), "is in both"),
    "missing config": (lambda out: (out / "config.json").unlink(), r"config\.json: no such file"),
    "other config": (lambda out: (out / "config.json").write_text("{}"), r"config\.json: differs"),
    "missing index": (lambda out: (out / INDEX_NAME).unlink(), f"no {INDEX_NAME}"),
    "broken index": (lambda out: (out / INDEX_NAME).write_text("{"), "not valid JSON"),
    "missing tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json: is miss"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_after_the_end_is_noticed(case: str, folder: Path, out: Path) -> None:
    damage, message = DAMAGE[case]
    start(folder, out)
    damage(out)
    refuse(folder, out, f"was finished, and is damaged now; remove it and repeat.*{message}")


def test_a_wrong_result_is_never_given_a_config(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_name(path: Path, value: dict[str, Any]) -> None:
        if path.name == INDEX_NAME:
            value = {"weight_map": {"lm_head.weight": FILES[1]}}
        real(path, value)

    real = run.write_json
    monkeypatch.setattr(run, "write_json", lose_a_name)
    refuse(folder, out, "places lm_head.weight in")
    assert not {"config.json", MANIFEST_NAME} & set(hashes(out))
