"""The built-in demo model: a small DeepSeek-V3, trained by scripts/train_demo.py, as published
checkpoints are: FP8 blocks, several files, one layer for multi-token prediction.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from requant.errors import CheckpointError


def demo_path() -> Path:
    """The demo checkpoint's folder inside the installed package."""
    return Path(str(resources.files("requant.demo").joinpath("checkpoint")))


def heldout_text() -> str:
    """English documentation text that the demo model was not trained on."""
    return resources.files("requant.demo").joinpath("heldout.txt").read_text("utf-8")


def write_demo(folder: Path) -> dict[str, Any]:
    """Copy the demo checkpoint into a new or empty folder; config.json comes last."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: already holds something; choose an empty folder")
    files = sorted(demo_path().iterdir(), key=lambda path: (path.name == "config.json", path.name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write: {error}") from error
    return {
        "source": "demo",
        "output": str(folder),
        "files": len(files),
        "written_bytes": sum(file.stat().st_size for file in files),
    }
