"""The spool: whatever is read in whatever order by however many, it is the files' bytes, and never
more of them lie on the disk than were allowed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import requant.hub.spool as spool
from requant.errors import CheckpointError
from requant.hub.spool import CONNECTIONS, Spool, remove, require_agreement
from tests.hub.hubs import staged_bytes

CHUNK = 1000
LEAST = (CONNECTIONS + 2) * CHUNK
SIZES = {"a": 12_345, "b": 7000, "ranks/c": 1, "ranks/d": 20_001}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK_BYTES", CHUNK)


class Remote:
    """Files elsewhere that come in pieces. `asked`: which chunks, in which order; `most`: bytes
    that lay in the folder at any time; `spoil`: what becomes of a chunk on its way."""

    def __init__(self, sizes: dict[str, int], folder: Path, seed: int = 0) -> None:
        chance = random.Random(seed)
        self.files = {name: chance.randbytes(size) for name, size in sizes.items()}
        self.asked: list[tuple[str, int]] = []
        self.spoil: Callable[[str, int, bytes], bytes] = lambda file, index, data: data
        self.pause: Callable[[], object] = lambda: None
        self.most = 0
        self._folder, self._lock = folder, threading.Lock()

    def fetch(self, file: str, begin: int, end: int, write: Callable[[bytes], object]) -> None:
        index = begin // CHUNK
        assert begin % CHUNK == 0 and end == min(begin + CHUNK, len(self.files[file]))
        with self._lock:
            self.asked.append((file, index))
        data = self.spoil(file, index, self.files[file][begin:end])
        for at in range(0, len(data), 300):
            self.pause()
            write(data[at : at + 300])
            found = staged_bytes(self._folder)
            self.most = max(self.most, found or 0)

    def spool(self, budget: int = LEAST, name: str = "0") -> Spool:
        sizes = {file: len(data) for file, data in self.files.items()}
        return Spool(self._folder, budget, sizes, self.fetch, name)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(SIZES, tmp_path / "spool")


def read(source: Spool, file: str, begin: int, end: int, passing: bool = False) -> bytes:
    target = bytearray(end - begin)
    source.read(memoryview(target), file, begin, end, passing)
    return bytes(target)


def pass_over(source: Spool, file: str, size: int, step: int = 700) -> bytes:
    """Read a file from front to back."""
    with source.passing(file):
        found = b"".join(
            read(source, file, at, min(at + step, size), passing=True)
            for at in range(0, size, step)
        )
        source.passed(file)
    return found


@pytest.fixture
def opened(remote: Remote) -> Iterator[Spool]:
    source = remote.spool()
    yield source
    source.close()


@pytest.mark.parametrize("budget", [LEAST, LEAST + 1, 100 * CHUNK])
@pytest.mark.parametrize("seed", range(2))
def test_several_threads_read_the_files_bytes_within_the_budget(
    seed: int, budget: int, remote: Remote
) -> None:
    chance = random.Random(seed)
    source = remote.spool(budget)
    remote.pause = lambda: time.sleep(chance.choice([0, 0, 0.0005]))

    def front_to_back(file: str) -> None:
        assert pass_over(source, file, SIZES[file], chance.randrange(1, 2500)) == remote.files[file]
        source.forget([file])

    def here_and_there(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(8):
            file = own.choice(list(SIZES))
            begin, end = sorted(own.randrange(SIZES[file] + 1) for _ in range(2))
            end = min(end, begin + 3 * CHUNK)
            assert read(source, file, begin, end) == remote.files[file][begin:end]

    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(front_to_back, file) for file in ("a", "ranks/d")]
        jobs += [pool.submit(here_and_there, seed * 10 + number) for number in range(3)]
        for job in jobs:
            job.result(timeout=30)
    source.close()
    assert 0 < remote.most <= budget
    require_agreement(remote._folder)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 9 * CHUNK), min_size=1, max_size=3),
    budget=st.integers(LEAST, 3 * LEAST),
    data=st.data(),
)
def test_any_reads_in_any_order(
    sizes: list[int], budget: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any") / "spool"
    remote = Remote({str(n): size for n, size in enumerate(sizes)}, folder)
    source = remote.spool(budget)
    for _ in range(data.draw(st.integers(1, 8), "reads")):
        file = data.draw(st.sampled_from(sorted(remote.files)), "file")
        size = len(remote.files[file])
        if data.draw(st.booleans(), "whole"):
            assert pass_over(source, file, size) == remote.files[file]
        else:
            begin = data.draw(st.integers(0, size), "begin")
            end = data.draw(st.integers(begin, size), "end")
            assert read(source, file, begin, end) == remote.files[file][begin:end]
    source.close()
    assert remote.most <= budget
    require_agreement(folder)


@pytest.mark.parametrize("budget", [LEAST, 100 * CHUNK])
def test_a_pass_fetches_every_chunk_once_and_ahead(budget: int, remote: Remote) -> None:
    source = remote.spool(budget)
    with source.passing("ranks/d"):
        while len(remote.asked) < min(budget // CHUNK, 21):  # before anything is read
            time.sleep(0.001)
        for at in range(0, 20_001, 333):
            end = min(at + 333, 20_001)
            found = read(source, "ranks/d", at, end, passing=True)
            assert found == remote.files["ranks/d"][at:end]
    source.close()
    assert sorted(remote.asked) == [("ranks/d", index) for index in range(21)]


def test_a_spool_takes_over_whole_chunks_of_an_earlier_run(remote: Remote) -> None:
    first = remote.spool(100 * CHUNK)
    for file in ("a", "ranks/d"):
        read(first, file, 0, 4500)
    first.close()
    chunks = {p for p in (remote._folder / "0").rglob("*") if p.is_file()}
    assert len(chunks) == 10
    half = next(p for p in chunks if p.name == "3")
    half.rename(half.with_suffix(".part"))
    short = next(p for p in chunks if p.name == "2" and p.parent == half.parent)
    short.write_bytes(b"short")
    (half.parent / "99").write_bytes(bytes(CHUNK))  # behind the end
    unknown = half.parent.with_name("unknown")
    unknown.mkdir()
    (unknown / "0").write_bytes(bytes(CHUNK))

    remote.asked.clear()
    second = remote.spool(100 * CHUNK)
    left = {p for p in (remote._folder / "0").rglob("*") if p.is_file()}
    assert left == chunks - {half, short}
    for file in ("a", "ranks/d"):
        assert read(second, file, 0, 4500) == remote.files[file][:4500]
    second.close()
    assert sorted(index for _, index in remote.asked) == [2, 3]

    third = remote.spool(LEAST)  # a smaller budget than before
    found = staged_bytes(remote._folder)
    third.close()
    assert found is not None and 0 < found <= LEAST


def test_what_an_earlier_run_left_is_hashed_like_the_rest(remote: Remote) -> None:
    first = remote.spool()
    read(first, "a", 0, 10)
    first.close()
    (chunk,) = (p for p in (remote._folder / "0").rglob("*") if p.is_file())
    chunk.write_bytes(bytes(CHUNK))  # the disk lost it
    second = remote.spool()
    assert read(second, "a", 0, 10) == bytes(10)
    second.close()
    with pytest.raises(CheckpointError, match="a: bytes from 0 on .* start over with --overwrite"):
        require_agreement(remote._folder)


def damaged_once(chunk: tuple[str, int], time_: int) -> Callable[[str, int, bytes], bytes]:
    """Damage a chunk when it comes for that time, counted from 0."""
    seen = 0

    def spoil(file: str, index: int, data: bytes) -> bytes:
        nonlocal seen
        if (file, index) != chunk:
            return data
        seen += 1
        return bytes([data[0] ^ 1]) + data[1:] if seen == time_ + 1 else data

    return spoil


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("names", [("0", "0"), ("0", "1")])  # one process, or two
def test_a_chunk_that_came_differently_is_told_whichever_was_wrong(
    damaged: int, names: tuple[str, str], remote: Remote
) -> None:
    """Borrowed from another file's weight, dropped, and fetched again with its own file."""
    remote.spoil = damaged_once(("a", 2), damaged)
    first = remote.spool(name=names[0])
    borrowed = read(first, "a", 2000, 2100)
    assert (borrowed != remote.files["a"][2000:2100]) == (damaged == 0)
    second = first if names[0] == names[1] else remote.spool(name=names[1])
    second.forget(["a"])
    assert (pass_over(second, "a", SIZES["a"]) != remote.files["a"]) == (damaged == 1)
    for source in {first, second}:
        source.close()
    with pytest.raises(CheckpointError, match="a: bytes from 2000 on came differently"):
        require_agreement(remote._folder)
    remove(remote._folder)
    assert not remote._folder.exists()


