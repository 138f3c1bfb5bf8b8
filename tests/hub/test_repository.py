"""Conversions straight from the Hub: a real client, a real server on loopback, and what goes wrong
between them. Whatever it is, the result has the bytes of a local conversion, or there is none."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

import requant.hub.repository as hub_module
import requant.hub.spool as spool
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, STAGING_NAME
from requant.convert.source import Checkpoint
from requant.hub.repository import HubFolder, Repository
from tests.convert.team import launched, together
from tests.helpers import INDEX, hashes, load, make_source, write_checkpoint
from tests.hub.hubs import (
    CHUNK,
    FILES,
    LEAST,
    REPO,
    bodies,
    chunks_asked,
    corrupt_until,
    done,
    in_chunk,
    invoke,
    reach,
    refused,
    sampled,
    small_hub,
    staged_bytes,
)
from tests.hub.repos import Blob
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
    first,
    random_cuts,
)

Source = Callable[[str], Path]
Local = Callable[..., dict[str, str]]
TARGETS = ["bf16", "int4[group_size=32]", "nvfp4"]  # nvfp4 reads every weight twice


@pytest.fixture
def hub(tmp_path: Path, source: Source) -> Iterator[HubServer]:
    with small_hub(tmp_path / "home") as server:
        server.add(REPO, source("fp8-block"))
        yield server


def outcome(out: Path) -> dict[str, str]:
    """All files of a finished conversion, but for what tells where it came from."""
    found = hashes(out)
    del found[MANIFEST_NAME]
    return found


@pytest.fixture
def local(tmp_path: Path, source: Source) -> Local:
    """`local(format, folder)`: what the conversion of a folder on the disk gives."""

    def convert(to: str = "bf16", folder: Path | None = None) -> dict[str, str]:
        out = tmp_path / "local"
        shutil.rmtree(out, ignore_errors=True)
        done("convert", folder or source("fp8-block"), out, "--to", to)
        return outcome(out)

    return convert


def nothing_looks_complete(out: Path) -> bool:
    return not {"config.json", MANIFEST_NAME, INDEX} & set(hashes(out))


@pytest.mark.parametrize(
    ("to", "disk"),
    [(to, disk) for to in TARGETS for disk in (LEAST, None)]
    + [("bf16", LEAST + 1), ("nvfp4", 9 * CHUNK)],
)
def test_equals_the_local_conversion_within_its_disk(
    to: str, disk: int | None, hub: HubServer, out: Path, local: Local
) -> None:
    """The checkpoint has scales in the file before their weight's, and in the file after it."""
    more = [] if disk is None else ["--disk", disk]
    with sampled(out) as found:
        told = json.loads(done("convert", REPO, out, "--to", to, *more, "--json").stdout)
    total = sum(request.nbytes for request in hub.head(REPO).files.values())
    assert 0 < max(found) <= (total + LEAST if disk is None else disk)
    assert outcome(out) == local(to) and not (out / STAGING_NAME).exists()
    commit = hub.head(REPO).sha
    assert told["source"] == f"{REPO}@{commit}"
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    assert (manifest["source_repo"], manifest["source_revision"]) == (REPO, commit)
    for name, digest in manifest["source_files"].items():
        assert digest["sha256"] == hub.head(REPO).files[name].sha256


def test_the_checkpoint_has_scales_before_and_after_their_codes(source: Source) -> None:
    pairs = set()
    for weight in Checkpoint.open(source("fp8-block")).weights.values():
        pairs |= {(weight.file, part.location.file) for part in weight.parts.values()}
    assert (FILES[0], FILES[1]) in pairs and (FILES[2], FILES[0]) in pairs


def by_layer(name: str) -> str:
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
    return FILES[layer]


def scales_apart(name: str) -> str:
    return "scales.safetensors" if name.endswith("_scale_inv") else by_layer(name)


def placed(source: Path, folder: Path, place: Callable[[str], str]) -> Path:
    """The checkpoint with its tensors in other files."""
    config = json.loads((source / "config.json").read_bytes())
    return write_checkpoint(folder, load(source), config, place)


