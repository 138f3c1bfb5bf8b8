"""What `inspect` counts on hand-computed checkpoints, and how it looks."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from requant.convert.inspect import inspect
from requant.convert.inspect_table import render
from requant.convert.source import Checkpoint
from requant.quant import parse_format
from requant.quant.codec import TensorSpec
from tests.convert.published_models import write_published
from tests.convert.sparse import linear, plain, write_sparse


def test_a_dense_model_with_tied_embeddings_is_all_active(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    specs = {
        "model.embed_tokens.weight": plain(100, 64),
        "model.norm.weight": plain(64),
        "model.layers.0.self_attn.q_proj.weight": plain(64, 64),
    }
    facts = inspect(write_sparse(tmp_path / "model", config, specs))
    assert facts["parameters"] == 100 * 64 + 64 + 64 * 64
    assert facts["active_parameters"] == facts["parameters"]
    assert facts["kv_cache_bytes_per_token"] == 2 * 2 * 16 * 1 * 2
    assert "compare: MLA 144 B (1.1x), MHA 256 B (2.0x)" in rendered(facts)  # eight is too many
    assert facts["formats"] == {"bf16": {"tensors": 3, "bytes": 2 * facts["parameters"]}}
    assert (facts["experts"], facts["mtp_parameters"]) == (0, 0)
    assert facts["quantization"] is None


def test_int4_counts_logical_elements_and_all_bytes(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_experts_per_tok": 1,
        "quantization_config": parse_format("int4[group_size=32]").config([]),
    }
    specs: dict[str, TensorSpec] = {"lm_head.weight": plain(10, 64)}
    for expert in range(4):
        module = f"model.layers.0.mlp.experts.{expert}.up_proj"
        specs |= linear(module, 96, 64, parse_format("int4[group_size=32]"))
    facts = inspect(write_sparse(tmp_path / "model", config, specs))
    assert facts["parameters"] == 640 + 4 * 96 * 64
    assert facts["active_parameters"] == 640 + 96 * 64
    one = 96 * 64 // 2 + 96 * 2 * 2 + 16
    assert facts["formats"]["int4[group_size=32]"] == {"tensors": 4, "bytes": 4 * one}
    assert facts["kv_cache_bytes_per_token"] is None


def test_experts_without_a_top_k_leave_active_unknown(tmp_path: Path) -> None:
    specs = {"model.layers.0.mlp.experts.0.up_proj.weight": plain(8, 8)}
    facts = inspect(write_sparse(tmp_path / "model", {"model_type": "other"}, specs))
    assert facts["active_parameters"] is None
    assert "active unknown" in rendered(facts)


def test_integer_tables_are_no_parameters(tmp_path: Path) -> None:
    specs = {"model.tid2eid": plain(9, 2, dtype="I64"), "model.norm.weight": plain(5)}
    assert inspect(write_sparse(tmp_path / "model", {}, specs))["parameters"] == 5


def test_compute_counts_matrices_of_the_language_model(tmp_path: Path) -> None:
    """Not the lookup, norms, biases, or what a picture goes through; of two experts, one."""
    specs = {
        "model.embed_tokens.weight": plain(100, 64),
        "lm_head.weight": plain(100, 64),
        "model.norm.weight": plain(64),
        "model.layers.0.self_attn.q_proj.weight": plain(48, 64),
        "model.layers.0.self_attn.q_proj.bias": plain(48),
        "model.layers.0.mlp.experts.0.up_proj.weight": plain(32, 64),
        "model.layers.0.mlp.experts.1.up_proj.weight": plain(32, 64),
        "visual.blocks.0.mlp.up_proj.weight": plain(8, 8),
    }
    config = {"num_experts_per_tok": 1, "max_position_embeddings": 10, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64}  # fmt: skip
    facts = inspect(write_sparse(tmp_path / "model", config, specs))
    matrices = 100 * 64 + 48 * 64 + 32 * 64
    assert facts["flops_per_token"] == 2 * matrices
    assert facts["flops_per_token_full_context"] == 2 * matrices + 10 * 4 * (16 + 16) * 2
    assert facts["active_parameters"] == matrices + 64 + 64 + 48 + 64


@pytest.mark.parametrize(
    ("modules", "layers"),
    [
        (["model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"], 2),
        (["mtp.0.ffn.w1", "mtp.0.ffn.w2", "mtp.1.ffn.w1"], 2),
        (["mtp.fc", "mtp.layers.0.mlp.up_proj"], 1),
        (["mtp.fc", "mtp.proj"], 1),
        (["model.layers.1.mlp.up_proj"], 0),
    ],
)
def test_layers_of_mtp(modules: list[str], layers: int, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 2}
    specs = {f"{module}.weight": plain(8, 8) for module in modules}
    facts = inspect(write_sparse(tmp_path / "model", config, specs))
    assert facts["mtp_layers"] == layers
    assert facts["mtp_parameters"] == (64 * len(modules) if layers else 0)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["tokenizer.json", "tokenizer.model"], ("tokenizers", "tokenizer.json")),
        (["tiktoken.model"], ("tiktoken", "tiktoken.model")),
        (["tokenizer.model"], ("sentencepiece", "tokenizer.model")),
        (["tokenizer_config.json"], None),
    ],
)
def test_tokenizer(files: list[str], found: tuple[str, str] | None, folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    for name in files:
        (folder / name).write_text("{}")
    facts = inspect(Checkpoint.open(folder))
    assert facts["tokenizer"] == (None if found is None else {"kind": found[0], "file": found[1]})
    assert facts["vocabulary_size"] == 64


@pytest.mark.parametrize(
    ("readme", "text", "found"),
    [
        ("---\nlicense: mit\nlanguage:\n- en\n---\n# Model\n", "Apache", "mit"),
        ('---\nlicense: other\nlicense_name: "modified-mit"\n---\n', None, "modified-mit"),
        ("---\nlicense: other\n---\n", "\n  # MIT License\n\nCopyright", "MIT License"),
        ("---\nlicense: other\n---\n", None, "other"),
        ("---\nlicense: mit\n", None, None),  # never ends: no front matter
        ("# Model\nlicense: mit\n---\n", "Apache License\n", "Apache License"),
        (None, "MIT\x1b[31m License", "MIT [31m License"),
        (None, "x" * 200, "x" * 100),
        (None, None, None),
    ],
)
def test_license(readme: str | None, text: str | None, found: str | None, folder: Path) -> None:
    for name, content in (("README.md", readme), ("LICENSE", text)):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)
    assert inspect(Checkpoint.open(folder))["license"] == found


def test_what_is_no_file_tells_no_license(folder: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / "README.md")
    (folder / "LICENSE").mkdir()
    assert inspect(Checkpoint.open(folder))["license"] is None


def test_rendering(tmp_path: Path) -> None:
    checkpoint = write_published(tmp_path / "model", "DeepSeek-V2-Lite")
    lines = rendered(inspect(checkpoint)).splitlines()
    assert (
        [line.rstrip() for line in lines[1:]]
        == """\
