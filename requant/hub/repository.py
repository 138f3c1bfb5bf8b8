"""A checkpoint in a repository on the Hub, read without a copy of it.

Small files come through the Hub's client into its cache, once. Of the files of weights only the
bytes that are asked for are fetched; a conversion fetches them ahead (spool.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils.logging import set_verbosity_error

from requant.buffers import Buffers
from requant.convert.folder import MAX_JSON_BYTES, REPOSITORY, FileFacts, Folder
from requant.convert.header import header_length
from requant.convert.journal import Digest
from requant.convert.readahead import ReadAhead
from requant.convert.reader import Files
from requant.convert.writer import is_side_file
from requant.errors import CheckpointError, RequantError
from requant.hub.fetch import fetch
from requant.hub.retries import QUICK_ATTEMPTS, attempt
from requant.hub.spool import LEAST_BYTES, Spool, remove, remove_others, require_agreement
from requant.output import size

set_verbosity_error()  # type: ignore[no-untyped-call]  # what the client has to say is said by our errors

#: How much of a file is fetched for its header before its length is known, and how many at a time.
HEADER_BYTES = 1 << 17
CONNECTIONS = 8
#: How many of the largest files may lie on the disk, unless told.
DEFAULT_FILES = 4


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it: bytes, SHA-256 of a large one, git's hash of a small one."""

    nbytes: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Repository:
    """One commit of a repository, and its files by name."""

    name: str
    commit: str
    files: dict[str, HubFile]

    @classmethod
    def find(cls, name: str, revision: str | None) -> Repository:
        """Ask the Hub which commit a branch or tag is at. Raises CheckpointError."""
        label = name if revision is None else f"{name}@{revision}"
        info = attempt(
            label,
            lambda: HfApi(library_name="requant").model_info(
                name, revision=revision, files_metadata=True
            ),
            QUICK_ATTEMPTS,
        )
        files = {}
        for entry in info.siblings or []:
            path = PurePosixPath(entry.rfilename)
            strange = "\\" in entry.rfilename or not entry.rfilename.isprintable()
            if path.is_absolute() or ".." in path.parts or strange:
                raise CheckpointError(f"{label}: a file is named {entry.rfilename!a}; not taken")
            sha256 = entry.lfs.sha256 if entry.lfs else None
            files[entry.rfilename] = HubFile(entry.size or 0, sha256, entry.blob_id)
        if info.sha is None:
            raise CheckpointError(f"{label}: the Hub names no commit")
        return cls(name, info.sha, files)

    @property
    def label(self) -> str:
        """What people call it, so that it is found again."""
        return f"{self.name}@{self.commit}"

    def fetch(self, file: str, begin: int, end: int, write: Callable[[bytes], object]) -> None:
        """Hand bytes begin:end of a file to `write`, in order. Raises CheckpointError."""
        url = hf_hub_url(self.name, file, revision=self.commit)
        fetch(f"{self.label}: {file}", url, begin, end, write)

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Bytes begin:end of a file."""
        found = bytearray()
        self.fetch(file, begin, end, found.extend)
        return bytes(found)

    def cache(self, files: Iterable[str]) -> Path:
        """Have files in the cache of the Hub's client; the folder that they are in."""
        label, names = self.label, sorted(files)
        if not names:
            raise CheckpointError(f"{label}: has no file that is needed; not a model's repository")
        for name in names:
            nbytes = self.files[name].nbytes
            if name.endswith(".json") and nbytes > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{label}: {name} has {nbytes} bytes, at most {MAX_JSON_BYTES} make sense of a "
                    "JSON file; not fetched"
                )

        def get(file: str) -> Path:
            def download() -> str:
                return hf_hub_download(self.name, file, revision=self.commit)

            try:
                found = Path(attempt(f"{label}: {file}", download))
            except OSError as error:
                raise CheckpointError(f"{label}: {file}: cannot be cached: {error}") from error
            return found.parents[len(PurePosixPath(file).parts) - 1]

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(get, names))[0]