def test_a_chunk_that_came_differently_during_the_pass_is_told(remote: Remote) -> None:
    remote.spoil = damaged_once(("a", 0), 1)
    source = remote.spool()
    with source.passing("a"):
        for at in range(0, SIZES["a"], CHUNK):
            read(source, "a", at, min(at + CHUNK, SIZES["a"]), passing=True)
        # The first chunk has left the disk, and comes again for a weight's scale.
        assert read(source, "a", 0, 10) != remote.files["a"][:10]
        source.passed("a")
    source.close()
    assert remote.asked.count(("a", 0)) == 2
    with pytest.raises(CheckpointError, match="a: bytes from 0 on came differently"):
        require_agreement(remote._folder)


def test_a_pass_that_failed_leaves_no_trace(remote: Remote) -> None:
    """Its file was not written, so that the next run is right, though its bytes are others."""
    remote.spoil = damaged_once(("a", 2), 0)
    first = remote.spool()
    with pytest.raises(CheckpointError, match="checksum"), first.passing("a"):
        read(first, "a", 0, 5000, passing=True)
        read(first, "a", 2000, 2100)  # as scales are, beside the pass
        first.forget(["a"])
        raise CheckpointError("checksum")
    first.close()
    second = remote.spool()
    assert pass_over(second, "a", SIZES["a"]) == remote.files["a"]
    second.close()
    require_agreement(remote._folder)


