"""Uploading a conversion, with the real client, to the test Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import hf_raise_for_status

from requant.convert.journal import Digest
from requant.errors import CheckpointError
from requant.hub import retries
from requant.hub.push import MARKER_NAME, Push
from tests.hub.server import (
    CLIENT_WARNING,
    READER,
    Cut,
    Fault,
    HubServer,
    Request,
    Status,
    first,
)

pytestmark = CLIENT_WARNING
REPO = "org/model-int4"
SMALL = {"config.json": b"{}", "model.safetensors.index.json": b"{}", "LICENSE": b"MIT License"}
CARD = "---\nbase_model: org/model\n---\n# card\n"
NEVER = float("inf")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished conversion of three files."""
    folder = tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.safetensors").write_bytes(bytes([number + 1]) * 200_000)
    for name, data in SMALL.items():
        (folder / name).write_bytes(data)
    return folder


def digest(path: Path) -> Digest:
    data = path.read_bytes()
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def send(pushing: Push, out: Path, number: int) -> bool:
    path = out / f"{number}.safetensors"
    return pushing.file(path, path.name, digest(path))


def held(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    """What the repository holds, but for what every repository begins with."""
    found = hub.uploaded(REPO, branch)
    del found[".gitattributes"]
    return {
        name: data.read_bytes() if isinstance(data, Path) else data for name, data in found.items()
    }


def expected(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()} | {"README.md": CARD.encode()}


def puts(hub: HubServer) -> list[Request]:
    return [request for request in hub.requests if request.method == "PUT"]


def titles(hub: HubServer, branch: str = "main") -> list[str]:
    return [commit.title for commit in hub.head(REPO, branch).history()][::-1]


def test_weights_first_and_config_last(hub: HubServer, out: Path) -> None:
    safe: list[str] = []
    with Push(REPO, "key", private=True, on_committed=safe.append, commit_seconds=NEVER) as pushing:
        assert send(pushing, out, 0) and safe == ["0.safetensors"]
        assert not send(pushing, out, 1) and safe == ["0.safetensors"]
        assert not send(pushing, out, 2)
        assert sorted(held(hub)) == [MARKER_NAME, "0.safetensors"]
        pushing.flush()
        assert sorted(safe) == [f"{n}.safetensors" for n in range(3)]
        assert "config.json" not in held(hub)
        oid = pushing.finish(out, SMALL, CARD)

    assert held(hub) == expected(out)
    assert hub.head(REPO).sha == oid and hub.repos[REPO].private
    assert titles(hub) == [
        "initial commit",
        "Add 0.safetensors",
        "Add 1.safetensors and 1 more",
        "Add config, tokenizer and model card",
    ]
    assert pushing.url == f"{hub.endpoint}/{REPO}"


def test_commits_come_by_the_clock(hub: HubServer, out: Path) -> None:
    with Push(REPO, "key", commit_seconds=0) as pushing:
        assert [send(pushing, out, number) for number in range(3)] == [True] * 3
    assert len(titles(hub)) == 4


def test_a_full_batch_is_committed(hub: HubServer, out: Path) -> None:
    with Push(REPO, "key", commit_seconds=NEVER, max_pending=2) as pushing:
        assert [send(pushing, out, number) for number in range(3)] == [True, False, True]


def test_continues_after_it_was_killed(hub: HubServer, out: Path) -> None:
    killed = Push(REPO, "key", commit_seconds=NEVER)
    send(killed, out, 0)
    send(killed, out, 1)  # sent, not committed
    before = len(puts(hub))
    (out / "0.safetensors").rename(out.parent / "moved")  # as --no-keep would have it
    facts = digest(out.parent / "moved")

    safe: list[str] = []
    with Push(REPO, "key", on_committed=safe.append) as pushing:
        assert pushing.file(out / "0.safetensors", "0.safetensors", facts)
        assert safe == ["0.safetensors"]
        send(pushing, out, 1)
        assert len(puts(hub)) == before  # the Hub has the bytes of both
        send(pushing, out, 2)
        pushing.finish(out, SMALL, CARD)

    (out.parent / "moved").rename(out / "0.safetensors")
    assert held(hub) == expected(out)
    assert len(puts(hub)) == 3


def test_an_error_leaves_what_was_sent_to_the_next_run(hub: HubServer, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with Push(REPO, "key", commit_seconds=NEVER) as pushing:
            send(pushing, out, 0)
            send(pushing, out, 1)
            raise KeyboardInterrupt
    assert sorted(held(hub)) == [MARKER_NAME, "0.safetensors"]


def test_a_finished_one_is_left_as_it_is(hub: HubServer, out: Path) -> None:
    (out / "requant.json").write_bytes(b'{"key": "key"}')
    heads = []
    for _ in range(2):
        with Push(REPO, "key") as pushing:
            for number in range(3):
                send(pushing, out, number)
            heads.append(pushing.finish(out, [*SMALL, "requant.json"], CARD))

    assert heads[0] == heads[1] and held(hub) == expected(out)


@pytest.mark.parametrize("found", ["config.json", "other.safetensors", "model.gguf", MARKER_NAME])
def test_another_model_is_refused_or_replaced(hub: HubServer, out: Path, found: str) -> None:
    other = {found: b'{"key": "other"}', "notes.txt": b"mine", "1.safetensors": b"old"}
    hub.add(REPO, {**other, ".gitattributes": b""})

    with pytest.raises(CheckpointError, match="already holds something else .*--overwrite"):
        Push(REPO, "key")
    with Push(REPO, "key", overwrite=True, commit_seconds=NEVER) as pushing:
        assert hub.uploaded(REPO)["1.safetensors"] == b"old"
        for number in range(3):
            send(pushing, out, number)
        assert sorted(held(hub)) == [MARKER_NAME, "0.safetensors", "notes.txt"]
        pushing.finish(out, SMALL, CARD)

    assert held(hub) == expected(out) | {"notes.txt": b"mine"}


def test_a_file_of_the_other_model_that_is_the_same_stays(hub: HubServer, out: Path) -> None:
    same = out / "2.safetensors"
    hub.add(REPO, {"old.safetensors": b"old", same.name: same, ".gitattributes": b""})

    with Push(REPO, "key", overwrite=True) as pushing:
        assert send(pushing, out, 2)  # whoever is told that may remove the local one
        send(pushing, out, 0)
        assert sorted(held(hub)) == [MARKER_NAME, "0.safetensors", same.name]


def test_a_branch_of_its_own(hub: HubServer, out: Path) -> None:
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    with Push(f"{REPO}@int4", "key") as pushing:
        for number in range(3):
            send(pushing, out, number)
        pushing.finish(out, SMALL, CARD)

    assert held(hub, "int4") == expected(out) and held(hub) == {"config.json": b"{}"}
    assert pushing.url == f"{hub.endpoint}/{REPO}/tree/int4"


def test_tokens_and_names(hub: HubServer, tmp_path: Path) -> None:
    def refused(target: str, message: str, **options: bool) -> None:
        with pytest.raises(CheckpointError, match=message) as raised:
            Push(target, "key", **options)
        assert str(raised.value).startswith(f"{target}: ")
        assert "\n" not in str(raised.value)

    refused("model", "give org/name, or org/name@branch")
    refused("org/model@", "give org/name, or org/name@branch")
    refused("org/mo del", "alphanumeric")
    refused("strangers/model", "403 .*rights.*HF_TOKEN.*hf auth login")
    hub.add("org/open", {"x.txt": b""})
    refused("org/open", "is public", private=True)
    hub.add("strangers/open", {"x.txt": b""})
    refused("strangers/open", "403 .*HF_TOKEN")
    token = tmp_path / "home" / "token"
    token.write_text(READER)
    refused("org/open", "403 .*HF_TOKEN")
    refused("org/new", "403 .*HF_TOKEN")
    token.write_text("hf_unknown")
    refused("org/open", "401 .*HF_TOKEN")
    token.unlink()
    refused("org/open", "no token to upload with; set HF_TOKEN")
    assert "org/new" not in hub.repos


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot reach the Hub .*offline mode is enabled"):
        Push(REPO, "key")


def test_a_card_that_the_hub_refuses(hub: HubServer, out: Path) -> None:
    with Push(REPO, "key") as pushing:
        with pytest.raises(CheckpointError, match=f"^{REPO}: Invalid metadata in README.md. - "):
            pushing.finish(out, SMALL, "---\na: [\n---\n")
    assert held(hub) == {}


def test_a_token_that_expires_on_the_way(hub: HubServer, out: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{REPO}: 1.safetensors: the Hub answers 401"):
        with Push(REPO, "key") as pushing:
            send(pushing, out, 0)
            hub.user_tokens.clear()
            send(pushing, out, 1)


@pytest.mark.parametrize(
    ("fault", "method", "contains"),
    [
        (Cut(100_000), "PUT", ""),
        (Status(503), "PUT", ""),
        (Status(429, retry_after=3), "POST", "preupload"),
        (Status(500), "POST", "batch"),
        (Status(500), "POST", "repos/create"),
        (Status(503), "POST", "/commit/"),
        (Status(412), "POST", "/commit/"),
        (Cut(0), "POST", "/commit/"),
        (Status(504), "GET", "/tree/"),
    ],
)
def test_tried_again(
    hub: HubServer, out: Path, waits: list[float], fault: Fault, method: str, contains: str
) -> None:
    hub.fault = first(7, fault, method, contains)  # the client itself gives up after six
    with Push(REPO, "key") as pushing:
        for number in range(3):
            send(pushing, out, number)
        pushing.finish(out, SMALL, CARD)

    assert held(hub) == expected(out)
    assert len(waits) >= 7
    # No commit is made twice, not even when only its answer was lost.
    assert len(titles(hub)) == len(set(titles(hub)))


@pytest.mark.parametrize("fault", [Status(429, retry_after=1234), Status(429, reset=1234)])
def test_waits_as_long_as_the_hub_says(
    hub: HubServer, out: Path, waits: list[float], fault: Fault
) -> None:
    with Push(REPO, "key") as pushing:
        hub.fault = first(1, fault, "POST", "/commit/")
        send(pushing, out, 0)
    assert waits == [1234]


def test_gives_up_in_the_end(hub: HubServer, out: Path, waits: list[float]) -> None:
    with pytest.raises(CheckpointError, match="answers 503 .*, 10 times; repeat the command later"):
        with Push(REPO, "key") as pushing:
            hub.fault = first(1000, Status(503), "POST", "/commit/")
            send(pushing, out, 0)
    assert waits == [2.0**number for number in range(retries.ATTEMPTS - 1)]
    hub.fault = first(1000, Cut(0), "GET", "/tree/")
    with pytest.raises(CheckpointError, match=f"^{REPO}: cannot reach the Hub .*; check the netw"):
        Push(REPO, "key")


def test_a_page_instead_of_a_message_is_cut() -> None:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/model")
    answer = httpx2.Response(451, text="not here\n\nsincerely", request=request)
    with pytest.raises(CheckpointError) as raised:
        retries.attempt(REPO, lambda: hf_raise_for_status(answer))
    expected = f"{REPO}: the Hub answers 451 (not here); check the name, and what your token"
    assert str(raised.value) == f"{expected} may do"


def test_nothing_is_finished_without_its_weights(hub: HubServer, out: Path) -> None:
    with Push(REPO, "key") as pushing:
        send(pushing, out, 0)
        pushing.flush()
        HfApi().delete_file("0.safetensors", REPO)
        with pytest.raises(CheckpointError, match="0.safetensors is not what was uploaded"):
            pushing.finish(out, SMALL, CARD)
    assert "config.json" not in held(hub)


def test_a_file_that_is_gone(hub: HubServer, out: Path) -> None:
    with Push(REPO, "key") as pushing:
        with pytest.raises(CheckpointError, match="0.safetensors is not there, and no longer at"):
            pushing.file(out / "gone", "0.safetensors", Digest(1, "0" * 64))


def test_a_wrong_digest_is_found_out(hub: HubServer, out: Path) -> None:
    with Push(REPO, "key") as pushing:
        with pytest.raises(CheckpointError, match="400 .*announced as"):
            pushing.file(out / "0.safetensors", "0.safetensors", Digest(200_000, "0" * 64))


def test_prints_nothing(hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Push(REPO, "key") as pushing:
        send(pushing, out, 0)
        pushing.finish(out, SMALL, CARD)
    assert capsys.readouterr() == ("", "")