def test_every_byte_comes_once_where_the_disk_is_large_enough(
    hub: HubServer, out: Path, source: Source
) -> None:
    folder = placed(source("fp8-block"), out.parent / "apart", scales_apart)
    hub.add(REPO, folder)
    done("convert", REPO, out, "--to", "bf16")
    chunks = chunks_asked(hub)
    assert len(chunks) == len(set(chunks))
    assert len({file for file, _ in chunks}) == 4
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    headers = sum(r.sent for r in bodies(hub)) - total
    assert 0 <= headers < 4 * 4096


FAULTS: Mapping[str, tuple[Fault, int]] = {
    "cut": (Cut(1000), 5),
    "cut at once": (Cut(0), 5),
    "cut at the last byte": (Cut(CHUNK - 1), 5),
    "500": (Status(500), 5),
    "429": (Status(429, retry_after=0), 5),
    "trickle": (Slow(2000), 2),
    "stall": (Stall(1000, 30), 2),
    "stall at once": (Stall(0, 30), 2),
    "too short": (WrongLength(-100), 5),
    "promised more": (WrongLength(100), 5),
}


@pytest.mark.parametrize(
    ("fault", "where"),
    [(fault, ".safetensors?Expires") for fault in FAULTS]
    + [("500", "/model-0000"), ("429", "/model-0000")],
)
def test_what_goes_wrong_on_the_way_changes_nothing(
    fault: str, where: str, hub: HubServer, out: Path, local: Local
) -> None:
    """In what large files are sent with, and in what tells where they are."""
    what, times = FAULTS[fault]
    hub.fault = first(times, what, "GET", where)
    done("convert", REPO, out, "--to", "bf16", "--disk", LEAST)
    assert outcome(out) == local()


@pytest.mark.parametrize("seed", range(3))
def test_cut_at_random(seed: int, hub: HubServer, out: Path, local: Local) -> None:
    cuts = random_cuts(seed, 25, share=0.8, least_bytes=500)
    hub.fault = lambda request: cuts(request) if ".safetensors?" in request.path else None
    to = TARGETS[seed % 3]
    with sampled(out) as found:
        done("convert", REPO, out, "--to", to, "--disk", LEAST)
    assert max(found) <= LEAST and outcome(out) == local(to)
    assert sum(r.sent < r.nbytes for r in bodies(hub)) == 25


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
def test_a_hundred_cuts(to: str, hub: HubServer, out: Path, local: Local) -> None:
    cuts = random_cuts(7, 100, share=0.9, least_bytes=100)
    hub.fault = lambda request: cuts(request) if ".safetensors?" in request.path else None
    done("convert", REPO, out, "--to", to, "--disk", LEAST)
    assert sum(r.sent < r.nbytes for r in bodies(hub)) == 100 and outcome(out) == local(to)


