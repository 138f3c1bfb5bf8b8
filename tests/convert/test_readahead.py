"""Reading ahead: every byte is the file's, memory is bounded, errors arrive, and nothing hangs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import requant.convert.readahead as readahead
import requant.convert.reader as reader
from requant.buffers import Buffers
from requant.convert.journal import Digest
from requant.convert.readahead import UNHASHED, ReadAhead
from requant.convert.reader import Files
from requant.errors import CheckpointError

SIZE = 4096
#: No thread takes longer to end.
PATIENCE_SECONDS = 30


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "WINDOW_BYTES", SIZE)
    monkeypatch.setattr(reader, "DIRECT_BYTES", SIZE // 4)


@pytest.fixture
def nothing_left_running() -> Iterator[None]:
    """Every thread that a test starts ends."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def content(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def window_of(data: bytes, begin: int, end: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8)


def digest(data: bytes) -> Digest:
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def in_time(work: Callable[[], object]) -> None:
    """Run what may hang in a thread of its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), "hangs"


SIZES = st.builds(
    lambda windows, more: max(0, windows * SIZE + more),
    st.integers(0, 30),
    st.sampled_from([-1, 0, 1, 7, 2048]),
)


@given(nbytes=SIZES, windows=st.integers(1, 9), seed=st.integers(0, 99), takers=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_every_range_is_the_files(nbytes: int, windows: int, seed: int, takers: int) -> None:
    """Whoever asks, in whatever order: forwards with overlaps, backwards, and far away."""
    data = content(nbytes)
    ahead = ReadAhead(nbytes, partial(window_of, data), windows, SIZE)

    def take(number: int) -> None:
        chance, position = random.Random(f"{seed} {number}"), 0
        for _ in range(30):
            jump = chance.random()
            if jump < 0.2:
                position = chance.randint(0, nbytes)
            position = max(0, position + chance.randint(-SIZE // 2, SIZE))
            begin = min(position, nbytes)
            end = min(nbytes, begin + chance.choice((0, 1, 100, SIZE, 3 * SIZE)))
            found = ahead.take(begin, end, wait=chance.random() < 0.7)
            if found is not None:
                assert bytes(found.numpy().data) == data[begin:end], (begin, end)
            position = end

    with contextlib.closing(ahead), ThreadPoolExecutor(takers) as pool:
        list(pool.map(take, range(takers)))
        assert ahead.finish() == digest(data)


@pytest.mark.parametrize("windows", [4, 12])
def test_from_front_to_back_everything_is_held(windows: int) -> None:
    data = content(40 * SIZE + 5)
    ahead = ReadAhead(len(data), partial(window_of, data), windows, SIZE)
    for begin in range(0, len(data), SIZE // 2):
        end = min(begin + SIZE // 2 + 9, len(data))
        found = ahead.take(begin, end, wait=True)
        assert found is not None and bytes(found.numpy().data) == data[begin:end]
    assert ahead.finish() == digest(data)
    ahead.close()


def test_what_was_read_is_held_for_a_second_look_and_not_read_again() -> None:
    data, begun = content(20 * SIZE), []

    def read(begin: int, end: int) -> torch.Tensor:
        begun.append(begin)
        return window_of(data, begin, end)

    ahead = ReadAhead(len(data), read, 8, SIZE)
    for begin in (*range(0, 10 * SIZE, SIZE), 9 * SIZE, 7 * SIZE):
        found = ahead.take(begin, begin + SIZE, wait=True)
        assert found is not None and bytes(found.numpy().data) == data[begin : begin + SIZE]
    assert ahead.take(0, SIZE, wait=True) is None  # long gone
    assert ahead.take(0, 8 * SIZE, wait=True) is None  # more than may be held
    assert ahead.take(17 * SIZE, 18 * SIZE, wait=False) is None  # not worth a wait
    ahead.finish()
    ahead.close()
    assert begun == list(range(0, len(data), SIZE))


@pytest.mark.parametrize("windows", [2, 4, 12])
def test_memory_is_the_windows(windows: int) -> None:
    """However long the file is, and however slowly it is asked for."""
    data, alive, most = content(100 * SIZE), weakref.WeakSet[torch.Tensor](), 0

    def read(begin: int, end: int) -> torch.Tensor:
        nonlocal most
        window = window_of(data, begin, end)
        alive.add(window)
        most = max(most, len(alive))
        return window

    ahead = ReadAhead(len(data), read, windows, SIZE)
    for begin in range(0, 60 * SIZE, SIZE):
        ahead.take(begin, begin + SIZE, wait=True)
    ahead.finish()
    ahead.close()
    del ahead
    gc.collect()
    # Held, waiting for the hash, just read, and what the one before is dropped for.
    assert windows <= most <= windows + UNHASHED + 2
    assert not alive


def test_a_file_of_no_bytes(nothing_left_running: None) -> None:
    ahead = ReadAhead(0, partial(window_of, b""), 4, SIZE)
    assert ahead.take(0, 0, wait=True) is None
    assert ahead.finish() == digest(b"")
    ahead.close()


@pytest.mark.parametrize("fails_at", [0, 3 * SIZE, 19 * SIZE])
def test_a_read_error_reaches_who_asks_and_who_finishes(
    fails_at: int, nothing_left_running: None
) -> None:
    data = content(20 * SIZE)

    def read(begin: int, end: int) -> torch.Tensor:
        if begin == fails_at:
            raise CheckpointError(f"no byte {begin}")
        return window_of(data, begin, end)

    def all_of_it() -> None:
        for begin in range(0, len(data), SIZE):
            try:
                assert ahead.take(begin, begin + SIZE, wait=True) is not None
            except CheckpointError:
                raised.append(begin)
        with pytest.raises(CheckpointError, match=f"no byte {fails_at}"):
            ahead.finish()
        ahead.close()

    raised: list[int] = []
    ahead = ReadAhead(len(data), read, 2, SIZE)
    in_time(all_of_it)
    # A reader that is ahead may have met it before who asks did.
    assert set(range(fails_at, len(data), SIZE)) <= set(raised)
    assert all(begin >= fails_at - 2 * SIZE for begin in raised)


@pytest.mark.parametrize("state", ["not begun", "waiting for demand", "in a read"])
def test_closing_in_the_middle_does_not_hang(state: str, nothing_left_running: None) -> None:
    data, reading, may_read = content(50 * SIZE), threading.Event(), threading.Event()

    def read(begin: int, end: int) -> torch.Tensor:
        reading.set()
        assert may_read.wait(PATIENCE_SECONDS)
        return window_of(data, begin, end)

    if state != "in a read":
        may_read.set()
    ahead = ReadAhead(len(data), read, 4, SIZE)
    if state == "waiting for demand":
        assert ahead.take(0, SIZE, wait=True) is not None
    if state == "in a read":
        # One that still waits when it is closed is told, and gets nothing.
        given: list[torch.Tensor | None] = []
        waiting = threading.Thread(
            target=lambda: given.append(ahead.take(5 * SIZE, 6 * SIZE, wait=True)), daemon=True
        )
        waiting.start()
        assert reading.wait(PATIENCE_SECONDS)
        closing = threading.Thread(target=ahead.close)
        closing.start()
        while not ahead._closed:
            time.sleep(0.001)
        may_read.set()
        for thread in (closing, waiting):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), "hangs"
        assert given == [None]
    in_time(ahead.close)


def test_buffers_are_used_again_and_never_while_something_views_them() -> None:
    buffers = Buffers(SIZE)
    first, second = buffers.take(), buffers.take()
    address = first.data_ptr()
    assert second.data_ptr() != address and address % 4096 == 0
    view = first.fill_(7)[100:200].view(torch.int16)
    del first
    gc.collect()
    others = [buffers.take().fill_(9) for _ in range(3)]
    assert all(other.data_ptr() != address for other in others)
    assert view.view(torch.uint8).eq(7).all()
    del view
    gc.collect()
    assert buffers.take().data_ptr() == address


def test_what_is_given_out_stays_as_it_is_while_the_file_goes_on(tmp_path: Path) -> None:
    """Windows of a file on disk come back as soon as nobody looks at them, and no sooner."""
    data = content(64 * SIZE + 100)
    (tmp_path / "file").write_bytes(data)
    files = Files(tmp_path)
    chance = random.Random(5)
    kept: list[tuple[int, torch.Tensor]] = []
    with files.reading("file", len(data), 4, SIZE) as ahead:
        for begin in range(0, len(data) - 600, 500):
            found = files.read_bytes("file", begin, begin + 600)
            assert bytes(found.numpy().data) == data[begin : begin + 600]
            if chance.random() < 0.1:
                kept.append((begin, found))
        assert ahead.finish() == digest(data)
    assert len(kept) > 20
    for begin, found in kept:
        assert bytes(found.numpy().data) == data[begin : begin + 600]


@pytest.mark.parametrize("nbytes", [0, 1, SIZE - 1, SIZE, 5 * SIZE, 9 * SIZE + 17])
def test_files_of_any_size_on_disk(nbytes: int, tmp_path: Path) -> None:
    data = content(nbytes)
    (tmp_path / "file").write_bytes(data)
    files = Files(tmp_path)
    with files.reading("file", nbytes, 4, SIZE) as ahead:
        for begin, end in ((0, nbytes), (nbytes // 2, nbytes), (nbytes // 3, nbytes // 2)):
            assert bytes(files.read_bytes("file", begin, end).numpy().data) == data[begin:end]
        assert ahead.finish() == digest(data)


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Front to back, and no byte twice, when it is asked for in order."""
    data, begun = content(30 * SIZE + 9), []
    (tmp_path / "file").write_bytes(data)
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        begun.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    files = Files(tmp_path)
    with files.reading("file", len(data), 6, SIZE) as ahead:
        for begin in range(0, len(data), SIZE):
            files.read_bytes("file", begin, min(begin + SIZE, len(data)))
        ahead.finish()
    assert begun == list(range(0, len(data), SIZE))
