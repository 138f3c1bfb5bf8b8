"""Feed requant checkpoints that lie: `python bench/fuzz.py --cases 10000 --seed 0`.

Small checkpoints in many formats are spoiled at random: headers, index, config.json,
hf_quant_config.json, ranks.json, bitsandbytes' quant_state, bytes of weights, and the folder itself
(links, FIFOs, folders with names of files). Each case opens, inspects and plans the result, and
converts a sample. It must work or raise RequantError with one line that names the file or the
tensor, soon, in little memory, writing nothing outside OUT. Anything else is a finding; exits with
1 then.

A case depends on seed and number alone: `--case 17` runs one and prints where it went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from requant.convert.inspect import inspect
from requant.convert.inspect_table import render
from requant.convert.parallel import Parallel
from requant.convert.plan import make_plan
from requant.convert.ranks import split
from requant.convert.recipe import KEEP, default_recipe, parse_recipe
from requant.convert.report import plan_table
from requant.convert.run import Runtime, convert
from requant.convert.shard import as_written, shard
from requant.convert.source import Checkpoint
from requant.errors import RequantError

INDEX, MODELOPT = "model.safetensors.index.json", "hf_quant_config.json"
#: A case that takes longer is stopped, and its process ended when even that does not help.
SECONDS, PATIENCE = 2.0, 15.0
#: More resident memory than before a case, in bytes; address space gets twice that.
MEMORY = 1 << 30
#: One case in so many is converted too.
CONVERTED = 8
TARGETS = (
    "bf16 fp32 fp8-block fp8-channel int8-channel int4[group_size=32] mxfp4 nvfp4 nf4 "
    "int4-awq[group_size=32] int4-gptq[group_size=32] mxfp8"
).split()
#: What the seeds are stored in: requant's own output, but for the last ones, which are made here.
STORED = (
    "bf16 fp8-block int4[group_size=32] int4-gptq[group_size=32] int4-awq[group_size=32] nf4 mxfp4 "
    "nvfp4 nvfp4[container=modelopt] int8-channel mxfp8 fp8-channel"
).split()
MIXED = """
[roles]
attention = "fp8-channel"
routed_expert = "int4[group_size=32]"
dense_mlp = "int8-channel"
"""
#: What ranks.json may say of a weight, and some that it may not.
PIECES = (
    "replicated", "experts", "rows 0:16", "rows 16:32", "cols 0:32", "experts, rows 0:16",
    "rows 0:0", "rows 5:3", "rows 0:99999999", "rows -1:4", "diagonal", "", "rows 0:16 ",
)  # fmt: skip
SECRET = b"SECRET: never to be copied"


@dataclass
class Verdict:
    """What became of a case: `worked`, `refused`, or a finding with its kind."""

    case: int
    what: str
    outcome: str
    message: str = ""
    seconds: float = 0.0
    where: str = ""

    @property
    def finding(self) -> bool:
        return self.outcome not in ("worked", "refused")


class Stopped(BaseException):
    """The time is up. No Exception, so that nothing takes it for an error of the input."""


def main() -> None:
    """Parse, fuzz, print."""
    options = _options()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.dir))
    try:
        seeds = make_seeds(folder / "seeds")
        if options.case is not None:
            found = [one_case(options.case, options.seed, seeds, folder / "one")]
        else:
            found = fuzz(options.cases, options.seed, seeds, folder, options.processes)
    finally:
        shutil.rmtree(folder)
    findings = [verdict for verdict in found if verdict.finding]
    report = {
        "ok": not findings,
        "cases": len(found),
        "outcomes": dict(Counter(verdict.outcome for verdict in found)),
        "mutations": len({verdict.what for verdict in found}),
        "slowest_seconds": max(verdict.seconds for verdict in found),
        "wall_seconds": round(time.monotonic() - started, 1),
        "findings": [asdict(verdict) for verdict in findings],
    }
    if options.json:
        print(json.dumps(report))
    else:
        _print(report, findings)
    raise SystemExit(0 if report["ok"] else 1)


def _print(report: dict[str, Any], findings: list[Verdict]) -> None:
    for key, value in report.items():
        if key != "findings":
            print(f"{key:>16}: {value}")
    alike: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in findings:
        alike.setdefault((verdict.outcome, verdict.where), []).append(verdict)
    for (outcome, where), verdicts in alike.items():
        first = verdicts[0]
        print(f"\n{len(verdicts)} x {outcome} at {where}")
        print(
            f"  e.g. --case {first.case} ({first.what}, {first.seconds} s): {first.message[:300]}"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations (0)")
    parser.add_argument("--case", type=int, help="run this one only")
    parser.add_argument("--processes", type=int, default=2, help="at a time (2)")
    parser.add_argument("--dir", type=Path, default=None, help="working folder (the temporary one)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args()


# ---- seeds --------------------------------------------------------------------------------------


def make_seeds(folder: Path) -> list[Path]:
    """Small valid checkpoints in many formats; every one opens."""
    torch.set_num_threads(1)
    base = _plain_seed(folder / "plain")
    seeds = [base]
    runtime = Runtime(torch.device("cpu"), 1)
    recipes = [default_recipe(text) for text in STORED[1:]]
    for number, recipe in enumerate([*recipes, parse_recipe("mixed", MIXED, preset=True)]):
        out = folder / f"{number}-{recipe.name}"
        convert(make_plan(Checkpoint.open(base), recipe), out, runtime)
        (out / "requant.json").unlink()
        seeds.append(out)
    seeds += [_fused_seed(folder / "fused-fp8", "fp8"), _fused_seed(folder / "gpt-oss", "mxfp4")]
    seeds.append(_fused_seed(folder / "llama4", ""))
    seeds += [_ranks_seed(base, folder / "ranks"), _ranks_seed(seeds[2], folder / "int4-ranks")]
    for seed in seeds:
        Checkpoint.open(seed)
    return seeds


def _ranks_seed(source: Path, folder: Path) -> Path:
    """A seed cut for two ranks."""
    plan = make_plan(Checkpoint.open(source), KEEP)
    parts = split(as_written(plan), Parallel(2, 2))
    convert(shard(plan, parts, "hf"), folder, Runtime(torch.device("cpu"), 1))
    (folder / "requant.json").unlink()
    return folder


def _plain_seed(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens": (32, 128),
        "lm_head": (32, 128),
        "model.layers.0.self_attn.q_proj": (128, 128),
        "model.layers.0.self_attn.k_proj": (64, 128),
        "model.layers.0.mlp.down_proj": (128, 256),
        "model.layers.1.mlp.gate": (4, 128),
        "model.layers.1.mlp.experts.0.up_proj": (128, 128),
        "model.layers.1.mlp.experts.1.gate_proj": (128, 128),
    }
    tensors = {
        f"{module}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for module, shape in shapes.items()
    }
    tensors["model.norm.weight"] = torch.ones(128)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32,
        "architectures": ["DeepseekV3ForCausalLM"],
    }
    return _write(folder, tensors, config, files=2)


def _fused_seed(folder: Path, method: str) -> Path:
    """Experts fused as transformers 5 (FP8), gpt-oss (MXFP4) and Llama-4 (plain) store them."""
    experts = "model.layers.0.mlp.experts"
    config: dict[str, Any] = {"model_type": "llama4", "hidden_size": 128, "num_hidden_layers": 1}
    if method == "mxfp4":
        tensors = {f"{experts}.{leaf}_bias": torch.zeros(2, rows, dtype=torch.bfloat16)
                   for leaf, rows in (("gate_up_proj", 256), ("down_proj", 128))}  # fmt: skip
        for leaf, rows in (("gate_up_proj", 256), ("down_proj", 128)):
            tensors[f"{experts}.{leaf}_blocks"] = torch.full((2, rows, 4, 16), 0x21).byte()
            tensors[f"{experts}.{leaf}_scales"] = torch.full((2, rows, 4), 127).byte()
        config |= {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    elif method == "fp8":
        one = torch.ones(1).to(torch.float8_e4m3fn)
        tensors = {
            f"{experts}.gate_up_proj": one.expand(2, 256, 128),
            f"{experts}.gate_up_proj_scale_inv": torch.ones(2, 2, 1),
            f"{experts}.down_proj": one.expand(2, 128, 128),
            f"{experts}.down_proj_scale_inv": torch.ones(2, 1, 1),
        }
        scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        config["quantization_config"] = scheme
    else:
        tensors = {
            f"{experts}.gate_up_proj": torch.ones(2, 128, 64).to(torch.bfloat16),
            f"{experts}.down_proj": torch.ones(2, 32, 128).to(torch.bfloat16),
        }
    tensors["model.norm.weight"] = torch.ones(128)
    return _write(folder, tensors, config, files=1)


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], files: int
) -> Path:
    folder.mkdir(parents=True)
    names = [f"model-0000{n + 1}-of-0000{files}.safetensors" for n in range(files)]
    names = ["model.safetensors"] if files == 1 else names
    places = {tensor: names[number % files] for number, tensor in enumerate(tensors)}
    for name in names:
        content = {t: tensors[t].contiguous() for t in tensors if places[t] == name}
        save_file(content, folder / name, {"format": "pt"})
    if files > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


# ---- mutations ----------------------------------------------------------------------------------

#: Patterns that a backtracking matcher needs ages for, on names such as ours.
REGEXES = (
    r"re:(\w+\.?)+!", r"re:(.*)*!", r"re:(a+)+$", r"re:(\w|\d|\.)+!$", r"re:((\w+)\.?)+$!",
    "re:(", "re:" + "(" * 200, r"re:.*(?:\w*\w*)*!", "re:" + "a?" * 60 + "a" * 60,
    "re:(?P<x>.)(?P=x){9999}", "re:.{99999999999}", "re:x{65535}{65535}", "re:", "Linear",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 31, 127, 1 << 31, 1 << 53, 1 << 60, (1 << 63) - 1, 1 << 63, 1 << 64,
           10**400, -(10**30), 0.5, 1e308, float("nan"), float("inf"), float("-inf"))  # fmt: skip
TEXTS = ("", "x", "../../x", "/etc/passwd", "\0", "\ud800", "\n", "\x1b[2J", "a" * 100_000, "nan",
         "1", "fp8", "mxfp4", "bitsandbytes", "gptq", "awq", "compressed-tensors", "modelopt",
         "mxfp8", "float", "int", "group", "block", "channel", "tensor", "NVFP4", "FP8",
         "pack-quantized", "float8_e4m3fn", "ue8m0", "gpt_oss", "llama4")  # fmt: skip


def hostile(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value but the one that is expected."""
    kind = chance.randrange(8)
    if kind <= 1:
        return chance.choice((None, True, False, [], {}, [[]], {"": None}, [None], [{}]))
    if kind <= 3:
        return chance.choice(NUMBERS)
    if kind == 4:
        return chance.choice((*TEXTS, *REGEXES))
    if kind == 5:
        return [chance.choice(NUMBERS) for _ in range(chance.randrange(4))]
    if kind == 6 and depth < 3:
        key = chance.choice(("weights", "targets", "text_config", "quantization_config", "", "0"))
        return {key: hostile(chance, depth + 1)}
    value: Any = chance.choice((1, "x", None))
    for _ in range(chance.choice((3, 60, 400))):
        value = [value] if chance.random() < 0.5 else {"text_config": value}
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def spoil_json(document: Any, chance: random.Random, prefer: str = "") -> str:
    """Change one value of a JSON document in place; what was done."""
    every = list(places(document))
    wanted = [p for p in every if prefer in map(str, p)] if chance.random() < 0.75 else every
    path = chance.choice(wanted or every)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    last = path[-1]
    what = ".".join("#" if isinstance(k, int) else str(k) for k in path)
    action = chance.randrange(10)
    if action == 0:
        del parent[last]
        return f"{what} removed"
    if action == 1:
        parent[last] = [parent[last]]
    elif action == 2 and isinstance(parent, dict):
        parent[chance.choice(TEXTS[2:])] = parent.pop(last)
    elif action == 3:
        parent[last] = str(parent[last])
    elif action == 4 and isinstance(parent[last], (int, float)):
        parent[last] = parent[last] * chance.choice((-1, 2, 0, 3, 0.5))
    elif "targets" in path or last == "ignore":
        pattern = chance.choice(REGEXES)
        parent[last] = [pattern] if isinstance(parent[last], list) else pattern
    else:
        parent[last] = hostile(chance)
    return f"{what} changed"