@pytest.mark.parametrize(
    ("method", "what"), [("GET", "/api/models/"), ("GET", "config.json"), ("HEAD", "config.json")]
)
@pytest.mark.parametrize("fault", [Cut(0), Status(429, retry_after=0)])
def test_what_goes_wrong_with_small_files_changes_nothing(
    fault: Fault, method: str, what: str, hub: HubServer, out: Path, local: Local,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fault = first(2, fault, method, what)
    done("convert", REPO, out, "--to", "bf16")
    assert outcome(out) == local()


@pytest.mark.parametrize("number", range(3))
def test_wrong_bytes_are_refused_and_come_again(
    number: int, hub: HubServer, out: Path, source: Source, local: Local
) -> None:
    folder = placed(source("fp8-block"), out.parent / "layers", by_layer)
    hub.add(REPO, folder)
    file, index = FILES[number], 1
    sha256 = hashes(folder)[file]
    hub.fault = in_chunk(file, index, Corrupt(5000))
    told = refused("convert", REPO, out, "--to", "bf16")
    assert re.search(rf"{file}: what came has SHA-256 [0-9a-f]{{64}}, the Hub says {sha256}", told)
    assert nothing_looks_complete(out)
    weights = {name for name in hashes(out) if ".safetensors" in name and "/" not in name}
    assert weights == set(FILES[:number])  # no file, whole or not, of those bytes
    done("convert", REPO, out, "--to", "bf16")
    assert outcome(out) == local("bf16", folder)


def test_wrong_bytes_of_scales_within_the_file(hub: HubServer, out: Path, source: Source,
                                               local: Local) -> None:  # fmt: skip
    """Read beside the pass over their own file, which fails: the next run is right."""
    folder = placed(source("fp8-block"), out.parent / "layers", by_layer)
    hub.add(REPO, folder)
    hub.fault = in_chunk(FILES[1], 0, Corrupt(CHUNK - 5000))
    assert "what came has SHA-256" in refused("convert", REPO, out, "--to", "bf16")
    done("convert", REPO, out, "--to", "bf16")
    assert outcome(out) == local("bf16", folder)


@pytest.mark.parametrize("disk", [LEAST, None])
def test_wrong_bytes_borrowed_from_another_file_are_refused_in_the_end(
    disk: int | None, hub: HubServer, out: Path, source: Source, local: Local
) -> None:
    """They went into a finished file: nothing but another start helps."""
    scale = next(
        part.location
        for weight in Checkpoint.open(source("fp8-block")).weights.values()
        for part in weight.parts.values()
        if weight.file == FILES[0] and part.location.file == FILES[1]
    )
    hub.fault = corrupt_until(out / FILES[0], FILES[1], scale.begin + 2)
    more = [] if disk is None else ["--disk", disk]
    told = []
    while "start over" not in (told or [""])[-1]:
        told.append(refused("convert", REPO, out, "--to", "bf16", *more))
        assert len(told) < 4 and nothing_looks_complete(out)
    begin = scale.begin // CHUNK * CHUNK
    assert f"{FILES[1]}: bytes from {begin} on came differently" in told[-1]
    assert "with --overwrite" in refused("convert", REPO, out, "--to", "bf16", *more)
    hub.fault = lambda request: None
    done("convert", REPO, out, "--to", "bf16", *more, "--overwrite")
    assert outcome(out) == local()


def test_a_branch_that_moves(hub: HubServer, out: Path, source: Source, local: Local) -> None:
    old = hub.head(REPO).sha
    hub.fault = in_chunk(FILES[2], 1, Status(404), times=9)  # also when it is fetched ahead
    refused("convert", REPO, out, "--to", "bf16")
    hub.fault = lambda request: None
    other = make_source(out.parent / "other", "fp8-block", seed=9)
    new = hub.add(REPO, other)

    done("convert", REPO, out, "--to", "bf16")  # goes on with what it began
    assert outcome(out) == local()
    assert json.loads((out / MANIFEST_NAME).read_bytes())["source_revision"] == old
    # Finished is finished, and the branch means something else now.
    assert "holds something else" in refused("convert", REPO, out, "--to", "bf16")
    done("convert", f"{REPO}@{old}", out, "--to", "bf16")
    fresh = out.parent / "fresh"
    done("convert", REPO, fresh, "--to", "bf16")
    assert json.loads((fresh / MANIFEST_NAME).read_bytes())["source_revision"] == new
    assert outcome(fresh) == local("bf16", other) != outcome(out)


def test_a_finished_conversion_fetches_nothing(hub: HubServer, out: Path) -> None:
    done("convert", REPO, out, "--to", "bf16")
    since = len(hub.requests)
    told = json.loads(done("convert", REPO, out, "--to", "bf16", "--json").stdout)
    assert told["resumed_files"] == 3 and chunks_asked(hub, since) == []


def killed_at(
    hub: HubServer, count: int, arguments: list[object], at: int, sign: signal.Signals
) -> list[int]:
    """Convert in `count` processes, the last of which gets the signal at that request for a chunk;
    the exit statuses."""
    place = hub.uploads
    asked = 0
    hook = partial(reach, hub.endpoint, place / "home")
    with launched(count, lambda rank: arguments, place, hook) as children:

        def kill(request: Request) -> None:
            nonlocal asked
            if request.nbytes == CHUNK:
                asked += 1
                if asked == at:
                    children[-1].signal(sign)

        hub.fault = kill
        codes = [child.wait() for child in children]
    hub.fault = lambda request: None
    return codes


@pytest.mark.parametrize("at", [8, 33])
def test_killed_in_the_middle(
    at: int, hub: HubServer, out: Path, source: Source, local: Local
) -> None:
    folder = placed(source("fp8-block"), out.parent / "layers", by_layer)
    hub.add(REPO, folder)
    arguments: list[object] = [REPO, out, "--to", "bf16"]
    assert killed_at(hub, 1, arguments, at, signal.SIGKILL) == [-signal.SIGKILL]
    assert nothing_looks_complete(out)
    finished = [name for name in FILES if (out / name).exists()]
    kept = [p for p in (out / STAGING_NAME / "0").rglob("*") if p.name.isdecimal()]
    held = {(path.parent.name, int(path.name)) for path in kept}
    assert finished or held
    since = len(hub.requests)
    told = json.loads(done("convert", *arguments, "--json").stdout)
    assert told["resumed_files"] == len(finished)
    again = chunks_asked(hub, since)
    assert again and not held & set(again)
    assert not [file for file, _ in again if file in finished]
    assert outcome(out) == local("bf16", folder)


def test_interrupted_in_the_middle(hub: HubServer, out: Path, local: Local) -> None:
    arguments: list[object] = [REPO, out, "--to", "bf16"]
    assert killed_at(hub, 1, arguments, 9, signal.SIGINT) == [130]
    assert nothing_looks_complete(out)
    done("convert", *arguments)
    assert outcome(out) == local()


def test_two_processes(hub: HubServer, out: Path, local: Local) -> None:
    hook = partial(reach, hub.endpoint, hub.uploads / "home")
    with sampled(out) as found:
        codes, children = together(
            2, [REPO, out, "--to", "bf16", "--disk", 2 * LEAST], hub.uploads, hook
        )
    assert codes == [0, 0], children[0].stderr
    assert outcome(out) == local() and LEAST < max(found) <= 2 * LEAST


def test_fewer_processes_than_before_stay_within_the_disk(
    hub: HubServer, out: Path, local: Local
) -> None:
    arguments: list[object] = [REPO, out, "--to", "bf16", "--disk", LEAST]
    assert killed_at(hub, 1, arguments, 20, signal.SIGKILL) == [-signal.SIGKILL]
    for rank in range(1, 13):  # what as many processes would have left
        shutil.copytree(out / STAGING_NAME / "0", out / STAGING_NAME / str(rank))
    left = staged_bytes(out / STAGING_NAME)
    assert left is not None and left > LEAST
    with sampled(out) as found:
        done("convert", *arguments)
    begun = next(number for number, nbytes in enumerate(found) if nbytes <= LEAST)
    assert max(found[begun:]) <= LEAST and outcome(out) == local()


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        (LEAST - 1, f"--disk: {(LEAST - 1) / 1000:.2f} kB are too few, {LEAST / 1000:.2f} kB are"),
        (1, "--disk: 1 B are too few"),
        ("much", "--disk much: expected a size such as 700MB"),
        (-5, "--disk -5: expected a size"),
    ],
)
def test_a_disk_budget_that_is_none(disk: object, message: str, hub: HubServer, out: Path) -> None:
    assert message in refused("convert", REPO, out, "--to", "bf16", "--disk", disk)
    assert not out.exists()


