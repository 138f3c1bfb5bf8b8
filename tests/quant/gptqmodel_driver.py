"""Run gptqmodel on a folder of jobs; its own process, because its import patches other libraries.

`jobs.json` lists jobs, `in.safetensors` their tensors as `<job>.<part>`. `decode`: stored parts ->
`<job>.weight` [rows, cols]. `quantize`: `<job>.weight` float32 -> the parts gptqmodel stores, and
`<job>.weight` as it decodes them. `load`: a checkpoint's folder -> `<job>.<module>.weight` of every
quantized layer. Results go to `out.safetensors`.
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
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def linear(job: dict[str, Any], shape: tuple[int, int]) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return (AwqTorchLinear if job["method"] == "awq" else TorchLinear)(
        bits=4,
        group_size=job["group_size"],
        sym=job.get("sym", False),
        desc_act=job.get("desc_act", False),
        in_features=shape[1],
        out_features=shape[0],
        bias=False,
        register_buffers=True,
    ).eval()


def decoded(module: Any) -> torch.Tensor:
    """The weight [rows, cols] of a layer whose zero points are in version 2; not compiled."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    if isinstance(module, TorchLinear):
        return TorchLinear.dequantize_weight(module).T.contiguous()
    return dequantize_gemm(
        qweight=module.qweight,
        qzeros=module.qzeros,
        scales=module.scales,
        bits=4,
        group_size=module.group_size,
    ).T.contiguous()


def decode(job: dict[str, Any], parts: Tensors) -> Tensors:
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    module = linear(job, tuple(job["shape"]))
    module.load_state_dict({name: tensor.clone() for name, tensor in parts.items()}, strict=True)
    if job.get("version") == 1:
        convert_gptq_v1_to_v2_format_module(module, bits=4, pack_dtype=torch.int32)
    return {"weight": decoded(module)}


def quantize(job: dict[str, Any], parts: Tensors) -> Tensors:
    """Rounding by gptqmodel's Quantizer, as its RTN does; in a random order for desc_act."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    weight = parts["weight"]
    cols, size = weight.shape[1], job["group_size"]
    config = QuantizeConfig(bits=4, group_size=size, sym=job["sym"])
    quantizer = Quantizer(qcfg=config)
    quantizer.configure(perchannel=True)
    order = torch.arange(cols)
    if job["desc_act"]:
        order = torch.randperm(cols, generator=torch.Generator().manual_seed(0))
    index, rounded = torch.empty(cols, dtype=torch.int32), torch.empty_like(weight)
    scales, zeros = [], []
    for group, columns in enumerate(order.split(cols if size == -1 else size)):
        index[columns] = group
        quantizer.find_params(weight[:, columns], weight=True)
        rounded[:, columns] = quantizer.quantize(weight[:, columns])
        scales.append(quantizer.scale)
        zeros.append(quantizer.zero)
    module, source = linear(job, tuple(weight.shape)), torch.nn.Linear(cols, len(weight))
    source.weight.data, source.bias = rounded, None
    module.pack_original(source, torch.cat(scales, 1), torch.cat(zeros, 1), index)
    result = {"weight": decoded(module)}
    if job["version"] == 1:
        convert_gptq_v2_to_v1_format_module(module, config)
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {**result, **{name: getattr(module, name).contiguous() for name in names}}


def load(job: dict[str, Any], parts: Tensors) -> Tensors:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[job["method"]]
    model = GPTQModel.load(job["folder"], device="cpu", dtype=torch.float16, backend=backend).model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
    return {f"{name}.weight": decoded(module) for name, module in layers.items()}


def main(folder: Path) -> None:
    try:
        import pcre  # noqa: F401
    except ImportError:  # gptqmodel's own regular expressions are plain enough for `re`
        pcre = types.ModuleType("pcre")
        vars(pcre).update({name: getattr(re, name) for name in re.__all__})
        flags = {"MULTILINE": re.M, "CASELESS": re.I, "DOTALL": re.S}
        vars(pcre)["Flag"] = types.SimpleNamespace(**flags)
        sys.modules["pcre"] = pcre
    os.environ["HF_HUB_OFFLINE"] = "1"
    given = load_file(folder / "in.safetensors")
    results: Tensors = {}
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        prefix = f"{number}."
        parts = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
        run = {"decode": decode, "quantize": quantize, "load": load}[job["do"]]
        results |= {prefix + name: tensor for name, tensor in run(job, parts).items()}
    save_file(results, folder / "out.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
