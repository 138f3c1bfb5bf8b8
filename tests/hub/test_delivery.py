"""`requant convert --push` as people have it: the command line, the Hub's client, the test Hub."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from requant.convert import run
from requant.convert.claim import FILES_AT_A_TIME
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, STAGING_NAME
from requant.demo import demo_path
from requant.hub import delivery, spool
from requant.hub import repository as convert_hub
from requant.hub.push import CARD_NAME, MARKER_NAME
from tests.helpers import CONFIG, INDEX, hashes, write_checkpoint
from tests.hub.server import (
    CLIENT_WARNING,
    READER,
    WRITER,
    Cut,
    Fault,
    HubServer,
    Request,
    Status,
    environment,
    first,
    random_cuts,
)
from tests.test_cli import invoke

pytestmark = CLIENT_WARNING
ROOT = Path(__file__).resolve().parents[2]
REPO = "org/model-fp32"
#: More than a test lasts, in seconds.
NEVER = 1e9


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of twelve files of weights, as large as each other."""
    weight = torch.randn(160, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {f"model.layers.1.mlp.experts.{n}.up_proj.weight": weight + n for n in range(12)}
    folder = tmp_path_factory.mktemp("many") / "model"
    return write_checkpoint(
        folder, tensors, CONFIG, lambda name: f"model-{name.split('.')[5]}.safetensors"
    )


def push(source: object, out: Path, *more: object, to: str = "fp32", repo: str = REPO) -> Any:
    """Convert and upload; what it tells scripts. It says nothing else."""
    args = ["convert", source, out, "--to", to, "--push", repo, "--device", "cpu", *more, "--json"]
    done = invoke(*args)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return json.loads(done.stdout)


def refuse(*args: object, error: str, exit: int = 2) -> None:
    done = invoke("convert", *args)
    assert (done.exit_code, done.stdout) == (exit, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and error in line


def held(hub: HubServer, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    """What a repository holds, but for what every repository begins with."""
    return {
        name: data.read_bytes() if isinstance(data, Path) else data
        for name, data in hub.uploaded(repo, branch).items()
        if name != ".gitattributes"
    }


def lying(out: Path) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files below a folder that is being written to."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[os.path.join(place, name)] = os.path.getsize(os.path.join(place, name))
    return found


def weights_in(out: Path) -> list[str]:
    """Files of weights in a folder that is being written to, also those that are not whole."""
    return [name for name in os.listdir(out) if ".safetensors" in name] if out.exists() else []


def small(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.endswith(".safetensors")}


def puts(hub: HubServer) -> list[str]:
    """The paths of all files that were uploaded whole."""
    return [r.path for r in hub.requests if r.method == "PUT" and r.status == 200]


def commits(hub: HubServer, repo: str = REPO) -> list[set[str]]:
    """The files that the branch held after each commit, but the first."""
    history = [set(commit.files) for commit in hub.head(repo).history()]
    return history[-2::-1]


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "no-keep"])
def test_the_repository_is_the_folder(
    keep: bool, hub: HubServer, source: Callable[[str], Path], tmp_path: Path
) -> None:
    out, options = tmp_path / "out", [] if keep else ["--no-keep"]
    document = push(source("fp8-block"), out, "--private", *options, to="int4[group_size=64]")

    assert document["pushed"] == f"{hub.endpoint}/{REPO}" and hub.repos[REPO].private
    found = held(hub)
    assert (found if keep else small(found)) == lying(out)
    assert len(found) - len(small(found)) == 3
    *before, last = commits(hub)
    assert before and last - set(found) == {".gitattributes"}
    for files in before:
        assert MARKER_NAME in files and not {"config.json", INDEX, CARD_NAME} & files
    assert not [name for name, data in found.items() if os.fsencode(tmp_path.parent) in data]

    _, front, card = found[CARD_NAME].decode().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["quantized_by"] == "requant" and {"requant", "int4"} <= set(metadata["tags"])
    assert "| routed_expert | int4[group_size=64] |" in card and "Not measured" in card
    assert card.endswith("## Card of the source model\n\n# model\n")

    assert invoke("download", REPO, tmp_path / "back").exit_code == 0
    checked = invoke("verify", tmp_path / "back", "--checksums", "--json")
    assert checked.exit_code == 0 and json.loads(checked.stdout)["files"] == len(found) - 1

    head, sent = hub.head(REPO), puts(hub)
    again = push(source("fp8-block"), out, *options, to="int4[group_size=64]")
    assert again["resumed_files"] == 3 and (hub.head(REPO), puts(hub)) == (head, sent)
    assert (held(hub) if keep else small(held(hub))) == lying(out)


def test_no_path_of_this_disk_is_published(
    hub: HubServer, source: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[roles]\nmtp = "fp32"\n')
    hub.add("org/model", source("bf16"))
    assert invoke("download", "org/model", tmp_path / "copy").exit_code == 0
    for number, folder in enumerate([source("bf16"), tmp_path / "copy"]):
        args = ["convert", folder, tmp_path / str(number), "--recipe", recipe, "--push"]
        done = invoke(*args, f"org/made-{number}")
        assert done.exit_code == 0, done.output
        found = held(hub, f"org/made-{number}")
        manifest = json.loads(found[MANIFEST_NAME])
        revision = hub.head("org/model").sha
        expected = [source("bf16").name, f"org/model@{revision}"][number]
        assert (manifest["source"], manifest["recipe"]) == (expected, "mine.toml")
        for place in (ROOT, tmp_path.parent):
            assert not [name for name, data in found.items() if os.fsencode(place) in data]


def test_a_finished_conversion_is_uploaded_later(
    hub: HubServer, source: Callable[[str], Path], tmp_path: Path
) -> None:
    args = ["convert", source("fp8-block"), tmp_path / "out", "--to", "bf16"]
    assert invoke(*args).exit_code == 0
    before = hashes(tmp_path / "out")
    document = push(source("fp8-block"), tmp_path / "out", to="bf16", repo=f"{REPO}@bf16")

    assert document["resumed_files"] == 3 and document["pushed"].endswith(f"{REPO}/tree/bf16")
    assert held(hub, branch="bf16") == lying(tmp_path / "out") and held(hub) == {}
    after = hashes(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {CARD_NAME, MANIFEST_NAME}
    assert invoke("verify", tmp_path / "out", "--checksums").exit_code == 0


@pytest.mark.parametrize("seconds", [0.0, NEVER], ids=["a commit a file", "no clock"])
def test_few_files_lie_in_the_folder_at_a_time(
    seconds: float, hub: HubServer, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SHORT_SECONDS", seconds)
    out, seen = tmp_path / "out", []

    def look(request: Request) -> None:
        """Called before every answer."""
        seen.append(len(weights_in(out)))

    hub.fault = look
    push(many, out, "--no-keep")

    assert 0 < max(seen) <= FILES_AT_A_TIME and not list(out.glob("*.safetensors"))
    # By the clock each file is committed alone; without it, as many as may wait at once.
    assert len(commits(hub)) == (13 if not seconds else 12 // (FILES_AT_A_TIME - 1) + 2)
    assert len(held(hub)) - len(small(held(hub))) == 12


SPAWNER = r"""
import json, os, sys
import huggingface_hub, torch
from requant.cli import main
from requant.convert import inspect, run
from requant.hub import delivery, model_card
torch.set_num_threads(1)
URL = "/{repo_id}/resolve/{revision}/{filename}"
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        endpoint, seconds, *sys.argv[1:] = json.loads(line)
        huggingface_hub.constants.ENDPOINT = endpoint
        huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + URL
        delivery.COMMIT_SECONDS = delivery.SHORT_SECONDS = seconds
        main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def spawner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that runs requant in children: it is asked for one in a line, and tells its process
    id and, in the end, its exit status. It is given nothing of the user's."""
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text(WRITER)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", SPAWNER], stdin=pipe, stdout=pipe, text=True, cwd=ROOT,
        env=environment("http://127.0.0.1:9", home),
    ) as process:  # fmt: skip
        yield process
        process.kill()


def spawn(spawner: subprocess.Popen[str], hub: HubServer, seconds: float, *args: object) -> int:
    """Run requant in a child, with so many seconds between commits; its process id."""
    assert spawner.stdin is not None
    spawner.stdin.write(json.dumps([hub.endpoint, seconds, *map(str, args), "--quiet"]) + "\n")
    spawner.stdin.flush()
    return told(spawner)


def told(spawner: subprocess.Popen[str]) -> int:
    """What is told next."""
    assert spawner.stdout is not None
    return int(spawner.stdout.readline())


class Moment:
    """A fault that holds the request it looks for until the process that made it is dead, and
    answers it with `then`."""

    def __init__(self, wanted: Callable[[Request], bool], then: Fault | None = None) -> None:
        self.wanted, self.then = wanted, then
        self.came, self.dead = threading.Event(), threading.Event()
        self.late = False

    def __call__(self, request: Request) -> Fault | None:
        if not self.wanted(request):
            return None
        self.came.set()
        self.late = not self.dead.wait(20)
        return self.then


def nth(number: int, method: str, contains: str) -> Callable[[Request], bool]:
    """The request of that number, from 1, among those of a method with that text in the path."""
    count = 0

    def wanted(request: Request) -> bool:
        nonlocal count
        count += request.method == method and contains in request.path
        return count == number and request.method == method and contains in request.path

    return wanted


#: What is asked for when the process is killed, how it is answered, and seconds between commits. A
#: body may be on its way by then: what has one is not done.
MOMENTS: dict[str, tuple[tuple[int, str, str], Fault | None, float]] = {
    "before anything": ((1, "GET", "/tree/"), None, 0),
    "the first upload": ((1, "PUT", ""), Cut(0), 0),
    "an upload after a commit": ((2, "PUT", ""), Cut(0), 0),
    "an upload before any commit": ((3, "PUT", ""), Cut(0), NEVER),
    "an upload, not confirmed": ((2, "POST", "/verify"), Status(503), 0),
    "uploaded, not committed": ((1, "POST", "/commit/"), Status(503), 0),
    "just committed": ((3, "GET", "/tree/"), None, 0),
    "all weights but no config": ((4, "POST", "/commit/"), Status(503), 0),
    "the last commit": ((6, "GET", "/tree/"), None, 0),
    "read again from the Hub": ((1, "GET", "/resolve/"), None, 0),
}
#: Those with a folder that keeps its files, which is read from the disk; and all.
KILLS = [(moment, True) for moment in list(MOMENTS)[:-1]] + [(moment, False) for moment in MOMENTS]


@pytest.mark.parametrize(("moment", "keep"), KILLS)
def test_killed_at_any_moment(
    moment: str,
    keep: bool,
    hub: HubServer,
    spawner: subprocess.Popen[str],
    source: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    which, then, seconds = MOMENTS[moment]
    out, options = tmp_path / "out", [] if keep else ["--no-keep"]
    for name in "COMMIT_SECONDS", "SHORT_SECONDS":
        monkeypatch.setattr(delivery, name, seconds)
    push(source("bf16"), tmp_path / "whole", repo="org/whole")
    whole = {**held(hub, "org/whole"), CARD_NAME: b""}
    hub.large = {}  # what the other repository has, this one is to be sent
    sent = len(puts(hub))

    fault = Moment(nth(*which), then)
    hub.fault = fault
    args = ["convert", source("bf16"), out, "--to", "fp32", "--push", REPO, *options]
    child = spawn(spawner, hub, seconds, *args)
    assert fault.came.wait(60)
    os.kill(child, signal.SIGKILL)
    assert told(spawner) == -signal.SIGKILL
    fault.dead.set()
    hub.fault = lambda request: None

    left = lying(out) if out.exists() else {}
    finished = left.get(JOURNAL_NAME, b"").count(b'{"file"')
    if MANIFEST_NAME in left:
        finished = 3
    published = {"config.json", INDEX, CARD_NAME} & set(held(hub) if REPO in hub.repos else {})
    assert len(published) == (3 if moment == "the last commit" else 0)

    done = push(source("bf16"), out, *options)
    assert done["resumed_files"] == finished
    found = held(hub)
    assert set(found) == set(whole) and (found if keep else small(found)) == lying(out)
    differing = {CARD_NAME, MANIFEST_NAME}  # which name the repository
    assert all(found[name] == whole[name] for name in set(whole) - differing)
    uploads = puts(hub)[sent:]
    assert len(uploads) == len(set(uploads)) == 4
    assert invoke("download", REPO, tmp_path / "back").exit_code == 0
    assert invoke("verify", tmp_path / "back", "--checksums").exit_code == 0


def test_ctrl_c_does_not_wait_for_an_upload(
    hub: HubServer, spawner: subprocess.Popen[str], source: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.fault = fault = Moment(nth(1, "PUT", ""), Cut(0))
    args = ["convert", source("bf16"), tmp_path / "out", "--to", "fp32", "--push", REPO]
    child = spawn(spawner, hub, 0, *args)
    assert fault.came.wait(60)
    os.kill(child, signal.SIGINT)
    assert told(spawner) == 130 and not fault.late
    fault.dead.set()
    assert push(source("bf16"), tmp_path / "out")["resumed_files"] >= 1
    assert held(hub) == lying(tmp_path / "out")


def test_files_that_are_gone_are_not_made_again(
    hub: HubServer, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing but the journal is left in the folder."""
    monkeypatch.setattr(delivery, "SHORT_SECONDS", 0.0)
    write, started, gone = run._write_group, 0, threading.Event()

    def interrupted(*args: Any) -> None:
        nonlocal started
        started += 1
        if started == 3:
            assert gone.wait(20)
            raise KeyboardInterrupt
        write(*args)

    def committed(self: delivery.Delivery, name: str) -> None:
        remove(self, name)
        if hub.head(REPO).title.endswith("model-1.safetensors"):
            gone.set()

    remove = delivery.Delivery._committed
    monkeypatch.setattr(delivery.Delivery, "_committed", committed)
    monkeypatch.setattr(run, "_write_group", interrupted)
    args = [many, tmp_path / "out", "--to", "fp32", "--push", REPO, "--no-keep"]
    refuse(*args, error="interrupted; repeat the command to continue", exit=130)
    assert list(lying(tmp_path / "out")) == [JOURNAL_NAME]
    monkeypatch.setattr(run, "_write_group", write)
    assert push(many, tmp_path / "out", "--no-keep")["resumed_files"] == 2


@pytest.mark.parametrize("layout", [None, "hf", "deepseek"])
def test_less_room_is_enough_without_keeping(
    layout: str | None,
    hub: HubServer,
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, out, seen = 0, tmp_path / "out", []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    args = [many, out, "--to", "fp32", "--push", f"{REPO}@less"]
    if layout is not None:
        args = ["demo", out, "--to", "bf16", "--push", REPO, "--ranks", 2, "--layout", layout]

    def needed(*more: str) -> int:
        done = invoke("convert", *args, *more)
        assert done.exit_code == 2 and "are free; make room or choose another disk" in done.stderr
        return int(done.stderr.partition(" bytes are to be written")[0].rpartition(" ")[2])

    def look(request: Request) -> None:
        seen.append(sum(sizes(out).values()))

    whole, free = needed(), needed("--no-keep")
    hub.fault = look
    assert invoke("convert", *args, "--no-keep").exit_code == 0
    beside = 1 << 14  # the journal, and what the last block of a file has too many
    assert 0 < max(seen) <= free + beside and (layout is not None or free < whole / 2)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "no-keep"])
def test_nothing_is_published_that_fails_its_check(
    keep: bool, hub: HubServer, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", [] if keep else ["--no-keep"]
    args = ["convert", "demo", out, "--to", "int8-channel", "--push", REPO, "--device", "cpu"]
    done = invoke(*args, "--verify", "--max-kl", "0", *options)
    assert done.exit_code == 1 and "FAIL" in done.stdout
    said = f"verify says no: {REPO} gets no config.json and no card"
    assert done.stderr.splitlines()[-1] == said and "uploaded" not in done.output
    weights = {name for name in lying(demo_path()) if name.endswith(".safetensors")}
    assert set(held(hub)) == {MARKER_NAME, *weights}
    assert (len(lying(out)) - len(small(lying(out)))) == (4 if keep else 0)

    document = push("demo", out, "--verify", *options, to="int8-channel")
    assert document["verify"]["ok"] and document["resumed_files"] == 4
    card = held(hub)[CARD_NAME].decode()
    assert "| verdict | PASS |" in card and "| perplexity | source " in card
    assert (held(hub) if keep else small(held(hub))) == lying(out)
    assert len(puts(hub)) == len(set(puts(hub)))


def test_another_model_is_left_alone(hub: HubServer, many: Path, tmp_path: Path) -> None:
    other = {"config.json": b"{}", "model.safetensors": b"theirs", "notes.txt": b"mine"}
    hub.add(REPO, {**other, ".gitattributes": b""})
    args = [many, tmp_path / "out", "--to", "fp32", "--push", REPO]
    refuse(*args, error=f"{REPO}: already holds something else (config.json, ...); choose")
    assert held(hub) == other and not (tmp_path / "out").exists()
    push(many, tmp_path / "out", "--overwrite")
    assert held(hub) == lying(tmp_path / "out") | {"notes.txt": b"mine"}


def test_what_cannot_be_uploaded_is_not_converted(
    hub: HubServer, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [many, tmp_path / "out", "--to", "fp32"]
    for option in "--private", "--no-keep":
        refuse(*args, option, error="--private and --no-keep have no effect without --push")
    refuse(*args, "--push", "model", error="give org/name, or org/name@branch")
    with monkeypatch.context() as launcher:
        launcher.setenv("WORLD_SIZE", "2")
        launcher.setenv("RANK", "0")
        refuse(*args, "--push", REPO, error="--push takes one process; upload afterwards")
    token = tmp_path / "home" / "token"
    token.write_text(READER)
    refuse(*args, "--push", REPO, error="403")
    token.unlink()
    refuse(*args, "--push", REPO, error="no token to upload with; set HF_TOKEN")
    hub.add("org/open", {"x.txt": b""})
    token.write_text(WRITER)
    refuse(*args, "--push", "org/open", "--private", error="is public")
    assert not (tmp_path / "out").exists() and REPO not in hub.repos


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "no-keep"])
@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_ranks(keep: bool, layout: str, hub: HubServer, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--ranks", 2, "--layout", layout]
    push("demo", out, *options, *([] if keep else ["--no-keep"]), to="bf16")
    found = held(hub)
    assert (found if keep else small(found)) == lying(out) and "ranks.json" in found
    weights = set(found) - set(small(found))
    assert {Path(name).parent.name for name in weights} == (
        {"rank-000", "rank-001"} if layout == "hf" else {""}
    )
    for files in commits(hub)[:-1]:
        assert not {"ranks.json", "config.json"} & files
    assert invoke("download", REPO, tmp_path / "back").exit_code == 0
    assert invoke("convert", "demo", tmp_path / "alone", "--to", "bf16", *options).exit_code == 0
    assert weights == {n for n in lying(tmp_path / "alone") if n.endswith(".safetensors")}
    assert all(found[name] == (tmp_path / "alone" / name).read_bytes() for name in weights)


def test_from_the_hub_to_the_hub(
    hub: HubServer,
    source: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    monkeypatch.setattr(spool, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(convert_hub, "LEAST_BYTES", 6 << 14)
    hub.add("org/model", source("bf16"))
    cuts = random_cuts(5, 6, least_bytes=2000)
    faults = [
        first(2, Status(429, retry_after=7), "POST", "/commit/"),
        first(2, Status(500), "PUT"),
        first(2, Cut(5000), "PUT"),
        random_cuts(6, 3, least_bytes=2000, method="PUT"),
    ]
    out, seen = tmp_path / "out", []

    def fault(request: Request) -> Fault | None:
        chunks = sizes(out / STAGING_NAME).items()  # and the table of their hashes
        staged = sum(nbytes for name, nbytes in chunks if not str(name).endswith(".sha256"))
        seen.append((len(weights_in(out)), staged))
        return cuts(request) or next(filter(None, (fault(request) for fault in faults)), None)

    hub.fault = fault
    document = push("org/model", out, "--no-keep", "--disk", "100KB")
    hub.fault = lambda request: None

    assert max(files for files, _ in seen) <= FILES_AT_A_TIME
    assert 0 < max(staged for _, staged in seen) <= 100_000
    assert small(held(hub)) == lying(out) and 7.0 in waits
    revision = hub.head("org/model").sha
    assert document["source"] == f"org/model@{revision}"
    metadata = yaml.safe_load(held(hub)[CARD_NAME].decode().split("---\n")[1])
    assert metadata["base_model"] == "org/model"
    alone = tmp_path / "alone"
    assert invoke("convert", source("bf16"), alone, "--to", "fp32").exit_code == 0
    for name in set(held(hub)) - {CARD_NAME, MANIFEST_NAME}:
        assert held(hub)[name] == (alone / name).read_bytes(), name


def test_a_hub_that_stays_away_is_no_damage(
    hub: HubServer, source: Callable[[str], Path], tmp_path: Path, waits: list[float]
) -> None:
    args = [source("bf16"), tmp_path / "out", "--to", "fp32", "--push", REPO]
    hub.fault = first(1000, Status(503), "POST", "/commit/")
    refuse(*args, error=f"error: {REPO}: the Hub answers 503")
    assert not (tmp_path / "out" / "config.json").exists()
    hub.fault = lambda request: None
    assert invoke("convert", *args[:4]).exit_code == 0
    hub.fault = first(1000, Status(503), "POST", "/commit/")
    refuse(*args, error=f"error: {REPO}: the Hub answers 503")
    hub.fault = lambda request: None
    last = tmp_path / "out" / "model-00003-of-00003.safetensors"
    last.rename(tmp_path / "last")
    last.write_bytes(b"short")
    refuse(*args, error=f"is damaged now; remove it and repeat the command: {last.name} is not")
    (tmp_path / "last").rename(last)
    assert push(*args[:2])["resumed_files"] == 3 and held(hub) == lying(tmp_path / "out")
