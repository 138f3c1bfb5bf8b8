"""The test Hub, as the real client of the Hub sees it."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    get_session,
    hf_raise_for_status,
    http_stream_backoff,
)

from tests.hub.server import (
    CLIENT_WARNING,
    READER,
    WRITER,
    Corrupt,
    Cut,
    HubServer,
    Slow,
    Stall,
    Status,
    WrongLength,
    environment,
    first,
    random_cuts,
    reached,
)

pytestmark = CLIENT_WARNING
REPO = "org/model"
WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "config.json": b'{"model_type": "deepseek_v3"}',
    "model.safetensors": WEIGHTS,
    "figures/a b.txt": b"figure",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A server that huggingface_hub's functions without `endpoint` reach as well."""
    with HubServer() as server, reached(server, tmp_path / "home"):
        yield server


def api(hub: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def range_of(hub: HubServer, path: str, start: int, stop: int) -> tuple[int, bytes, httpx2.Headers]:
    """Bytes of a file, with one range request."""
    url = f"{hub.endpoint}/{REPO}/resolve/main/{path}"
    asked = {"Range": f"bytes={start}-{stop - 1}"}
    with http_stream_backoff("GET", url, headers=asked, max_retries=0) as response:
        hf_raise_for_status(response)
        return response.status_code, b"".join(response.iter_bytes()), response.headers


def test_model_info_and_trees(hub: HubServer) -> None:
    sha = hub.add(REPO, FILES)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()

    info = api(hub).model_info(REPO, files_metadata=True)

    assert info.sha == sha and info.siblings is not None
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes == {name: len(data) for name, data in FILES.items()}
    large = [s for s in info.siblings if s.lfs]
    assert [(s.rfilename, s.lfs.sha256) for s in large if s.lfs] == [("model.safetensors", sha256)]
    tree = list(api(hub).list_repo_tree(REPO, recursive=True, expand=True))
    assert [entry.path for entry in tree] == [
        "config.json", "figures", "figures/a b.txt", "model.safetensors",
    ]  # fmt: skip
    assert tree[3].lfs.sha256 == sha256 and tree[3].last_commit.oid == sha
    data = FILES["config.json"]
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    assert tree[0].blob_id == git and tree[0].lfs is None
    assert [e.path for e in api(hub).list_repo_tree(REPO, "figures")] == ["figures/a b.txt"]
    paths = api(hub).get_paths_info(REPO, ["config.json", "nothing"])
    assert [path.path for path in paths] == ["config.json"]
    refs = api(hub).list_repo_refs(REPO)
    assert [(branch.name, branch.target_commit) for branch in refs.branches] == [("main", sha)]


def test_listing_has_pages(hub: HubServer) -> None:
    hub.add(REPO, {f"{number:03}.txt": b"" for number in range(25)})
    hub.page = 10

    tree = list(api(hub).list_repo_tree(REPO, recursive=True))

    assert [entry.path for entry in tree] == [f"{number:03}.txt" for number in range(25)]
    assert len(hub.requests) == 3


def test_a_second_add_is_a_new_commit(hub: HubServer) -> None:
    old = hub.add(REPO, FILES)
    new = hub.add(REPO, {"config.json": b"{}"})

    assert api(hub).model_info(REPO).sha == new != old
    assert api(hub).list_repo_files(REPO, revision=old) == sorted(FILES)
    assert [c.commit_id for c in api(hub).list_repo_commits(REPO)] == [new, old]


def test_downloads(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    sha = hub.add(REPO, folder)

    one = Path(hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "c", token=False))
    cached = Path(snapshot_download(REPO, cache_dir=tmp_path / "c", token=False))
    local = Path(snapshot_download(REPO, local_dir=tmp_path / "local", token=False))

    assert one.read_bytes() == WEIGHTS and cached.name == sha
    assert one.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    for folder in cached, local:
        found = {name: (folder / name).read_bytes() for name in FILES}
        assert found == FILES
    sent = [r for r in hub.requests if r.method == "GET" and r.file == f"{REPO}/model.safetensors"]
    assert [r.sent for r in sent] == [len(WEIGHTS)] * 2


def test_ranges_come_from_the_cdn_on_one_connection(hub: HubServer) -> None:
    hub.add(REPO, FILES)

    status, data, headers = range_of(hub, "model.safetensors", 1000, 3000)

    assert (status, data) == (206, WEIGHTS[1000:3000])
    assert headers["Content-Range"] == f"bytes 1000-2999/{len(WEIGHTS)}"
    assert range_of(hub, "config.json", 2, 1000)[1] == FILES["config.json"][2:]
    with pytest.raises(HfHubHTTPError, match=f"416.*Content-Range: bytes \\*/{len(WEIGHTS)}"):
        range_of(hub, "model.safetensors", len(WEIGHTS), len(WEIGHTS) + 1)
    log = [(r.status, r.range, r.sent) for r in hub.requests][:2]
    assert log == [(302, "bytes=1000-2999", 0), (206, "bytes=1000-2999", 2000)]


def test_links_expire_and_refuse_tokens(hub: HubServer) -> None:
    hub.add(REPO, FILES)
    hub.link_seconds = -1
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    location = get_session().head(url, follow_redirects=False).headers["Location"]

    assert location.startswith(hub.cdn_endpoint) and get_session().get(location).status_code == 403

    hub.link_seconds = 100
    location = get_session().head(url, follow_redirects=False).headers["Location"]
    assert get_session().get(location).content == WEIGHTS
    answer = get_session().get(location, headers={"Authorization": f"Bearer {READER}"})
    assert answer.status_code == 400


def test_who_may_read(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/private", FILES, private=True, token="hf_friend")
    hub.add("org/gated", FILES, gated=True, token="hf_friend")
    hub.add("org/open", FILES)

    def read(repo: str, token: str | bool, name: str = "config.json", at: str = "main") -> str:
        return hf_hub_download(repo, name, revision=at, cache_dir=tmp_path, token=token)

    for repo in "org/private", "org/gated":
        assert Path(read(repo, "hf_friend")).is_file()
        assert Path(read(repo, "hf_friend", "model.safetensors")).read_bytes() == WEIGHTS
    for token in False, READER:
        with pytest.raises(GatedRepoError):
            read("org/gated", token, "figures/a b.txt")
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("org/private")
    assert api(hub, READER).model_info("org/private").private
    for token in False, READER:
        with pytest.raises(RepositoryNotFoundError):
            api(hub, token).model_info("org/nothing")
    with pytest.raises(EntryNotFoundError):
        read("org/open", False, "nothing.json")
    with pytest.raises(RevisionNotFoundError):
        read("org/open", False, at="nothing")
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info("org/open", revision="nothing")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api(hub, "hf_unknown").model_info("org/open")


def test_uploads(hub: HubServer, tmp_path: Path) -> None:
    writer = api(hub, WRITER)
    assert writer.whoami()["name"] == "tester"
    url = writer.create_repo("org/new", private=True)
    assert (url.repo_id, hub.repos["org/new"].private) == ("org/new", True)
    assert writer.create_repo("org/new", exist_ok=True).repo_id == "org/new"
    with pytest.raises(HfHubHTTPError, match="409"):
        writer.create_repo("org/new")

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(WEIGHTS)
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n")
    writer.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/new")
    writer.upload_folder(folder_path=tmp_path, repo_id="org/new", ignore_patterns=["token"])
    other = CommitOperationAdd("b.safetensors", b"12345")
    writer.preupload_lfs_files("org/new", [other])
    done = writer.create_commit(
        "org/new", [other, CommitOperationDelete("config.json")], commit_message="last"
    )

    found = hub.uploaded("org/new")
    assert sorted(found) == [".gitattributes", "README.md", "b.safetensors", "model.safetensors"]
    paths = {name: found[name] for name in ("b.safetensors", "model.safetensors")}
    read = {name: p.read_bytes() for name, p in paths.items() if isinstance(p, Path)}
    assert read == {"b.safetensors": b"12345", "model.safetensors": WEIGHTS}
    assert writer.model_info("org/new").sha == done.oid == hub.head("org/new").sha
    sent = len(hub.requests)
    writer.upload_file(path_or_fileobj=weights, path_in_repo="again.safetensors", repo_id="org/new")
    assert "PUT" not in [r.method for r in hub.requests[sent:]]  # the Hub has it already
    writer.create_branch("org/new", branch="int4")
    writer.upload_file(
        path_or_fileobj=b"1", path_in_repo="x.txt", repo_id="org/new", revision="int4"
    )
    assert "x.txt" in hub.uploaded("org/new", "int4") and "x.txt" not in hub.uploaded("org/new")


def test_who_may_write(hub: HubServer) -> None:
    hub.add("org/there", FILES)
    add = CommitOperationAdd("x.txt", b"1")

    for token, status in (False, "401"), (READER, "403"):
        with pytest.raises(HfHubHTTPError, match=status):
            api(hub, token).create_repo("org/new")
        with pytest.raises(HfHubHTTPError, match=status):
            api(hub, token).create_commit("org/there", [add], commit_message="x")
        with pytest.raises(HfHubHTTPError, match=status):
            api(hub, token).auth_check("org/there", write=True)
    api(hub, WRITER).auth_check("org/there", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub, WRITER).create_repo("strangers/new")
    with pytest.raises(RepositoryNotFoundError):
        api(hub, WRITER).create_commit("org/new", [add], commit_message="x")
    with pytest.raises(HfHubHTTPError, match="412"):
        api(hub, WRITER).create_commit(
            "org/there", [add], commit_message="x", parent_commit="0" * 40
        )


def test_cut(hub: HubServer) -> None:
    hub.add(REPO, FILES)
    hub.fault = first(1, Cut(70000), "GET", "?Expires")
    received = bytearray()

    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    with get_session().stream("GET", url) as response:
        with pytest.raises(httpx2.ReadError):
            for data in response.iter_bytes():
                received += data

    assert bytes(received) == WEIGHTS[:70000]
    assert range_of(hub, "model.safetensors", 70000, len(WEIGHTS))[1] == WEIGHTS[70000:]


def test_status(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.fault = first(2, Status(429, retry_after=7), "GET", "resolve")

    url = f"{hub.endpoint}/{REPO}/resolve/main/config.json"
    with http_stream_backoff("GET", url) as response:
        assert response.status_code == 200

    assert [r.status for r in hub.requests] == [429, 429, 200] and waits == [8, 8]


def test_other_faults(hub: HubServer) -> None:
    hub.add(REPO, FILES)

    def read() -> bytes:
        return range_of(hub, "model.safetensors", 100, 50100)[1]

    hub.fault = first(1, Corrupt(40000), "GET", "?Expires")
    found = read()
    assert [n for n in range(50000) if found[n] != WEIGHTS[100 + n]] == [40000]
    hub.fault = first(1, WrongLength(10), "GET", "?Expires")
    with pytest.raises(httpx2.RemoteProtocolError):
        read()
    hub.fault = first(1, WrongLength(-10), "GET", "?Expires")
    assert read() == WEIGHTS[100:50090]
    hub.fault = first(1, Slow(1_000_000), "GET", "?Expires")
    assert read() == WEIGHTS[100:50100]
    hub.fault = first(1, Stall(1000, 30), "GET", "?Expires")
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    with pytest.raises(httpx2.ReadTimeout):
        get_session().get(url, timeout=0.2)


def test_an_upload_that_is_cut_is_sent_again(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = first(1, Cut(100000), "PUT")

    api(hub, WRITER).upload_file(
        path_or_fileobj=WEIGHTS, path_in_repo="m.safetensors", repo_id=REPO
    )

    assert [r.status for r in hub.requests if r.method == "PUT"] == [0, 200]
    (found,) = hub.uploaded(REPO).values()
    assert isinstance(found, Path) and found.read_bytes() == WEIGHTS


def test_random_cuts_are_the_same_for_a_seed(hub: HubServer) -> None:
    def positions(seed: int) -> list[int]:
        hub.fault, sent = random_cuts(seed, 3), []
        for _ in range(30):
            try:
                range_of(hub, "model.safetensors", 0, len(WEIGHTS))
            except httpx2.ReadError:
                sent.append(hub.requests[-1].sent)
        return sent

    hub.add(REPO, FILES)
    found = positions(5)
    assert len(found) == 3 and found == positions(5) != positions(6)


def test_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    command = [sys.executable, "-m", "tests.hub.server", f"{REPO}={tmp_path}", "--cuts", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        code = f"import huggingface_hub as h; print(h.hf_hub_download('{REPO}', 'config.json'))"
        client = [sys.executable, "-c", code]
        path = subprocess.check_output(
            client, env=environment(endpoint, tmp_path / "home"), text=True
        ).strip()
        process.send_signal(signal.SIGTERM)
    assert Path(path).read_bytes() == b"{}" and process.returncode == 0
