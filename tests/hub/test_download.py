"""`requant download`: continued after anything, checked, and nothing that looks complete until it
is."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

from requant.convert.folder import TRACE_NAME, Folder
from requant.convert.source import Checkpoint
from tests.convert.team import PATIENCE_SECONDS, wait_until
from tests.helpers import INDEX, SIDE_FILES, hashes, make_source
from tests.hub.hubs import FILES, REPO, bodies, done, first_byte, invoke, refused, small_hub
from tests.hub.server import (
    Corrupt,
    Cut,
    Fault,
    HubServer,
    Request,
    Slow,
    Stall,
    Status,
    WrongLength,
    environment,
    first,
    random_cuts,
)

Source = Callable[[str], Path]


@pytest.fixture
def hub(tmp_path: Path, source: Source) -> Iterator[HubServer]:
    with small_hub(tmp_path / "home") as server:
        server.add(REPO, source("fp8-block"))
        yield server


def copied(folder: Path) -> dict[str, str]:
    """All files of a finished download but the journal; no other may be left."""
    found = hashes(folder)
    del found[TRACE_NAME]
    return found


def download(*more: object) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(done("download", REPO, *more, "--json").stdout)
    return told


def total(source: Path) -> int:
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())


def test_a_copy(hub: HubServer, out: Path, source: Source) -> None:
    told = download(out)
    want = source("fp8-block")
    assert copied(out) == hashes(want) and set(SIDE_FILES) < set(copied(out))
    assert told.pop("seconds") >= 0
    assert told == {
        "repo": REPO,
        "revision": hub.head(REPO).sha,
        "path": str(out),
        "files": len(hashes(want)),
        "total_bytes": total(want),
        "fetched_bytes": total(want),
    }
    assert Folder(out).origin == {
        "source_repo": REPO, "source_revision": hub.head(REPO).sha,
    }  # fmt: skip
    assert Checkpoint.open(out).files == Checkpoint.open(want).files


def test_a_copy_that_is_there_is_left_alone(hub: HubServer, out: Path, source: Source) -> None:
    download(out)
    since = len(hub.requests)
    assert download(out)["fetched_bytes"] == 0
    assert [r.path.partition("?")[0] for r in hub.requests[since:]] == [
        f"/api/models/{REPO}/revision/{hub.head(REPO).sha}"
    ]


@pytest.mark.parametrize("seed", range(3))
def test_cut_at_random(seed: int, hub: HubServer, out: Path, source: Source) -> None:
    cuts = random_cuts(seed, 12, share=0.8, least_bytes=20)
    hub.fault = lambda request: cuts(request) if ".safetensors?" in request.path else None
    assert download(out)["fetched_bytes"] == total(source("fp8-block"))
    assert copied(out) == hashes(source("fp8-block"))


@pytest.mark.slow
def test_a_hundred_cuts(hub: HubServer, out: Path, source: Source) -> None:
    """Of connections that bring 4 KiB at best."""
    cuts = random_cuts(11, 100, share=1, least_bytes=1000)

    def fault(request: Request) -> Fault | None:
        cut = cuts(request) if ".safetensors?" in request.path else None
        return Cut(min(cut.after_bytes, 1 << 12)) if isinstance(cut, Cut) else cut

    hub.fault = fault
    assert download(out)["fetched_bytes"] == total(source("fp8-block"))
    assert sum(r.sent < r.nbytes for r in bodies(hub)) == 100
    assert copied(out) == hashes(source("fp8-block"))


FAULTS: list[Fault] = [
    Status(500), Stall(100, 30), Slow(1000), WrongLength(-7), WrongLength(7),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("what", [".safetensors?Expires", "/tokenizer.json"])
def test_what_goes_wrong_on_the_way(
    what: str, fault: Fault, hub: HubServer, out: Path, source: Source
) -> None:
    hub.fault = first(2, fault, "GET", what)
    download(out)
    assert copied(out) == hashes(source("fp8-block"))


@pytest.mark.parametrize("file", [FILES[1], "tokenizer.json", INDEX, "config.json"])
def test_nothing_that_is_needed_first_is_there_before_the_rest(
    file: str, hub: HubServer, out: Path, source: Source
) -> None:
    hub.fault = lambda request: Status(404) if (request.file or "") == f"{REPO}/{file}" else None
    assert f"{file}" in refused("download", REPO, out)
    found = set(hashes(out))
    assert file not in found and "config.json" not in found
    if file in FILES:
        assert not found & {INDEX, *SIDE_FILES}
    hub.fault = lambda request: None
    download(out)
    assert copied(out) == hashes(source("fp8-block"))


def test_the_config_waits_for_the_index(hub: HubServer, out: Path) -> None:
    """Also where the index takes long."""
    seen: list[bool] = []

    def fault(request: Request) -> Fault | None:
        if request.file == f"{REPO}/config.json":
            seen.append((out / INDEX).exists())
        return Slow(20_000) if request.file == f"{REPO}/{INDEX}" else None

    hub.fault = fault
    download(out)
    assert seen == [True]


@pytest.mark.parametrize("file", [FILES[2], "LICENSE"])
def test_wrong_bytes(file: str, hub: HubServer, out: Path, source: Source) -> None:
    hub.fault = first(1, Corrupt(2), "GET", file + ("?Expires" if file in FILES else ""))
    told = refused("download", REPO, out)
    kind = "SHA-256" if file in FILES else "SHA-1 of the git blob"
    blob = hub.head(REPO).files[file]
    assert f"{file}: {kind} " in told and f"the Hub says {blob.etag}; it was damaged" in told
    assert file not in hashes(out) and f"{file}.partial" not in hashes(out)
    download(out)
    assert copied(out) == hashes(source("fp8-block"))


def test_a_branch_that_moves(hub: HubServer, out: Path, source: Source) -> None:
    old = hub.head(REPO).sha
    hub.fault = first(1, Status(404), "GET", FILES[2])
    refused("download", REPO, out)
    other = make_source(out.parent / "other", "fp8-block", seed=9)
    new = hub.add(REPO, other)
    for _ in range(2):  # to the end, and when it is there
        assert download(out)["revision"] == old
        assert copied(out) == hashes(source("fp8-block"))
    told = refused("download", f"{REPO}@{new}", out)
    assert f"is a copy of {REPO}@{old}; choose another folder" in told
    assert json.loads(done("download", f"{REPO}@{old}", out, "--json").stdout)["revision"] == old
    fresh = out.parent / "fresh"
    assert download(fresh)["revision"] == new and copied(fresh) == hashes(other)
    hub.add("org/second", other)
    assert "is a copy of org/model" in refused("download", "org/second", out)


def spoil_size(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_more(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def spoil_begin(path: Path) -> None:
    path.write_bytes(b"damaged!" + path.read_bytes()[8:-100])


@pytest.mark.parametrize("spoil", [spoil_size, spoil_more, spoil_begin, Path.unlink])
def test_a_damaged_file_is_fetched_again(
    spoil: Callable[[Path], None], hub: HubServer, out: Path, source: Source
) -> None:
    download(out)
    spoil(out / FILES[0])
    size = (source("fp8-block") / FILES[0]).stat().st_size
    fetched = {spoil_size: 100, spoil_more: 0}.get(spoil)
    got = download(out)["fetched_bytes"]
    assert got == fetched if fetched is not None else size <= got <= size + 100
    assert copied(out) == hashes(source("fp8-block"))


def test_a_half_file_that_is_damaged_is_fetched_anew(
    hub: HubServer, out: Path, source: Source
) -> None:
    hub.fault = lambda request: Status(404) if FILES[0] in (request.file or "") else None
    refused("download", REPO, out)
    (out / f"{FILES[0]}.partial").write_bytes(b"what a crash left")
    hub.fault = lambda request: None
    size = (source("fp8-block") / FILES[0]).stat().st_size
    assert download(out)["fetched_bytes"] >= 2 * size - 17
    assert copied(out) == hashes(source("fp8-block"))


def test_files_from_the_clients_cache(hub: HubServer, out: Path, source: Source) -> None:
    snapshot_download(REPO)
    since = len(hub.requests)
    download(out)
    assert bodies(hub, since) == [] and copied(out) == hashes(source("fp8-block"))
    cached = try_to_load_from_cache(REPO, FILES[0])
    assert isinstance(cached, str)
    Path(cached).write_bytes(b"damaged!" + Path(cached).read_bytes()[8:])
    fresh = out.parent / "fresh"
    download(fresh)
    assert {(r.file or "").removeprefix(f"{REPO}/") for r in bodies(hub, since)} == {FILES[0]}
    assert copied(fresh) == hashes(source("fp8-block"))


def test_a_disk_that_is_too_small(
    hub: HubServer, out: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = total(source("fp8-block"))
    usage = shutil.disk_usage(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        told = refused("download", REPO, out)
    assert f"{out}: {needed} bytes are to come, {needed - 1} are free; make room" in told
    assert bodies(hub) == [] and not (out / "config.json").exists()
    hub.fault = first(1, Status(404), "GET", FILES[2])
    refused("download", REPO, out)
    there = total(out) - (out / TRACE_NAME).stat().st_size
    with monkeypatch.context() as patch:  # what has come already needs no room
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - there))
        download(out)


def test_a_folder_with_something_else(hub: HubServer, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert f"{out}: holds something else (notes.txt" in refused("download", REPO, out)
    assert {path.name for path in out.iterdir()} == {"notes.txt"}
    assert "cannot write" in refused("download", REPO, out / "notes.txt")


@pytest.mark.parametrize("repo", ["model", "org/model/more", "org/", "-/a", "org/m@", "a b/c"])
def test_what_is_no_repository(repo: str, hub: HubServer, out: Path) -> None:
    result = invoke("download", "--json", "--", repo, out)
    assert result.exit_code == 2 and result.stdout == ""
    assert f"{repo}: expected a repository's name, org/name or org" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("name", [TRACE_NAME, "x/config.json.partial"])
def test_names_that_are_ours(name: str, hub: HubServer, out: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", name: b'{"source_repo": "org/evil"}\n'})
    assert f"{name}: a name that requant uses; not taken" in refused("download", REPO, out)
    assert not out.exists()


@pytest.mark.parametrize("text", ['{"source_repo": "org', "", "\0\0\0"])
def test_a_journal_whose_first_line_was_cut_short(
    text: str, hub: HubServer, out: Path, source: Source
) -> None:
    out.mkdir()
    (out / TRACE_NAME).write_text(text)
    download(out)
    assert download(out)["fetched_bytes"] == 0 and copied(out) == hashes(source("fp8-block"))


@pytest.mark.parametrize("text", ["5\n", '{"source_repo": "org/model"\n', "[1]\n"])
def test_a_damaged_journal(text: str, hub: HubServer, out: Path) -> None:
    out.mkdir()
    (out / TRACE_NAME).write_text(text)
    assert f"{TRACE_NAME}: damaged (" in refused("download", REPO, out)


def test_two_at_once(hub: HubServer, out: Path, source: Source) -> None:
    """The second is refused, also before the first knows what it copies, and leaves it alone."""
    reached, go = threading.Event(), threading.Event()

    def fault(request: Request) -> None:
        if "/api/models/" in request.path and not reached.is_set():
            reached.set()
            assert go.wait(PATIENCE_SECONDS)

    hub.fault = fault
    first_one = threading.Thread(target=download, args=(out,))
    first_one.start()
    assert reached.wait(PATIENCE_SECONDS)
    assert f"{out}: another requant is filling it" in refused("download", REPO, out)
    go.set()
    first_one.join()
    assert copied(out) == hashes(source("fp8-block"))


@contextlib.contextmanager
def started(hub: HubServer, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A download in a process of its own."""
    command = [sys.executable, "-m", "requant", "download", REPO, str(out), "--json"]
    told = environment(hub.endpoint, out.parent / "home-of-another")
    with subprocess.Popen(
        command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("sign", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_killed_in_the_middle(
    sign: signal.Signals, status: int, hub: HubServer, out: Path, source: Source
) -> None:
    """What has come stays, and nothing of it is fetched again."""
    half = (source("fp8-block") / FILES[2]).stat().st_size // 2
    # Far too slow for anybody's patience, had it to come to its end.
    hub.fault = first(99, Slow(500), "GET", FILES[0] + "?Expires")
    with started(hub, out) as process:
        wait_until(lambda: (out / FILES[1]).exists() and (out / FILES[2]).exists())
        wait_until(lambda: (out / f"{FILES[0]}.partial").exists())
        process.send_signal(sign)
        assert process.wait(PATIENCE_SECONDS) == status
        assert process.stderr is not None
        if sign == signal.SIGINT:
            assert process.stderr.read() == "error: interrupted; repeat the command to continue\n"
    assert set(hashes(out)) <= {TRACE_NAME, *FILES[1:], f"{FILES[0]}.partial"}
    kept = (out / f"{FILES[0]}.partial").stat().st_size
    hub.fault = lambda request: None
    since = len(hub.requests)
    download(out)
    (again,) = bodies(hub, since)
    assert again.file == f"{REPO}/{FILES[0]}" and first_byte(again) == kept < half * 2
    assert copied(out) == hashes(source("fp8-block"))


def test_a_cut_that_lasts_keeps_what_came(hub: HubServer, out: Path, source: Source) -> None:
    brought = 0

    def fault(request: Request) -> Fault | None:
        nonlocal brought
        if "?Expires" not in request.path or FILES[0] not in request.path:
            return None
        brought += 1
        return Cut(50_000) if brought == 1 else Status(503)

    hub.fault = fault
    assert "the Hub answers 503 (told to fail), 8 times" in refused("download", REPO, out)
    kept = (out / f"{FILES[0]}.partial").stat().st_size
    assert 0 < kept <= 50_000
    hub.fault = lambda request: None
    since = len(hub.requests)
    download(out)
    begins = [first_byte(r) for r in bodies(hub, since) if FILES[0] in (r.file or "")]
    assert begins == [kept]


def test_the_demo_and_no_network(
    hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in refused("download", REPO, out) and not out.exists()
    done("download", "demo", out)
    assert Checkpoint.open(out).weights
