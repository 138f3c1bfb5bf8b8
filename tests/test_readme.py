"""README is runnable: every command in it is run here, in order, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from requant.demo import demo_path
from tests.hub.server import WRITER, HubServer, environment

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.split()[:1] == [program]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="session")
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """What a process needs to find the demo model as `org/name` on a Hub."""
    with HubServer() as server:
        server.add("org/name", demo_path())
        yield environment(server.endpoint, folder / "hub-home") | {"HF_TOKEN": WRITER}


@pytest.mark.parametrize("line", commands("requant"))
def test_command_runs(line: str, folder: Path, hub: dict[str, str]) -> None:
    line, _, target = line.partition(" > ")
    arguments = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(arguments, cwd=folder, env=hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if target:
        (folder / target.strip()).write_text(done.stdout)


def test_every_line_of_a_block_is_tested_or_known() -> None:
    known = {"requant", "make", "pip", "python"}
    for block in blocks("sh"):
        assert {line.split()[0] for line in block.splitlines() if line.strip()} <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in commands("make"):
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


def test_benchmarks_exist() -> None:
    for script in set(re.findall(r"python (bench/\w+\.py)", README)):
        done = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_python_example_runs(folder: Path) -> None:
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_recipe_example_is_a_recipe() -> None:
    from requant.convert.recipe import parse_recipe

    (example,) = blocks("toml")
    assert parse_recipe("readme", example).modules


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
