"""Real conversions killed at random moments: a few here, hundreds by `bench/torture.py`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_eight_times_at_random_moments(tmp_path: Path) -> None:
    command = ["bench/torture.py", "--kills", "8", "--seed", "1", "--size-mb", "40", "--json"]
    done = subprocess.run(
        [sys.executable, *command, "--dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and report["ok"] and done.returncode == 0
    assert report["mismatches"] == report["loadable_intermediates"] == 0
    assert report["kills"] == 8 and report["by_phase"]["writing"] >= 1
    assert len(report["by_signal"]) >= 2 and report["resumes"] == 8


@pytest.mark.slow
def test_two_processes_or_their_launcher_killed_at_a_random_moment(tmp_path: Path) -> None:
    command = ["bench/torture.py", "--kills", "1", "--seed", "5", "--size-mb", "30", "--processes",
               "2", "--lanes", "1", "--json", "--dir", str(tmp_path)]  # fmt: skip
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and report["ok"] and done.returncode == 0
    assert report["mismatches"] == report["loadable_intermediates"] == 0
    assert report["kills"] == sum(report["by_victim"].values()) == 1
    assert report["details"][0]["processes"] == 2


@pytest.fixture
def torture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("torture")


FILE = "model-00001-of-00001.safetensors"
SPOILT: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "nothing": (lambda out: None, False, ""),
    "a file still to come": (lambda out: (out / "LICENSE").unlink(), True, "there before all is"),
    "half a file": (
        lambda out: (out / FILE).write_bytes(b"x" * 100),
        True,
        "has its final name and is not final",
    ),
    "another config": (lambda out: (out / "config.json").write_text("{}"), True, "not the final"),
    "no manifest yet": (
        lambda out: ((out / "requant.json").unlink(), (out / ".requant-journal.jsonl").touch()),
        False,
        "",
    ),
    "no journal either": (lambda out: (out / "requant.json").unlink(), False, "neither journal"),
    "an index before its files": (
        lambda out: [(out / n).unlink() for n in (FILE, "config.json", "requant.json")],
        True,
        "neither journal nor manifest",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_the_harness_sees_what_may_not_lie_there(
    case: str, torture: ModuleType, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / FILE)
    for name in ("config.json", torture.INDEX, "requant.json", "LICENSE"):
        (tmp_path / name).write_text(name)
    hashes = torture.hashes(tmp_path)
    target = SimpleNamespace(hashes=hashes, weights={FILE: hashes[FILE]})
    spoil, loadable, message = SPOILT[case]
    spoil(tmp_path)
    kill = torture.Kill("SIGKILL", "writing", 0.5, "process 0")
    torture.examine(target, tmp_path, kill)
    assert kill.loadable is loadable
    assert any(message in text for text in kill.wrong) if message else kill.wrong == []
