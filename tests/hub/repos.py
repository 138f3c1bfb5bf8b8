"""The repositories of the test Hub (server.py): files, commits, branches, who may do what."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Above this, and whatever ends like this, lies in large file storage.
LFS_BYTES = 10 * 1000 * 1000
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".png")
GITATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
)

Content = bytes | Path


def is_lfs(path: str, nbytes: int) -> bool:
    """Whether the Hub would keep a file out of git."""
    return path.endswith(LFS_SUFFIXES) or nbytes > LFS_BYTES


@dataclass(frozen=True)
class Blob:
    """One file. `oid`: git's SHA-1 of what git holds, which is a pointer for a large file."""

    content: Content
    nbytes: int
    sha256: str
    oid: str
    pointer_nbytes: int | None = None

    @classmethod
    def of(cls, path: str, content: Content) -> Blob:
        """The file that would lie at that path."""
        nbytes, sha256, sha1 = _hashes(content)
        if not is_lfs(path, nbytes):
            return cls(content, nbytes, sha256, sha1)
        return cls.large(content, nbytes, sha256)

    @classmethod
    def large(cls, content: Content, nbytes: int, sha256: str) -> Blob:
        """A file of large file storage."""
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n"
        ).encode()
        return cls(content, nbytes, sha256, _hashes(pointer)[2], len(pointer))

    @property
    def etag(self) -> str:
        """What identifies the content to a client."""
        return self.oid if self.pointer_nbytes is None else self.sha256

    @property
    def lfs(self) -> dict[str, str | int] | None:
        """What the API says of a large file."""
        if self.pointer_nbytes is None:
            return None
        return {"oid": self.sha256, "size": self.nbytes, "pointerSize": self.pointer_nbytes}


def _hashes(content: Content) -> tuple[int, str, str]:
    """Bytes, SHA-256 and git's SHA-1, of a file on disk only once."""
    if isinstance(content, bytes):
        header = f"blob {len(content)}\0".encode()
        sha1 = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
        return len(content), hashlib.sha256(content).hexdigest(), sha1
    facts = content.stat()
    return _file_hashes(content, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _file_hashes(path: Path, nbytes: int, mtime_ns: int) -> tuple[int, str, str]:
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {nbytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            sha256.update(data)
            if nbytes <= LFS_BYTES:  # nothing asks for that of a large file
                sha1.update(data)
    return nbytes, sha256.hexdigest(), sha1.hexdigest()


@dataclass(frozen=True)
class Commit:
    """All files at one time."""

    sha: str
    title: str
    files: Mapping[str, Blob]
    parent: Commit | None = None

    def history(self) -> Iterator[Commit]:
        """This one and all before it, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    """A model repository. `token` opens a private or gated one, besides the owner's."""

    name: str
    private: bool = False
    gated: bool = False
    token: str | None = None
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Blob], title: str, branch: str = "main") -> Commit:
        """Move a branch to a new commit of exactly these files."""
        parent = self.branches.get(branch)
        facts = [self.name, title, len(self.commits), *sorted((n, b.oid) for n, b in files.items())]
        sha = hashlib.sha1(repr(facts).encode(), usedforsecurity=False).hexdigest()
        made = Commit(sha, title, dict(files), parent)
        self.branches[branch] = self.commits[sha] = made
        return made

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch or a hash names."""
        return self.branches.get(revision) or self.commits.get(revision)


def content_files(files: Path | Mapping[str, Content]) -> dict[str, Blob]:
    """The files of a folder, or the given ones, by path."""
    if isinstance(files, Path):
        files = {
            path.relative_to(files).as_posix(): path
            for path in sorted(files.rglob("*"))
            if path.is_file()
        }
    return {path: Blob.of(path, content) for path, content in files.items()}
