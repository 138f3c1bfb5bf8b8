"""Let gptqmodel save and load whole checkpoints; its own process: its import patches libraries.

`folders.json` lists jobs: `{"save": options, "source": ..., "folder": ...}` rounds a BF16 model to
the nearest codes and saves it, `{"method": "gptq" or "awq", "folder": ...}` does no more than load.
After either, the weights of the quantized layers as gptqmodel decodes them go to
`<job>.safetensors` beside the list.
"""

from __future__ import annotations

import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "quant"))
import gptqmodel_driver  # noqa: E402


def save(job: dict[str, Any]) -> None:
    """Weights only, no calibration; packed by its plain torch code, not by one to be compiled."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import RTNConfig

    config = RTNConfig(bits=4, pack_impl="original", **job["save"])
    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[job["method"]]
    model = GPTQModel.load(
        job["source"], config, device="cpu", dtype=torch.float16, backend=backend
    )
    model.quantize(None)
    model.save(job["folder"])


def main(folder: Path) -> None:
    try:
        import pcre  # noqa: F401
    except ImportError:  # as in gptqmodel_driver
        pcre = types.ModuleType("pcre")
        vars(pcre).update({name: getattr(re, name) for name in re.__all__})
        flags = {"MULTILINE": re.M, "CASELESS": re.I, "DOTALL": re.S}
        vars(pcre)["Flag"] = types.SimpleNamespace(**flags)
        sys.modules["pcre"] = pcre
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with one it does not load a model to quantize
    for number, job in enumerate(json.loads((folder / "folders.json").read_text())):
        if "save" in job:
            save(job)
        save_file(gptqmodel_driver.load(job, {}), folder / f"{number}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
