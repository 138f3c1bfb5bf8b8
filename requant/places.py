"""Where a model is read from, and what computes on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.errors import CheckpointError, RequantError
from requant.output import Output

if TYPE_CHECKING:
    import torch

    from requant.convert.folder import Folder


def open_source(source: str, out: Path | None = None) -> Folder:
    """The folder or repository that SRC names. What is unfinished in `out` goes on with the commit
    that it was begun with."""
    from requant.convert.folder import REPOSITORY, Folder

    if source == "demo":
        from requant.demo import demo_path

        return Folder(demo_path())
    path = Path(source)
    try:
        local = path.exists()
    except OSError:  # a name too long
        local = True
    if local or REPOSITORY.fullmatch(source) is None:
        return Folder(path)
    from requant.convert.journal import begun_with
    from requant.hub.repository import open_repository

    try:
        return open_repository(source, None if out is None else begun_with(out))
    except CheckpointError as error:
        raise CheckpointError(f"{error} (and there is no folder {source} here)") from error


def compute_device(name: str | None) -> torch.device:
    """The device to compute on. Raises RequantError when it is not there."""
    import torch

    from requant.convert.processes import local_rank

    if name is None and torch.cuda.is_available():
        # One GPU a process, where a launcher counts them.
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    if name is None:
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as unknown:
        raise RequantError(f"--device {name}: expected cpu, cuda or cuda:N") from unknown
    if device.type not in ("cpu", "cuda"):
        raise RequantError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequantError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def download(repo: str, folder: Path, output: Output) -> dict[str, Any]:
    """Copy a repository, or the built-in model, into a folder; what was done."""
    if repo == "demo":
        from requant.demo import write_demo

        return write_demo(folder)
    from requant.hub import download as hub

    return hub.download(repo, folder, lambda nbytes: output.progress(nbytes, "download"))


def kept_source(source: str, out: Path, keep: Path | None, output: Output) -> Folder:
    """What SRC names, downloaded to the folder `keep` first, if there is one."""
    from requant.convert.folder import Folder
    from requant.convert.processes import launched

    if keep is None:
        return open_source(source, out)
    if Path(source).exists():
        raise RequantError("--keep-source has no effect on a source that is on this disk")
    if launched():
        raise RequantError("--keep-source takes one process; `requant download` first")
    download(source, keep, output)
    return Folder(keep)