def dump(value: Any, chance: random.Random) -> bytes:
    """JSON text, now and then broken as text."""
    data = json.dumps(value).encode()
    kind = chance.randrange(24)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return b"\xff\xfe" + data
    if kind == 2:
        return chance.choice((b"[", b'{"a":')) * 100_000
    if kind == 3:
        return data.replace(b":", b": " + b"9" * 5000 + b",", 1)
    if kind == 4:
        where = chance.randrange(len(data))
        return data[:where] + bytes([chance.randrange(256)]) + data[where + 1 :]
    if kind == 5:
        return data[:-1] + b"," + data[1:]  # every key twice
    return data


def spoil_config(folder: Path, chance: random.Random) -> str:
    config = json.loads((folder / "config.json").read_bytes())
    what = spoil_json(config, chance, "quantization_config")
    if chance.random() < 0.1:
        config = {"text_config": config, **(config if chance.random() < 0.5 else {})}
    if chance.random() < 0.2:
        spoil_json(config, chance, "quantization_config")
    (folder / "config.json").write_bytes(dump(config, chance))
    return f"config {what}"


def spoil_modelopt(folder: Path, chance: random.Random) -> str:
    """hf_quant_config.json, alone or beside a quantization_config."""
    path = folder / MODELOPT
    default = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["x"],
               "kv_cache_quant_algo": None}, "producer": {"name": "modelopt"}}  # fmt: skip
    value = json.loads(path.read_bytes()) if path.is_file() else default
    spoil_json(value, chance, "quantization")
    path.write_bytes(dump(value, chance))
    if chance.random() < 0.8:
        config = json.loads((folder / "config.json").read_bytes())
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config))
    return "hf_quant_config"


