"""Other families convert too: tiny random models by transformers, converted and loaded back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from requant.runner.model import Model
from tests.helpers import CPU

SMALL = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}  # fmt: skip


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_int4_and_back_is_what_transformers_decompresses(family: str, tmp_path: Path) -> None:
    """BF16 -> INT4, decompressed by transformers, has the logits of our INT4 -> BF16."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    config.save_pretrained(tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    for source, out, text in (("source", "int4", "int4"), ("int4", "bf16", "bf16")):
        plan = make_plan(Checkpoint.open(tmp_path / source), default_recipe(text))
        summary = convert(plan, tmp_path / out, Runtime(CPU, 1))
        assert summary["requantized_tensors"] >= 14 and not summary["unknown_tensors"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    scheme = transformers.CompressedTensorsConfig(dequantize=True)
    ids = torch.arange(24)[None]
    theirs = load(tmp_path / "int4", quantization_config=scheme).float()(ids).logits
    ours = load(tmp_path / "bf16").float()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    with pytest.raises(CheckpointError, match=f"model_type is '{family}'; the runner runs"):
        Model(Checkpoint.open(tmp_path / "int4"))