class HubFolder(Folder):
    """A checkpoint on the Hub; `path` has all its files but the weights: by default the cache."""

    def __init__(self, repository: Repository, path: Path | None = None) -> None:
        self.repository = repository
        super().__init__(path or repository.cache(filter(is_side_file, repository.files)))
        self._weights = {
            name: file for name, file in repository.files.items() if name.endswith(".safetensors")
        }

    @property
    def label(self) -> str:
        return self.repository.label

    @property
    def origin(self) -> dict[str, str | None]:
        return {"source_repo": self.repository.name, "source_revision": self.repository.commit}

    @cached_property
    def reader(self) -> HubFiles:
        return HubFiles(self.path, self.repository)

    def require(self) -> None:
        pass

    @property
    def is_cached(self) -> bool:
        """Whether the files of weights are in the cache of the Hub's client, too."""
        needed = self.weight_files() or self._weights  # of ranks, all lie in subfolders
        return all((self.path / file).is_file() for file in needed)

    def weight_files(self) -> list[str]:
        return sorted(name for name in self._weights if "/" not in name)

    def holds(self, file: str) -> bool:
        return file in self._weights

    def facts(self, file: str) -> FileFacts:
        found = self._weights[file]
        return FileFacts(found.nbytes, found.sha256 or found.blob or self.repository.commit)

    def raw_headers(self, files: Iterable[str]) -> Iterator[tuple[str, bytes, int]]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            yield from pool.map(self._raw_header, files)

    def _raw_header(self, file: str) -> tuple[str, bytes, int]:
        """The name of a file, its first bytes, up to its data, and its size."""
        nbytes, known = self._weights[file].nbytes, self.reader.headers
        if file not in known:
            found = self.repository.read(file, 0, min(HEADER_BYTES, nbytes))
            end = 8 + header_length(found, nbytes, f"{self.label}: {file}")
            if len(found) < end:
                found += self.repository.read(file, len(found), end)
            known[file] = found[:end]
        return file, known[file], nbytes

    def require_unchanged(self, file: str, facts: FileFacts, read: Digest) -> None:
        sha256 = self._weights[file].sha256
        if sha256 is not None and read.sha256 != sha256:
            self.release([file])
            raise CheckpointError(
                f"{self.label}: {file}: what came has SHA-256 {read.sha256}, the Hub says {sha256};"
                " it was damaged on the way: repeat the command"
            )
        if self.reader.spool is not None:
            self.reader.spool.passed(file)

    def release(self, files: Iterable[str]) -> None:
        if self.reader.spool is not None:
            self.reader.spool.forget(files)

    def disk_bytes(self, disk: int | None) -> int:
        """How much of the source may lie on the disk at a time."""
        sizes = sorted((file.nbytes for file in self._weights.values()), reverse=True)
        wanted = sum(sizes[:DEFAULT_FILES]) if disk is None else disk
        return min(max(wanted, LEAST_BYTES if disk is None else 0), sum(sizes) + LEAST_BYTES)

    @contextlib.contextmanager
    def staged(self, at: Path, disk: int | None, rank: int, processes: int) -> Iterator[None]:
        share = self.disk_bytes(disk) // processes
        if share < LEAST_BYTES:
            raise RequantError(
                f"--disk: {size(share * processes)} are too few, {size(LEAST_BYTES * processes)} "
                f"are needed for {processes} process{'es' if processes > 1 else ''}; give more"
            )
        if rank == 0:
            remove_others(at, processes)
        sizes = {name: file.nbytes for name, file in self._weights.items()}
        spool = Spool(at, share, sizes, self.repository.fetch, str(rank))
        self.reader.spool = spool
        try:
            yield
        finally:
            self.reader.spool = None
            spool.close()

    def settle(self, at: Path) -> None:
        require_agreement(at)
        remove(at)


class HubFiles(Files):
    """Reads files on the Hub, through a spool while there is one."""

    def __init__(self, path: Path, repository: Repository) -> None:
        super().__init__(path)
        self.spool: Spool | None = None
        self.headers: dict[str, bytes] = {}  # as they came when the checkpoint was opened
        self._repository = repository

    def _fill(self, target: memoryview, file: str, begin: int, end: int) -> None:
        if self.spool is not None:
            self.spool.read(target, file, begin, end, passing=False)
            return
        at = 0

        def write(data: bytes) -> None:
            nonlocal at
            target[at : at + len(data)] = data
            at += len(data)

        self._repository.fetch(file, begin, end, write)

    def _read_direct(
        self, file: str, begin: int, end: int, buffers: Buffers | None = None
    ) -> torch.Tensor:
        """Read into a buffer; with `buffers` as the next bytes of a pass from front to back."""
        raw = (buffers or Buffers(end - begin)).take()[: end - begin]
        target = memoryview(raw.numpy().data)
        if self.spool is not None and buffers is not None:
            self.spool.read(target, file, begin, end, passing=True)
        else:
            self._fill(target, file, begin, end)
        known = self.headers.get(file)
        if begin == 0 and known is not None and target[: len(known)] != known[:end]:
            raise CheckpointError(
                f"{self._repository.label}: {file}: its header came differently when it was "
                "fetched again; it was damaged on the way: repeat the command"
            )
        return raw

    @contextlib.contextmanager
    def reading(self, file: str, nbytes: int, windows: int, size: int) -> Iterator[ReadAhead]:
        with contextlib.ExitStack() as stack:
            if self.spool is not None:
                stack.enter_context(self.spool.passing(file))
            yield stack.enter_context(super().reading(file, nbytes, windows, size))


def repository_name(source: str) -> tuple[str, str | None]:
    """Name and revision in `org/name@revision`. Raises RequantError."""
    match = REPOSITORY.fullmatch(source)
    if match is None:
        raise RequantError(f"{source}: expected a repository's name, org/name or org/name@revision")
    return match["repo"], match["revision"]


def open_repository(source: str, pinned: tuple[str, str] | None = None) -> Folder:
    """The checkpoint `org/name[@revision]`, as it is on the Hub now, or, without a connection
    (HF_HUB_OFFLINE), in the cache of the Hub's client.

    `pinned`: the repository and commit that an unfinished output was begun with, which goes on with
    it though a branch has moved. Raises CheckpointError.
    """
    name, revision = repository_name(source)
    if revision is None and pinned is not None and pinned[0] == name:
        revision = pinned[1]
    if constants.HF_HUB_OFFLINE:
        try:
            return Folder(Path(snapshot_download(name, revision=revision, local_files_only=True)))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{source}: not in the cache, and HF_HUB_OFFLINE is set; download it first"
            ) from error
    found = HubFolder(Repository.find(name, revision))
    return Folder(found.path) if found.is_cached else found