def spoil_index(folder: Path, chance: random.Random) -> str:
    path = folder / INDEX
    if not path.is_file():
        names = list(read_container(folder / "model.safetensors")[0])
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    index = json.loads(path.read_bytes())
    weight_map = index["weight_map"]
    name = chance.choice(list(weight_map))
    what = chance.choice(("climbs", "absent", "value", "extra", "json", "huge", "swapped"))
    if what == "climbs":
        weight_map[name] = chance.choice(
            ("../x.safetensors", "/etc/passwd", "/dev/zero", "../model/" + weight_map[name], ".",
             "..", "./" + weight_map[name], "a/b.safetensors", weight_map[name] + "/", "\0",
             "\ud800.safetensors", "x" * 300 + ".safetensors", "../secret.safetensors")
        )  # fmt: skip
    elif what == "absent":
        weight_map[name] = "absent.safetensors"
    elif what == "value":
        weight_map[name] = hostile(chance)
    elif what == "extra":
        weight_map[chance.choice(TEXTS)] = weight_map[name]
    elif what == "json":
        spoil_json(index, chance)
    elif what == "huge":
        weight_map |= {f"a.{n}.weight": weight_map[name] for n in range(50_000)}
    else:
        weight_map[name] = chance.choice(list(weight_map.values()))
    path.write_bytes(dump(index, chance))
    return f"index {what}"


