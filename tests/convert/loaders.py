"""Whole checkpoints for test_loaders.py: tiny random models, what our codecs make of a folder, what
transformers and compressed-tensors make of it, and checkpoints that compressed-tensors writes.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from requant.convert.source import Checkpoint
from tests.helpers import Tensors, load

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
#: Every side of a linear layer is a multiple of 128: transformers misreads what is not.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 128,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 128,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
}
_EXPERTS = re.compile(r"(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)")


def save_model(folder: Path, family: str) -> Path:
    """A random BF16 model, saved by transformers, with the tokenizer that gptqmodel asks for."""
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {str(word): word for word in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "<unk>"}
    tokens["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def ours(folder: Path, scales_in_bf16: bool = False) -> Tensors:
    """Every tensor of a checkpoint as `Checkpoint.decode` gives it, in BF16; by way of FP16 where
    scales are, because compressed-tensors multiplies in their dtype. `scales_in_bf16`: with scales
    in float32 rounded first, as transformers does that holds them in the model's dtype."""
    checkpoint = Checkpoint.open(folder)
    tensors: Tensors = {}
    for name, weight in checkpoint.weights.items():
        decoded = checkpoint.decode(name)
        stored = weight.parts.get("weight_scale")
        if stored is not None and stored.spec.dtype == "F16":
            decoded = decoded.to(torch.float16)
        if stored is not None and stored.spec.dtype == "F32" and scales_in_bf16:
            assert weight.codec is not None
            parts = checkpoint.read_tile(weight, 0, weight.shape[0])
            scale = parts["weight_scale"].to(torch.bfloat16).to(torch.float32)
            rows, cols = weight.shape
            decoded = weight.codec.decode({**parts, "weight_scale": scale}, (rows, cols))
        tensors[name] = decoded.to(torch.bfloat16)
    return tensors


def quantized(folder: Path) -> list[str]:
    """Names of the weights that are not plain, sorted."""
    weights = Checkpoint.open(folder).weights.values()
    found = (w.name for w in weights if w.codec is not None and w.codec.quant_method is not None)
    return sorted(found)


def dequantized(folder: Path) -> Tensors:
    """Every tensor as compressed-tensors' own converter decompresses the folder, by its own
    matching of modules. Names alone do not tell it that an embedding is no Linear."""
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

    reader = CompressedTensorsDequantizer(folder, ignore=["re:.*embed"])
    return reader.process(load(folder))


def load_model(folder: Path, **options: Any) -> Any:
    """transformers' model of a folder."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def dequantized_model(folder: Path) -> Any:
    """transformers' model of a folder, dequantized as it loads, with or without a GPU."""
    import transformers

    method = Checkpoint.open(folder).quantization_config or {}
    compressed = method.get("quant_method") == "compressed-tensors"
    scheme = (
        transformers.CompressedTensorsConfig if compressed else transformers.FineGrainedFP8Config
    )
    return load_model(folder, quantization_config=scheme(dequantize=True))


def weights_of(model: Any) -> Tensors:
    """A model's parameters under the names of checkpoints: fused experts taken apart."""
    return dict(_split_experts(model.state_dict()))


def _split_experts(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        match = _EXPERTS.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        leaves = ["down_proj"] if match["leaf"] == "down_proj" else ["gate_proj", "up_proj"]
        for expert, matrix in enumerate(tensor):
            for leaf, part in zip(leaves, matrix.chunk(len(leaves)), strict=True):
                yield f"{match['experts']}.{expert}.{leaf}.weight", part


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """float32 logits of 24 tokens."""
    found: torch.Tensor = model(torch.arange(24)[None]).logits
    return found.to(torch.float32)


def save_compressed(source: Path, folder: Path, preset: str) -> Path:
    """The model quantized and written by compressed-tensors: its schemes, its compressors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = load_model(source)
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def _calibrate(module: Any) -> None:
    """Scales of a module from its weight's extremes; those of activations are any numbers."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight, args = module.weight.data, module.quantization_scheme.weights
    rows, cols = weight.shape
    height, width = {
        "tensor": (rows, cols),
        "channel": (1, cols),
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    blocks = weight.view(rows // height, height, cols // width, width)
    extremes = [blocks.amin((1, 3)), blocks.amax((1, 3))]
    if args.strategy == "tensor":
        extremes = [value.reshape(1) for value in extremes]
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(whole)
    scale, zero = calculate_qparams(*extremes, args, global_scale=whole)
    assert module.weight_scale.shape == scale.shape
    module.weight_scale.data.copy_(scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero)
    for number, name in enumerate(("input_scale", "input_global_scale")):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.5 + number)