def test_a_fetch_that_fails_is_told_and_can_be_repeated(remote: Remote, opened: Spool) -> None:
    def refuse(file: str, index: int, data: bytes) -> bytes:
        raise CheckpointError("the Hub refuses")

    def work(file: str, index: int, data: bytes) -> bytes:
        return data

    remote.spoil = refuse
    for _ in range(2 * LEAST // CHUNK):  # it takes no room
        with pytest.raises(CheckpointError, match="the Hub refuses"):
            read(opened, "a", 1500, 2500)
    with pytest.raises(CheckpointError, match="the Hub refuses"), opened.passing("b"):
        read(opened, "b", 0, 10, passing=True)
    assert staged_bytes(remote._folder) == 0
    remote.spoil = work
    assert read(opened, "a", 1500, 2500) == remote.files["a"][1500:2500]


def test_a_folder_that_cannot_be_written_is_told(remote: Remote, opened: Spool) -> None:
    (remote._folder / "0").rmdir()
    (remote._folder / "0").write_bytes(b"")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(read, opened, "a", 0, 10)
        with pytest.raises(CheckpointError, match="cannot write: Not a directory"):
            job.result(timeout=10)
        again = pool.submit(read, opened, "a", 0, 10)
        with pytest.raises(CheckpointError, match="cannot write: Not a directory"):
            again.result(timeout=10)


def test_closing_stops_what_is_being_fetched(remote: Remote) -> None:
    begun = threading.Event()

    def pause() -> None:
        begun.set()
        time.sleep(0.05)

    remote.pause = pause
    source = remote.spool()
    with source.passing("ranks/d"):
        assert begun.wait(10)
        source.close()
    assert len(remote.asked) == CONNECTIONS  # no other was begun
    assert not list(remote._folder.rglob("*.part"))
    done = [p for p in (remote._folder / "0").rglob("*") if p.is_file()]
    assert done == []  # and those were given up before their end
