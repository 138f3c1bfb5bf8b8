"""The verdict at the command line: run, print, exit 1 when it is no."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from requant.errors import RequantError
from requant.output import Output, plain
from requant.places import compute_device

if TYPE_CHECKING:
    from requant.convert.folder import Folder
    from requant.convert.processes import Team


def verify_sides(
    source: Folder,
    out: Path | Folder,
    max_kl: float | None,
    device: str | None,
    output: Output,
    tokens: int = 2048,
    text: Path | None = None,
    processes: Team | None = None,
) -> dict[str, Any]:
    """Run source and output side by side, with a bar; verify's document."""
    from requant.convert.processes import Team
    from requant.verify.comparison import verify

    processes = processes or Team()
    words = processes.each(lambda: _read_text(text))
    where = processes.each(lambda: compute_device(device))
    label = out if isinstance(out, Path) else out.label
    output.status(f"verify: running {source.label} and {label} side by side")
    # Close enough for a bar: headers are a few kilobytes.
    nbytes = sum(source.facts(file).nbytes for file in source.weight_files())
    with output.progress(nbytes, "verify") as progress:
        return verify(
            source,
            out,
            device=where,
            max_kl=max_kl,
            tokens=tokens,
            text=words,
            progress=progress,
            team=processes,
        )


def _read_text(path: Path | None) -> str | None:
    try:
        return path.read_text("utf-8") if path is not None else None
    except (OSError, UnicodeDecodeError) as unreadable:
        raise RequantError(f"{path}: cannot read the text: {unreadable}") from unreadable


def judge(verdict: dict[str, Any], document: dict[str, Any], output: Output) -> None:
    """Print the verdict and exit 1 when it is no."""
    from requant.verify.report import render

    output.result(document, lambda: render(verdict))
    if not verdict["ok"]:
        raise typer.Exit(1)


def judge_checksums(folder: Path, output: Output) -> None:
    """Compare files with what was recorded when they were written; exit 1 when they differ."""
    from requant.verify.checksums import check, recorded

    total = sum(facts.nbytes for facts in recorded(folder).values())
    with output.progress(total, "hash") as progress:
        found = check(folder, progress)
    count = f"{found['files']} files, {len(found['problems'])} of them changed or missing"
    output.result(found, lambda: plain("\n".join([*found["problems"], count])))
    if not found["ok"]:
        raise typer.Exit(1)
