"""Write the trained demo model as a checkpoint folder of the kind DeepSeek publishes.

Tensor names, data types and 128x128 FP8 blocks follow `README_WEIGHTS.md` of
github.com/deepseek-ai/DeepSeek-V3; `weight_scale_inv` is a multiplier in spite of its name.
"""

import json
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from demo_corpus import ASSISTANT, BOS, EOS, USER
from demo_model import DemoConfig, DemoModel
from demo_texts import CHAT_TEMPLATE, LICENSE, NOTICE, model_card
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from requant.quant.fp8_block import Fp8Block

FP8 = Fp8Block()
FILES = 4


def is_linear(name: str) -> bool:
    """Tell whether DeepSeek stores this weight in FP8; router and eh_proj stay BF16."""
    return "_proj" in name and "eh_proj" not in name


def per_expert(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors in layer order, experts apart and the MTP layer last."""
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    state = model.state_dict()
    names = sorted(state, key=lambda name: name.startswith(mtp))
    for name in names:
        if name == next(each for each in names if each.startswith(mtp)):
            yield f"{mtp}embed_tokens.weight", state["model.embed_tokens.weight"]
        if name.endswith("experts.down"):
            continue
        if not name.endswith("experts.gate_up"):
            yield name, state[name]
            continue
        prefix = name.removesuffix("gate_up")
        pairs = zip(state[name], state[f"{prefix}down"], strict=True)
        for expert, (gate_up, down) in enumerate(pairs):
            gate, up = gate_up.chunk(2)
            yield f"{prefix}{expert}.gate_proj.weight", gate
            yield f"{prefix}{expert}.up_proj.weight", up
            yield f"{prefix}{expert}.down_proj.weight", down
    yield f"{mtp}shared_head.head.weight", state["lm_head.weight"]


def stored(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint as it is stored."""
    for name, tensor in per_expert(model):
        if is_linear(name):
            for part, encoded in FP8.encode(tensor, tuple(tensor.shape)).items():
                yield name.removesuffix("weight") + part, encoded
        elif name.endswith("e_score_correction_bias"):
            yield name, tensor.float().clone()
        else:
            yield name, tensor.to(torch.bfloat16)


@torch.no_grad()
def round_to_stored(model: DemoModel) -> None:
    """Replace the weights by what a reader of the checkpoint gets, to measure that."""
    for name, parameter in model.named_parameters():
        # A fused expert's gate and up rows fill whole blocks, so fusing does not move a scale.
        matrices = parameter if parameter.ndim == 3 else parameter[None]
        for matrix in matrices:
            if is_linear(name) or parameter.ndim == 3:
                shape = tuple(matrix.shape)
                matrix.copy_(FP8.decode(FP8.encode(matrix, shape), shape))
            else:
                matrix.copy_(matrix.to(torch.bfloat16))


def cut_into_files(tensors: list[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Cut into files of similar size, each time between a weight and its scale.

    Large published checkpoints contain such pairs, so a reader has to look scales up in the index.
    """
    share = sum(tensor.nbytes for _, tensor in tensors) / FILES
    files: list[dict[str, Tensor]] = [{}]
    done = 0
    for name, tensor in tensors:
        if done >= share * len(files) and name.endswith("_scale_inv"):
            files.append({})
        files[-1][name] = tensor
        done += tensor.nbytes
    return files


def config_json(config: DemoConfig, bos: int, eos: int) -> dict[str, object]:
    """Spell the configuration as DeepSeek-V3's config.json does."""
    fixed = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "deepseek_v3",
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "quantization_config": FP8.config([]),
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    return dict(sorted((fixed | asdict(config)).items()))


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, max_length: int, out: Path) -> None:
    """Write tokenizer.json and the two files that transformers wants beside it."""
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "additional_special_tokens": [USER, ASSISTANT],
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": max_length,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", settings)


def export_checkpoint(
    model: DemoModel, tokenizer: Tokenizer, figures: dict[str, object], out: Path
) -> int:
    """Write the checkpoint folder `out` anew and return the bytes of its tensors."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    tensors = list(stored(model))
    files = cut_into_files(tensors)
    weight_map = {}
    for number, group in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        save_file(group, out / file, metadata={"format": "pt"})
        # save_file makes private files; these are packaged for everybody.
        (out / file).chmod(0o644)
        weight_map |= dict.fromkeys(group, file)
    total = sum(tensor.nbytes for _, tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)

    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    write_json(out / "config.json", config_json(model.config, bos, eos))
    generation = {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": eos,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    write_json(out / "generation_config.json", generation)
    write_tokenizer(tokenizer, model.config.max_position_embeddings, out)
    (out / "README.md").write_text(model_card(figures), encoding="utf-8")
    (out / "LICENSE").write_text(LICENSE, encoding="utf-8")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    shutil.copyfile(licence, out / "LICENSE.python.txt")
    return total