Header = dict[str, Any]


def read_container(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, data[8 + length :]


def write_container(path: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)


def some_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.glob("*.safetensors")))


def spoil_header(folder: Path, chance: random.Random) -> str:
    """The header's text, without regard to what it means."""
    path = some_file(folder, chance)
    header, data = read_container(path)
    name = chance.choice(list(header))
    entry = header[name]
    begin, end = entry["data_offsets"]
    what = chance.choice(
        "overlap hole range negative value sides twice deep bits length cut longer metadata json "
        "entries constant".split()
    )
    if what == "overlap":
        entry["data_offsets"] = [max(0, begin - 8), max(0, end - 8)]
    elif what == "hole":
        data, entry["data_offsets"] = data + bytes(8), [begin + 8, end + 8]
    elif what == "range":
        entry["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]
    elif what == "negative":
        key = chance.choice(("shape", "data_offsets")) if entry["shape"] else "data_offsets"
        entry[key][0] = -chance.choice((1, 8, 1 << 62))
    elif what == "value":
        entry[chance.choice(list(entry))] = hostile(chance)
    elif what == "sides":
        entry["shape"] = chance.choice(
            ([1 << 60], [1 << 60, 0], [1 << 32, 1 << 32], [1] * 50_000, [1 << 62] * 9, [])
        )
    elif what == "metadata":
        header["__metadata__"] = hostile(chance)
    elif what == "json":
        spoil_json(header, chance)
    elif what == "entries":
        header |= {f"a.{n}.b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                   for n in range(2_000)}  # fmt: skip
    text = json.dumps(header).encode()
    if what == "twice":
        text = text[:-1] + b"," + text[1:]
    elif what == "deep":
        text = b'{"a":' * 100_000
    elif what == "constant":
        text = text.replace(b"[", b"[" + chance.choice((b"NaN,", b"Infinity,", b"1e999,")), 1)
    length = len(text)
    if what == "length":
        length = chance.choice((0, 1, 7, length - 1, length + 1, 10**8, 1 << 63, (1 << 64) - 1))
    write_container(path, text, data, length)
    if what in ("bits", "cut", "longer"):
        raw = bytearray(path.read_bytes())
        for _ in range(chance.randrange(1, 9)):
            raw[chance.randrange(len(text) + 8)] ^= 1 << chance.randrange(8)
        if what == "cut":
            raw = bytearray(path.read_bytes())[: chance.randrange(len(raw))]
        elif what == "longer":
            raw = bytearray(path.read_bytes()) + bytes(chance.randrange(1, 99))
        path.write_bytes(raw)
    return f"header {what}"


BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "U8": 8, "I8": 8, "I32": 32, "I64": 64,
        "U16": 16, "I16": 16, "U32": 32, "U64": 64, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
        "F8_E8M0": 8, "F4": 4, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip
PARTS = (
    "weight weight_scale weight_scale_inv weight_packed weight_shape weight_zero_point "
    "weight_g_idx weight_global_scale weight_scale_2 input_scale qweight qzeros scales g_idx "
    "weight_blocks scale weight_scales weight.absmax weight.quant_map weight.nested_absmax "
    "bias pre_quant_scale k_scale weight.quant_state.bitsandbytes__nf4 "
    "weight.quant_state.bitsandbytes__fp4 qscale_weight "
).split()


def spoil_tensors(folder: Path, chance: random.Random) -> str:
    """A container that is valid, with tensors that are not what the config and names say."""
    path = some_file(folder, chance)
    header, data = read_container(path)
    tensors = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
               for n, e in header.items()}  # fmt: skip
    whats = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        name = chance.choice(list(tensors))
        dtype, shape, content = tensors[name]
        what = chance.choice(
            "dtype dtype shape rank dropped named part added empty content".split()
        )
        whats.append(what)
        if what == "dtype":
            dtype = chance.choice(list(BITS))
        elif what == "shape" and shape:
            side = chance.randrange(len(shape))
            sizes = (0, 1, 2, 3, shape[side] * 2, shape[side] // 2, shape[side] + 1, 129)
            shape = [*shape[:side], chance.choice(sizes), *shape[side + 1 :]]
        elif what == "rank":
            flat = len(content) * 8 // BITS[dtype]
            shape = chance.choice(([flat], [1, *shape], [*shape, 1], [flat, 1], [1, flat], [],
                                   shape[::-1], [1] * 70, shape[1:]))  # fmt: skip
        elif what == "dropped":
            del tensors[name]
            if not tensors:
                break
            continue
        elif what == "named":
            del tensors[name]
            name = chance.choice(
                ("a" * 5000, "weight", ".weight", "model.layers.99999999999.mlp.up_proj.weight",
                 "model.layers.0.mlp.experts.gate_up_proj", name + ".weight", "../../" + name,
                 "experts.down_proj_blocks", "mtp.layers.0.mlp.up_proj.weight", "." * 2000,
                 "é.weight", "experts.gate_up_proj_scale_inv", "layers.-1.q_proj.weight",
                 "a.experts.down_proj")
            )  # fmt: skip
        elif what == "part":
            del tensors[name]
            name = f"{name.rpartition('.')[0]}.{chance.choice(PARTS)}"
        elif what == "added":
            name = f"{name.rpartition('.')[0]}.{chance.choice(PARTS)}"
        elif what == "empty":
            shape = chance.choice(([0], [1 << 62, 0], [0, 1 << 40, 5], [0, 0], [1 << 40, 0, 3]))
            name = chance.choice((name, name, name, "model.layers.0.mlp.experts.gate_up_proj",
                                  "model.layers.0.mlp.experts.down_proj_blocks"))  # fmt: skip
            if name.endswith("_blocks"):
                shape = [1 << 50, 4, 0, 16]
        elif what == "content":
            size = len(content)
            content = chance.choice(
                (bytes(size), b"\xff" * size, b"\x7f" * size, chance.randbytes(size))
            )
        bits = BITS[dtype]
        for side in shape:
            bits *= side
        if bits > 1 << 26:
            continue
        tensors[name] = dtype, shape, content[: -(-bits // 8)].ljust(-(-bits // 8), b"\1")
    header, offset = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        span = [offset, offset + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        offset += len(content)
    text = json.dumps(header).encode()
    write_container(path, text + b" " * (-len(text) % 8), b"".join(t[2] for t in tensors.values()))
    if (folder / INDEX).is_file() and chance.random() < 0.95:
        weight_map = {n: p.name for p in folder.glob("*.safetensors") for n in read_container(p)[0]}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return f"tensors {'+'.join(sorted(set(whats)))}"


def spoil_quant_state(folder: Path, chance: random.Random) -> str:
    """bitsandbytes' JSON inside a tensor, kept at its length where it may."""
    for path in sorted(folder.glob("*.safetensors"), key=lambda p: chance.random()):
        header, data = read_container(path)
        names = [name for name in header if "quant_state" in name]
        if names:
            entry = header[chance.choice(names)]
            begin, end = entry["data_offsets"]
            state = json.loads(data[begin:end].rstrip(b" \0"))
            spoil_json(state, chance)
            text = dump(state, chance)[: end - begin].ljust(end - begin)
            if chance.random() < 0.2:
                text = chance.randbytes(end - begin)
            raw = json.dumps(header).encode()
            write_container(path, raw + b" " * (-len(raw) % 8), data[:begin] + text + data[end:])
            return "quant_state"
    return spoil_tensors(folder, chance)


#: Read as JSON; other files are copied, however long that takes.
_READ = ("config.json", INDEX, MODELOPT)


def spoil_ranks(folder: Path, chance: random.Random) -> str:
    """What says which rank holds what; or a rank's files."""
    ranks = sorted(path for path in folder.iterdir() if path.is_dir())
    if chance.random() < 0.3:
        return f"ranks {chance.choice((spoil_header, spoil_tensors))(chance.choice(ranks), chance)}"
    path = folder / "ranks.json"
    document = json.loads(path.read_text())
    if chance.random() < 0.25:
        first, second = (rank["weights"] for rank in document["ranks"])
        name = chance.choice(sorted(set(first) & set(second)))
        first[name], second[name] = chance.choice(PIECES), chance.choice((first[name], *PIECES))
        what = "pieces"
    else:
        prefer = chance.choice(("weights", "files", "folder", "headers", "tp"))
        what = spoil_json(document, chance, prefer).rpartition(".")[2]
    path.write_bytes(dump(document, chance))
    return f"ranks.json {what}"


def spoil_folder(folder: Path, chance: random.Random) -> str:
    """Links, FIFOs, folders, and files that nobody expects."""
    name = chance.choice(
        ("config.json", INDEX, MODELOPT, some_file(folder, chance).name, "tokenizer.json",
         "generation_config.json", "extra.safetensors", "requant.json", "model.safetensors",
         "config.json.partial", ".requant-journal.jsonl", "a/b/c.txt", "sub")
    )  # fmt: skip
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    what = chance.choice(
        "fifo folder outside loop dangling empty nested secret device large".split()
    )
    content = path.read_bytes() if path.is_file() else b""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    secret = folder.parent / "secret.safetensors"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
        (path / "inside.txt").write_bytes(content)
    elif what == "outside":
        path.symlink_to(secret)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "nested":
        path.symlink_to(folder)
    elif what == "secret":
        path.symlink_to("../secret.safetensors")
    elif what == "device":
        path.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem")))
    else:
        with path.open("wb") as file:  # sparse
            read = path.suffix == ".safetensors" or path.parent == folder and name in _READ
            file.truncate(chance.choice((1 << 20, 1 << 34)) if read else 1 << 20)
    return f"folder {what} {'weights' if 'of-0' in name else name}"


MUTATIONS: tuple[tuple[Callable[[Path, random.Random], str], int], ...] = (
    (spoil_config, 7), (spoil_tensors, 7), (spoil_header, 4), (spoil_index, 2),
    (spoil_quant_state, 1), (spoil_modelopt, 2), (spoil_folder, 2), (spoil_ranks, 3),
)  # fmt: skip


# ---- one case -----------------------------------------------------------------------------------


def one_case(number: int, seed: int, seeds: list[Path], place: Path) -> Verdict:
    """Make and judge a case in an empty folder of its own, then remove it."""
    chance = random.Random(f"{seed} {number}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "secret.safetensors").write_bytes(SECRET)
    cut = [seed for seed in seeds if seed.name.endswith("ranks")]
    mutate = chance.choices(*zip(*MUTATIONS, strict=True))[0]
    origin = chance.choice(cut if mutate is spoil_ranks else [s for s in seeds if s not in cut])
    if mutate is spoil_quant_state:
        origin = next(seed for seed in seeds if seed.name.endswith("nf4"))
    folder = Path(shutil.copytree(origin, place / "model"))
    what = f"{origin.name}: {mutate(folder, chance)}"
    verdict = Verdict(number, what, "worked")
    names = tensor_names(origin) | tensor_names(folder)
    before = standing(place)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.monotonic(), time.process_time()
    try:
        with time_limit():
            use(folder, place / "out", chance)
    except RequantError as error:
        verdict.outcome, verdict.message = "refused", str(error)
        verdict.where = last_line(error)
        if "\n" in str(error) or len(str(error)) > 3000:
            verdict.outcome = "message of many lines or letters"
        elif str(place) not in str(error) and not any(name in str(error) for name in names):
            verdict.outcome = "message that names nothing"
    except Stopped as stopped:
        verdict.outcome, verdict.message = "hang", repr(stopped)
        verdict.where = last_line(stopped)
    except BaseException as bug:
        verdict.outcome, verdict.message = type(bug).__name__, repr(bug)[:1000]
        verdict.where = last_line(bug)
    verdict.seconds = round(min(time.monotonic() - started, time.process_time() - cpu), 2)
    if not verdict.finding:
        verdict.outcome = after(verdict, place, before, memory)
    for path in sorted(place.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(place)
    return verdict


def after(
    verdict: Verdict, place: Path, before: dict[str, tuple[int, int, int]], memory: int
) -> str:
    """The verdict, once time, memory and what lies on the disk are looked at."""
    if verdict.seconds > SECONDS:
        return "slow"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 > MEMORY:
        return "memory"
    if standing(place) != before:
        return "wrote outside OUT"
    for path in (place / "out").rglob("*"):
        if path.is_symlink() or (path.is_file() and SECRET in path.read_bytes()):
            return "copied what lies outside"
    return verdict.outcome


def use(folder: Path, out: Path, chance: random.Random) -> None:
    """Open, inspect and plan, as the commands do; convert now and then."""
    checkpoint = Checkpoint.open(folder)
    facts = inspect(checkpoint)
    json.dumps(facts, allow_nan=False)
    screen = Console(file=open(os.devnull, "w", errors="backslashreplace"), width=100)
    screen.print(render(facts))
    refused: list[RequantError] = []
    targets = chance.sample(TARGETS, 2)
    converted = chance.randrange(CONVERTED) == 0
    for target in targets:
        try:
            plan = make_plan(checkpoint, default_recipe(target))
        except RequantError as error:
            refused.append(error)
            continue
        summary = plan.summary()
        json.dumps(summary, allow_nan=False)
        screen.print(plan_table(summary))
        if converted:
            converted = False
            convert(plan, out, Runtime(torch.device("cpu"), 1))
    screen.file.close()
    if refused:  # to be judged as any other refusal
        raise refused[0]


def limit_memory() -> tuple[int, int]:
    """Let this process have twice MEMORY more address space; the limits before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MEMORY, before[1]))
    return before


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise Stopped inside, several times, when the time is up and some is to spare."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"after {3 * SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def tensor_names(folder: Path) -> set[str]:
    """Names, and modules, of tensors that a message may mention."""
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(Exception):
            if stat.S_ISREG(path.stat().st_mode) and path.stat().st_size < 1 << 26:
                names |= read_container(path)[0].keys()
    return {n for name in names for n in (name, name.rpartition(".")[0]) if len(n) > 3}


def last_line(bug: BaseException) -> str:
    """The innermost line of requant in a traceback."""
    frames = traceback.extract_tb(bug.__traceback__)
    ours = [f for f in frames if "/requant/" in f.filename and "/bench/" not in f.filename]
    frame = (ours or frames)[-1] if frames else None
    if frame is None:
        return ""
    return f"{frame.filename.rpartition('/requant/')[2]}:{frame.lineno} {frame.line}"


def standing(place: Path) -> dict[str, tuple[int, int, int]]:
    """Everything beside OUT, with its mode, size and time."""
    found = {}
    for path in place.rglob("*"):
        name = str(path.relative_to(place))
        if name != "out" and not name.startswith("out/"):
            facts = path.lstat()
            found[name] = facts.st_mode, facts.st_size, facts.st_mtime_ns
    return found


# ---- many cases ---------------------------------------------------------------------------------


def fuzz(cases: int, seed: int, seeds: list[Path], folder: Path, processes: int) -> list[Verdict]:
    """All cases, many in one process; a process that dies or hangs is a finding, and replaced."""
    context = multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "spawn")
    waiting = {number: iter(range(number, cases, processes)) for number in range(processes)}
    verdicts: list[Verdict] = []
    lanes = {
        number: _Lane(context, seed, seeds, folder / f"lane-{number}", todo)
        for number, todo in waiting.items()
    }
    while lanes:
        ready = multiprocessing.connection.wait([lane.pipe for lane in lanes.values()], timeout=0.5)
        for number, lane in list(lanes.items()):
            verdict = lane.look(lane.pipe in ready)
            if verdict is not None:
                verdicts.append(verdict)
            if lane.case is None:
                lane.end()
                del lanes[number]
    return sorted(verdicts, key=lambda verdict: verdict.case)


class _Lane:
    """A process that works through its cases, and the one it is at."""

    def __init__(
        self, context: Any, seed: int, seeds: list[Path], place: Path, todo: Iterator[int]
    ) -> None:
        self._context, self._arguments, self._todo = context, (seed, seeds, place), todo
        self.case: int | None = None
        self._start()
        self._next()

    def look(self, ready: bool) -> Verdict | None:
        """The verdict of the present case, when there is one; goes on with the next."""
        assert self.case is not None
        alive = self._process.is_alive()  # a sibling may hold the pipe of a dead process open
        verdict: Verdict | None = None
        if ready:
            with contextlib.suppress(EOFError):
                verdict = self.pipe.recv()
        if verdict is not None:
            pass
        elif ready or not alive:
            self._process.join()
            verdict = self._lost(f"crash, exit status {self._process.exitcode}")
        elif time.monotonic() - self._since > PATIENCE:
            verdict = self._lost("hang that nothing stops")
        else:
            return None
        self._next()
        return verdict

    def end(self) -> None:
        """Let the process go."""
        self.pipe.send(None)  # siblings hold this pipe too, so closing it would not do
        self._process.join()

    def _lost(self, outcome: str) -> Verdict:
        self._process.kill()
        self._process.join()
        self.pipe.close()
        self._start()
        assert self.case is not None
        return Verdict(self.case, "?", outcome)

    def _start(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_work, args=(theirs, *self._arguments))
        self._process.start()
        theirs.close()

    def _next(self) -> None:
        self.case = next(self._todo, None)
        self._since = time.monotonic()
        if self.case is not None:
            self.pipe.send(self.case)


def _work(pipe: Connection, seed: int, seeds: list[Path], place: Path) -> None:
    """The child: cases come in, verdicts go out."""
    torch.set_num_threads(1)
    limit_memory()
    while (number := pipe.recv()) is not None:
        verdict = one_case(number, seed, seeds, place)
        if verdict.outcome in ("hang", "slow"):  # the machine may have been busy
            verdict = one_case(number, seed, seeds, place)
        pipe.send(verdict)


if __name__ == "__main__":
    main()