def test_a_disk_budget_for_what_is_on_this_disk(out: Path, source: Source) -> None:
    told = refused("convert", source("fp8-block"), out, "--to", "bf16", "--disk", "1GB")
    assert "--disk has no effect on a source that is on this disk" in told


def test_a_disk_that_is_full(
    hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch, local: Local
) -> None:
    """What the spool will need counts."""
    done("convert", REPO, out, "--to", "bf16")
    needed = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    usage = shutil.disk_usage(out.parent)._replace(free=needed + LEAST - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        told = refused("convert", REPO, out, "--to", "bf16", "--disk", 2 * LEAST)
    assert re.search(rf"\d+ bytes are to be written, {usage.free} are free", told)
    assert not out.exists()


@pytest.mark.parametrize("command", ["convert", "download", "inspect", "plan"])
def test_repositories_that_cannot_be_read(
    command: str, hub: HubServer, out: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = source("fp8-block")
    hub.add("org/private", files, private=True, token="hf_friend")
    hub.add("org/gated", files, gated=True, token="hf_friend")

    def told(repo: str) -> str:
        more = {"convert": [out, "--to", "bf16"], "download": [out], "plan": ["--to", "bf16"]}
        line = refused(command, repo, *more.get(command, []))
        assert repo.partition("@")[0] in line and not (out / "config.json").exists()
        shutil.rmtree(out, ignore_errors=True)
        return line

    hidden = "no such repository, or you may not see it (401); check the name"
    assert hidden in told("org/unknown") and hidden in told("org/private")
    assert "no such revision (404); give a branch, tag or commit" in told(f"{REPO}@nothing")
    assert "the repository is gated (401); ask for access" in told("org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "the repository is gated (403); ask for access" in told("org/gated")
    assert "(404)" in told("org/unknown")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "use a token that may do this: set HF_TOKEN" in told(REPO)


@pytest.mark.parametrize("repo", ["org/private", "org/gated"])
def test_a_token_opens_what_is_closed(
    repo: str, hub: HubServer, out: Path, source: Source, local: Local,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gated = repo == "org/gated"
    hub.add(repo, source("fp8-block"), private=not gated, gated=gated, token="hf_friend")
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    done("convert", repo, out, "--to", "bf16")
    assert outcome(out) == local()


def test_without_a_connection(
    hub: HubServer, out: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        told = refused("convert", REPO, out, "--to", "bf16")
        assert "not in the cache, and HF_HUB_OFFLINE is set; download it first" in told
    done("inspect", REPO)  # brings the small files to the cache, and no weights
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        commit = f"{REPO}@{hub.head(REPO).sha}"
        told = refused("convert", commit, out, "--to", "bf16")
        assert f"names {FILES[0]}, which is absent" in told
    snapshot_download(REPO)
    since = len(hub.requests)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        done("convert", REPO, out, "--to", "bf16")
    assert len(hub.requests) == since and outcome(out) == local()


def test_without_a_network(hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    told = refused("convert", REPO, out, "--to", "bf16")
    assert re.search(r"org/model: cannot reach the Hub \(.*refused", told)
    assert "check the network" in told and f"no folder {REPO} here" in told


def test_a_server_that_is_gone_for_good(
    hub: HubServer, out: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fault = lambda request: Status(503) if request.nbytes == CHUNK else None
    told = refused("convert", REPO, out, "--to", "bf16")
    assert re.search(r"model-0000\d.* the Hub answers 503 .*, 8 times", told)
    assert "repeat the command later" in told and nothing_looks_complete(out)
    hub.fault = lambda request: None
    done("convert", REPO, out, "--to", "bf16")
    assert outcome(out) == local()


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\..\\evil.json", "a\nb.json"]
)
@pytest.mark.parametrize("command", ["convert", "download"])
def test_hostile_names(command: str, name: str, hub: HubServer, out: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", name: b"evil"})
    more = ["--to", "bf16"] if command == "convert" else []
    assert f"a file is named {ascii(name)}; not taken" in refused(command, REPO, out, *more)
    assert not list(out.parent.rglob("evil*")) and not out.exists()


def test_a_config_of_ten_gigabytes_is_not_fetched(
    hub: HubServer, out: Path, source: Source
) -> None:
    commit = hub.head(REPO)
    assert isinstance(commit.files, dict)
    commit.files["config.json"] = Blob.large(b"", 10_000_000_000, "0" * 64)
    told = refused("convert", REPO, out, "--to", "bf16")
    assert "config.json has 10000000000 bytes, at most 100000000" in told
    assert not [r for r in hub.requests if "config.json" in (r.file or "")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header of 0 bytes in a file of 0 bytes"),
        (b"12345", "in a file of 5 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", f"header of {1 << 60} bytes in a file of 10"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes in a file of 10 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "model-00001"),
        ((9).to_bytes(8, "little") + b'{"a":1}  ', "model-00001"),
    ],
)
def test_hostile_headers(
    data: bytes, message: str, hub: HubServer, out: Path, source: Source
) -> None:
    folder = shutil.copytree(source("fp8-block"), out.parent / "hostile")
    (folder / FILES[0]).write_bytes(data)
    hub.add(REPO, folder)
    for command in (["inspect", REPO], ["convert", REPO, out, "--to", "bf16"]):
        told = refused(*command)
        assert message in told and FILES[0] in told
    assert not out.exists()


def test_inspect_and_plan_fetch_headers_and_no_weights(
    hub: HubServer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "HEADER_BYTES", 4096)
    found = json.loads(done("inspect", REPO, "--json").stdout)
    same = json.loads(done("inspect", source("fp8-block"), "--json").stdout)
    assert {**found, "path": None} == {**same, "path": None}
    assert sum(r.sent for r in bodies(hub)) <= 3 * 4096
    since = len(hub.requests)
    plan = json.loads(done("plan", REPO, "--to", "bf16", "--json").stdout)
    same = json.loads(done("plan", source("fp8-block"), "--to", "bf16", "--json").stdout)
    assert {**plan, "source": None} == {**same, "source": None}
    assert sum(r.sent for r in bodies(hub, since)) <= 3 * 4096


def test_what_the_cache_holds_is_read_from_there(hub: HubServer, out: Path, local: Local) -> None:
    snapshot_download(REPO)
    since = len(hub.requests)
    done("convert", REPO, out, "--to", "bf16")
    assert bodies(hub, since) == [] and outcome(out) == local()


@pytest.mark.parametrize(
    ("layout", "cached"),
    [("hf", False), ("hf", True), pytest.param("deepseek", False, marks=pytest.mark.slow)],
)
def test_a_repository_that_was_cut_into_ranks(
    layout: str, cached: bool, hub: HubServer, out: Path, local: Local,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(spool, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(hub_module, "LEAST_BYTES", 16 * LEAST)
    whole, ranks = out.parent / "whole", out.parent / "ranks"
    done("convert", "demo", whole, "--to", "bf16")
    more = ["--tp", 1] if layout == "hf" else []
    done("shard", whole, ranks, "--ranks", 2, "--layout", layout, *more)
    hub.add(REPO, ranks)
    if cached:
        snapshot_download(REPO)
    with sampled(out) as found:
        done("convert", REPO, out, "--to", "fp16", *([] if cached else ["--disk", 16 * LEAST]))
    assert outcome(out) == local("fp16", ranks)
    assert max(found, default=0) <= 16 * LEAST and bool(found and max(found)) == (not cached)


def test_keeping_the_source(hub: HubServer, out: Path, source: Source, local: Local) -> None:
    kept = out.parent / "kept"
    arguments: list[Any] = ["convert", REPO, out, "--to", "bf16", "--keep-source", kept]
    hub.fault = first(1, Status(404), "GET", FILES[1])
    assert FILES[1] in refused(*arguments)
    hub.fault = lambda request: None
    done(*arguments)
    copied = {name: digest for name, digest in hashes(kept).items() if not name.startswith(".req")}
    assert copied == hashes(source("fp8-block")) and outcome(out) == local()
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    assert manifest["source_revision"] == hub.head(REPO).sha
    since = len(hub.requests)
    done(*arguments)
    assert bodies(hub, since) == []
    told = refused("convert", kept, out.parent / "o", "--to", "bf16", "--keep-source", out.parent)
    assert "--keep-source has no effect on a source that is on this disk" in told


def test_the_label_and_the_origin_of_a_folder_on_the_hub(hub: HubServer) -> None:
    folder = HubFolder(Repository.find(REPO, None))
    sha = hub.head(REPO).sha
    assert folder.label == f"{REPO}@{sha}"
    assert folder.origin == {"source_repo": REPO, "source_revision": sha}
    assert folder.weight_files() == FILES and not folder.holds("model.safetensors")


def test_what_was_begun_and_is_nothing_yet(hub: HubServer, out: Path) -> None:
    """A refusal before the first byte leaves OUT as it was."""
    out.mkdir()
    assert invoke("convert", REPO, out, "--to", "bf16", "--disk", 1).exit_code == 2
    assert list(out.iterdir()) == [] and not (out / JOURNAL_NAME).exists()


def test_a_header_that_came_damaged_is_noticed_when_its_file_is_read(
    hub: HubServer, out: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter of what nothing else looks at: the pass over the file brings the truth."""
    read = Repository.read
    with monkeypatch.context() as patch:
        patch.setattr(
            Repository,
            "read",
            lambda *asked: read(*asked).replace(b'"format":"pt"', b'"format":"tp"'),
        )
        told = refused("convert", REPO, out, "--to", "bf16")
    assert f"{FILES[0]}: its header came differently when it was fetched again" in told
    assert nothing_looks_complete(out)
    done("convert", REPO, out, "--to", "bf16")
    assert outcome(out) == local()
