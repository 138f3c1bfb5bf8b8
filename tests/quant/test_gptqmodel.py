"""gptqmodel loads what is written here, and what it writes is read here: every weight bit for bit.

It decodes in float16: (code - zero) * scale is exact in float32, so one rounding gives its result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from requant.quant import detect_format, parse_format
from requant.quant.codec import TORCH_DTYPES, TensorSpec
from tests.helpers import Tensors, write_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed"
)

#: gptqmodel's own layers take rows in eights for AWQ, any for GPTQ.
OURS = [
    ("int4-gptq[group_size=32]", (48, 160)),
    ("int4-gptq[group_size=32,version=2]", (40, 96)),
    ("int4-gptq[group_size=32,symmetric=false]", (40, 96)),
    ("int4-gptq[group_size=64,symmetric=false,version=2]", (37, 100)),
    ("int4-gptq[group_size=-1]", (5, 12)),
    ("int4-gptq[group_size=32,method=mse]", (16, 64)),
    ("int4-awq[group_size=32]", (32, 96)),
    ("int4-awq[group_size=-1,method=mse]", (64, 160)),
]
#: symmetric, version, act-order, group size, shape.
THEIRS = [
    (True, 1, False, 32, (48, 160)),
    (True, 2, False, -1, (16, 64)),
    (False, 1, False, 32, (40, 96)),
    (False, 2, False, 64, (37, 100)),
    (True, 1, True, 32, (48, 160)),
    (False, 2, True, 32, (40, 96)),
    (False, 1, True, 64, (24, 192)),
]
LINEAR = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }.items()
}
#: A layer in the middle that stays in BF16, to see that the config says so.
KEPT = "model.layers.1.mlp.down_proj"
WHOLE = ["int4-gptq[group_size=32]", "int4-gptq[group_size=32,symmetric=false,version=2]"]
WHOLE += ["int4-awq[group_size=32]"]


@dataclass
class Jobs:
    """What gptqmodel is asked, and what it answered; all in one process, whose start takes most."""

    todo: list[dict[str, Any]] = field(default_factory=list)
    given: Tensors = field(default_factory=dict)
    answers: list[Tensors] = field(default_factory=list)

    def add(self, parts: Tensors, **job: Any) -> None:
        self.given |= {f"{len(self.todo)}.{name}": tensor for name, tensor in parts.items()}
        self.todo.append(job)

    def run(self, folder: Path) -> None:
        save_file(self.given, folder / "in.safetensors")
        (folder / "jobs.json").write_text(json.dumps(self.todo))
        driver = Path(__file__).with_name("gptqmodel_driver.py")
        ran = subprocess.run(
            [sys.executable, str(driver), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        answers = load_file(folder / "out.safetensors")
        self.answers = [
            {k.removeprefix(f"{n}."): v for k, v in answers.items() if k.startswith(f"{n}.")}
            for n in range(len(self.todo))
        ]


def ours(text: str, shape: tuple[int, int], weight: Any) -> tuple[Any, Tensors]:
    codec = parse_format(text)
    return codec, codec.encode(weight(*shape, seed=7), shape)


def tiny_llama(folder: Path, text: str, weight: Any) -> Path:
    """A Llama with one plain layer among quantized ones, in gptqmodel's and transformers' files."""
    from tokenizers import Tokenizer, models

    codec, tensors = parse_format(text), {}
    for seed, (module, shape) in enumerate(LINEAR.items()):
        source = weight(*shape, seed=seed)
        if module == KEPT:
            tensors[f"{module}.weight"] = source.to(torch.bfloat16)
        else:
            parts = codec.encode(source, shape)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = weight(32, 64).to(torch.bfloat16)
    norms = [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    for name in (*norms, "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(64, dtype=torch.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "quantization_config": codec.config([KEPT, "lm_head"]),
    }
    write_checkpoint(folder, tensors, config, place=lambda name: "model.safetensors")
    words = {str(word): word for word in range(31)} | {"<unk>": 31}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "<unk>"}
    tokens["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, weight: Any) -> Jobs:
    """All jobs of this file, in the order OURS, THEIRS, WHOLE."""
    jobs, folder = Jobs(), tmp_path_factory.mktemp("gptqmodel")
    for text, shape in OURS:
        codec, parts = ours(text, shape, weight)
        jobs.add(
            parts,
            do="decode",
            method=codec.quant_method,
            group_size=codec.group_size,
            version=getattr(codec, "version", None),
            sym=getattr(codec, "symmetric", False),
            shape=shape,
        )
    for sym, version, act_order, size, shape in THEIRS:
        jobs.add(
            {"weight": their_source(weight, shape)},
            do="quantize",
            method="gptq",
            sym=sym,
            version=version,
            desc_act=act_order,
            group_size=size,
        )
    for number, text in enumerate(WHOLE):
        checkpoint = tiny_llama(folder / str(number), text, weight)
        jobs.add({}, do="load", method=parse_format(text).quant_method, folder=str(checkpoint))
    jobs.run(folder)
    return jobs


def their_source(weight: Any, shape: tuple[int, int]) -> torch.Tensor:
    """Values of 24 bits, no group without negative or positive ones; half a group of zeros."""
    source = weight(*shape, seed=3) * 1.1
    source[0, :16] = 0.0
    return source


def their_parts(answer: Tensors) -> Tensors:
    return {name: tensor for name, tensor in answer.items() if name != "weight"}


@pytest.mark.parametrize("number", range(len(OURS)), ids=[text for text, _ in OURS])
def test_gptqmodel_decodes_ours_as_we_do(number: int, jobs: Jobs, weight: Any, same: Any) -> None:
    text, shape = OURS[number]
    codec, parts = ours(text, shape, weight)
    decoded = codec.decode(parts, shape)
    assert decoded.abs().max() > 0
    assert same(decoded.to(torch.float16), jobs.answers[number]["weight"])


@pytest.mark.parametrize("number", range(len(THEIRS)), ids=[str(case[:4]) for case in THEIRS])
def test_what_gptqmodel_writes_decodes_here_as_there(number: int, jobs: Jobs, same: Any) -> None:
    sym, version, act_order, size, shape = THEIRS[number]
    answer = jobs.answers[len(OURS) + number]
    parts = their_parts(answer)
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = {n: TensorSpec(names[t.dtype], tuple(t.shape)) for n, t in parts.items()}
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": size,
        "desc_act": act_order,
        "sym": sym,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    codec: Any = detect_format(specs, config)
    assert (codec.symmetric, codec.version, codec.act_order) == (sym, version, act_order)
    assert codec.shape(specs) == shape
    assert same(codec.decode(parts, shape).to(torch.float16), answer["weight"])


@pytest.mark.parametrize("number", [i for i, case in enumerate(THEIRS) if not case[2]])
def test_encode_gives_gptqmodels_bytes(number: int, jobs: Jobs, weight: Any, same: Any) -> None:
    sym, version, _, size, shape = THEIRS[number]
    text = f"int4-gptq[group_size={size},symmetric={str(sym).lower()},version={version}]"
    encoded = parse_format(text).encode(their_source(weight, shape), shape)
    stored = their_parts(jobs.answers[len(OURS) + number])
    assert set(encoded) == set(stored)
    for part, tensor in stored.items():
        assert same(encoded[part], tensor), part


@pytest.mark.parametrize("number", range(len(WHOLE)), ids=WHOLE)
def test_gptqmodel_loads_a_checkpoint(number: int, jobs: Jobs, weight: Any, same: Any) -> None:
    """All layers but the kept one are quantized layers there, with our weights."""
    loaded = jobs.answers[len(OURS) + len(THEIRS) + number]
    assert set(loaded) == {f"{module}.weight" for module in LINEAR if module != KEPT}
    codec = parse_format(WHOLE[number])
    for seed, (module, shape) in enumerate(LINEAR.items()):
        if module != KEPT:
            decoded = codec.decode(codec.encode(weight(*shape, seed=seed), shape), shape)
            assert same(decoded.to(torch.float16), loaded[f"{module}.weight"]), module
