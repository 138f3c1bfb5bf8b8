"""`requant verify --checksums OUT`: the files are what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.cli import main
from requant.convert.journal import MANIFEST_NAME
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.errors import CheckpointError
from requant.verify.checksums import check
from tests.helpers import CPU


@pytest.fixture
def out(tmp_path: Path) -> Path:
    plan = make_plan(Checkpoint.open(demo_path()), default_recipe("int4"))
    convert(plan, tmp_path / "out", Runtime(CPU, 2))
    return tmp_path / "out"


def test_what_was_written_is_there(out: Path) -> None:
    seen: list[int] = []
    files = [path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    assert check(out, seen.append) == {"ok": True, "files": len(files), "problems": []}
    assert sum(seen) == sum(path.stat().st_size for path in files)


def test_every_kind_of_damage_is_named(out: Path) -> None:
    first, second, third, _ = sorted(out.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes() + b"\0")
    third.unlink()
    found = check(out)
    assert not found["ok"] and len(found["problems"]) == 3
    for path, problem in zip((first, second, third), found["problems"], strict=True):
        assert problem.startswith(f"{path}: ")
    for problem, word in zip(found["problems"], ("SHA-256", "bytes", "missing"), strict=True):
        assert word in problem


@pytest.mark.parametrize("manifest", [None, "{}", '{"written": {"a": 1}}', '{"written": []}'])
def test_without_checksums_there_is_no_answer(manifest: str | None, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "requant.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"requant\.json: holds no checksums"):
        check(tmp_path)


def test_the_command_judges(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["requant", "verify", "--checksums", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, capsys.readouterr().out

    code, text = run(out, "--json")
    assert code == 0 and json.loads(text)["ok"]
    next(out.glob("*.safetensors")).unlink()
    code, text = run(out)
    assert code == 1 and "is missing" in text
    assert run(out, out)[0] == run(out, "--tokens", "64")[0] == 2