model       deepseek_v2, 27 layers, 64 routed experts
parameters  15.71 B, 2.45 B active per token
compute     4.90 GFLOP per token, 50.20 GFLOP at the end of the context
context     163840 tokens
KV cache    31104 bytes per token in BF16, 5.10 GB for the whole context
            compare: 8 KV heads 138.24 kB (4.4x), MHA 276.48 kB (8.9x)
tokenizer   none in the folder, vocabulary of 102400
license     unknown
stored      31.41 GB in 4 files; config declares no quantization

role           format  tensors       size  of all
embedding      bf16          1  419.43 MB   1.3 %
lm_head        bf16          1  419.43 MB   1.3 %
norm           bf16         82  252.93 kB   0.0 %
router         bf16         26    6.82 MB   0.0 %
attention      bf16        108  743.18 MB   2.4 %
dense_mlp      bf16          3  134.48 MB   0.4 %
shared_expert  bf16         78  899.68 MB   2.9 %
routed_expert  bf16       4992   28.79 GB  91.6 %""".splitlines()
    )


def test_rendering_what_is_not_known(tmp_path: Path) -> None:
    specs = {"mtp.0.proj.weight": plain(8, 8), "mtp.1.proj.weight": plain(8, 8)}
    text = rendered(inspect(write_sparse(tmp_path / "model", {}, specs)))
    assert "parameters  0, 0 active per token, plus 128 MTP in 2 layers" in text
    assert "context     unknown" in text and "KV cache    unknown" in text


def rendered(facts: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(render(facts))
    return stream.getvalue()
