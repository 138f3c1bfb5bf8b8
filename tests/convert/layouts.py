"""Tiny checkpoints in the layouts that models are published in, and what their weights mean.

Stored codes and scales are random bits, written under the names, dtypes and shapes of the published
files; the values beside them come from each format's definition in a few lines of plain torch, or
from the reference libraries, never from requant's codecs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers import Tensors, write_checkpoint

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


@dataclass
class Layout:
    """A checkpoint in the making: `tensors` as stored, `values` as meant, by canonical name.

    `formats` is what each weight's format must be called, for weights that are not plain.
    """

    config: dict[str, Any]
    tensors: Tensors = field(default_factory=dict)
    values: Tensors = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))

    def write(self, folder: Path, place: Callable[[str], str] | None = None) -> Path:
        """All in one file, unless `place` says otherwise; `extra` are more JSON files."""
        write_checkpoint(
            folder, self.tensors, self.config, place or (lambda _: "model.safetensors")
        )
        for name, content in self.extra.items():
            (folder / name).write_text(json.dumps(content))
        return folder

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.random)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def plain(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tensors[name] = self.floats(*shape).to(dtype)
        self.values[name] = self.tensors[name].to(torch.float32)

    def e4m3(self, rows: int, cols: int) -> torch.Tensor:
        codes = self.integers(0, 255, rows, cols).to(torch.uint8)
        return codes.masked_fill_(codes == 0x7F, 0x7E).view(torch.float8_e4m3fn)

    def powers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """E8M0 bytes of 2^low to 2^high."""
        return self.integers(low + 127, high + 128, *shape).to(torch.uint8)

    def fp8_block(
        self,
        module: str,
        rows: int,
        cols: int,
        part: str = "weight_scale_inv",
        scale: str = "fp32",
        block: tuple[int, int] = (128, 128),
    ) -> None:
        """`scale`: fp32, ue8m0 (powers of two in F32) or e8m0."""
        grid = -(-rows // block[0]), -(-cols // block[1])
        codes = self.e4m3(rows, cols)
        if scale == "fp32":
            stored = self.floats(*grid).abs() * 1e-3 + 1e-5
        else:
            stored = torch.exp2(self.powers(-12, -6, *grid).to(torch.float32) - 127)
        every = stored.repeat_interleave(block[0], 0)[:rows]
        every = every.repeat_interleave(block[1], 1)[:, :cols]
        cast = stored.to(torch.float8_e8m0fnu) if scale == "e8m0" else stored
        self.tensors |= {f"{module}.weight": codes, f"{module}.{part}": cast}
        self.values[f"{module}.weight"] = codes.to(torch.float32) * every
        options = (
            [] if block == (128, 128) else [f"block_rows={block[0]}", f"block_cols={block[1]}"]
        )
        options += [] if scale == "fp32" else [f"scale={scale}"]
        containers = {"scale": "deepseek-v4", "weight_scale": "compressed-tensors"}
        options += [f"container={containers[part]}"] if part in containers else []
        self.formats[f"{module}.weight"] = "fp8-block" + (f"[{','.join(options)}]" * bool(options))

    def fp8_tensor(
        self, module: str, rows: int, cols: int, part: str, form: str, *inputs: str
    ) -> None:
        """One scale; `inputs` are the scalars that say how activations are quantized."""
        codes, scale = self.e4m3(rows, cols), self.floats(1).abs()[0] + 0.1
        self.tensors |= {f"{module}.weight": codes, f"{module}.{part}": scale}
        self.tensors |= {f"{module}.{name}": torch.tensor(0.5) for name in inputs}
        self.values[f"{module}.weight"] = codes.to(torch.float32) * scale
        self.formats[f"{module}.weight"] = form

    def fp4(self, rows: int, cols: int, span: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes uint8 [rows, cols/2] and E8M0 bytes [rows, cols/32]."""
        return (
            self.integers(0, 256, rows, cols // 2).to(torch.uint8),
            self.powers(-span - 4, -4, rows, cols // 32),
        )

    def v4_fp4(self, module: str, rows: int, cols: int, dtype: torch.dtype, span: int = 6) -> None:
        packed, exponents = self.fp4(rows, cols, span)
        self.tensors[f"{module}.weight"] = packed.view(dtype)
        self.tensors[f"{module}.scale"] = exponents.view(torch.float8_e8m0fnu)
        self.values[f"{module}.weight"] = fp4_values(packed, exponents)
        codes = {torch.int8: "", torch.uint8: ",codes=u8"}.get(dtype, ",codes=f4")
        self.formats[f"{module}.weight"] = f"mxfp4[container=deepseek-v4{codes}]"

    def int4(
        self, module: str, rows: int, cols: int, group: int, symmetric: bool = True,
        order: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """compressed-tensors' packed INT4, BF16 scales; `order` is weight_g_idx."""
        codes = self.integers(0, 16, rows, cols)
        scale = (self.floats(rows, cols // group).abs() * 0.01 + 1e-4).to(torch.bfloat16)
        zero = torch.full((rows, cols // group), 8)
        index = torch.arange(cols) // group if order is None else order
        self.tensors |= {
            f"{module}.weight_packed": words(codes),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": torch.tensor([rows, cols]),
        }
        options = [f"group_size={group}"] if group != 128 else []
        if not symmetric:
            zero = self.integers(0, 16, rows, cols // group)
            self.tensors[f"{module}.weight_zero_point"] = words(zero.T).T.contiguous()
            options += ["symmetric=false"]
        if order is not None:
            self.tensors[f"{module}.weight_g_idx"] = order.to(torch.int32)
            options += ["act_order=true"]
        steps = (codes - zero[:, index]).to(torch.float32)
        self.values[f"{module}.weight"] = steps * scale.to(torch.float32)[:, index]
        self.formats[f"{module}.weight"] = "int4" + (f"[{','.join(options)}]" * bool(options))

    def modelopt_nvfp4(self, module: str, rows: int, cols: int, whole: float) -> None:
        packed = self.integers(0, 256, rows, cols // 2).to(torch.uint8)
        local = self.integers(0x30, 0x7F, rows, cols // 16).to(torch.uint8)
        scale = local.view(torch.float8_e4m3fn).to(torch.float32) * torch.tensor(whole)
        self.tensors |= {
            f"{module}.weight": packed,
            f"{module}.weight_scale": local.view(torch.float8_e4m3fn),
            f"{module}.weight_scale_2": torch.tensor(whole),
            f"{module}.input_scale": torch.tensor(0.01),
        }
        self.values[f"{module}.weight"] = e2m1(packed) * scale.repeat_interleave(16, 1)
        self.formats[f"{module}.weight"] = "nvfp4[container=modelopt]"

    def mxfp8(self, module: str, rows: int, cols: int) -> None:
        codes, exponents = self.e4m3(rows, cols), self.powers(-12, -6, rows, cols // 32)
        self.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale_inv": exponents}
        scale = torch.exp2(exponents.to(torch.float32) - 127).repeat_interleave(32, 1)
        self.values[f"{module}.weight"] = codes.to(torch.float32) * scale
        self.formats[f"{module}.weight"] = "mxfp8[container=minimax]"


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, n], the even column in the low nibble -> float32 [rows, 2n]."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return E2M1[codes.to(torch.int64)]


def fp4_values(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """MXFP4: groups of 32, a power of two each."""
    return e2m1(packed) * torch.exp2(exponents.to(torch.float32) - 127).repeat_interleave(32, -1)


def words(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [rows, cols] -> int32 [rows, ceil(cols / 8)], low nibble first."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).reshape(len(codes), -1, 8)
    total = (padded.to(torch.int64) << (4 * torch.arange(8))).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def ct_group(
    targets: list[str], bits: int, kind: str, strategy: str, **more: Any
) -> dict[str, Any]:
    """One config group; `more` goes into `weights`, but input_activations and format."""
    beside = {"input_activations": more.pop("input_activations", None)}
    if "format" in more:
        beside["format"] = more.pop("format")
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": False,
               "symmetric": True, "group_size": None, **more}  # fmt: skip
    return {"targets": targets, "weights": weights, "output_activations": None, **beside}


def ct_config(form: str, *groups: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignore,
    }


KIMI_QUANTIZATION = ct_config(
    "pack-quantized",
    ct_group(
        ["Linear"], 4, "int", "group", group_size=32, actorder=None, block_structure=None,
        observer="minmax", observer_kwargs={},
    ),
    ignore=[
        "re:.*lm_head.*", "re:.*self_attn.*", "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:vision_tower.*", "re:mm_projector.*",
    ],
)  # fmt: skip


def deepseek_v3(scale: str = "fp32", indexer: bool = False, layers: int = 2) -> Layout:
    """Two layers (dense, experts) and an MTP layer, hidden 256; 576 rows of kv_a end in half a
    block. `scale="ue8m0"` is V3.1, `indexer` V3.2."""
    quantization = {**FP8_CONFIG, **({"scale_fmt": "ue8m0"} if scale == "ue8m0" else {})}
    made = Layout(
        {
            "model_type": "deepseek_v32" if indexer else "deepseek_v3",
            "hidden_size": 256,
            "num_hidden_layers": layers,
            "num_nextn_predict_layers": 1,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "torch_dtype": "bfloat16",
            "quantization_config": quantization,
        }
    )

    def linear(module: str, rows: int, cols: int) -> None:
        made.fp8_block(module, rows, cols, scale=scale)

    for name in ("model.embed_tokens", "lm_head"):
        made.plain(f"{name}.weight", 64, 256)
    made.plain("model.norm.weight", 256)
    for layer in range(layers + 1):
        prefix = f"model.layers.{layer}"
        made.plain(f"{prefix}.input_layernorm.weight", 256)
        linear(f"{prefix}.self_attn.q_a_proj", 128, 256)
        linear(f"{prefix}.self_attn.q_b_proj", 256, 128)
        linear(f"{prefix}.self_attn.kv_a_proj_with_mqa", 160, 256)
        linear(f"{prefix}.self_attn.kv_b_proj", 256, 128)
        linear(f"{prefix}.self_attn.o_proj", 256, 256)
        if indexer:
            linear(f"{prefix}.self_attn.indexer.wk", 128, 256)
            linear(f"{prefix}.self_attn.indexer.wq_b", 128, 128)
            made.plain(f"{prefix}.self_attn.indexer.weights_proj.weight", 8, 256)
        if layer == 0:
            mlps = [f"{prefix}.mlp"]
        else:
            made.plain(f"{prefix}.mlp.gate.weight", 2, 256)
            made.plain(f"{prefix}.mlp.gate.e_score_correction_bias", 2, dtype=torch.float32)
            mlps = [f"{prefix}.mlp.{m}" for m in ("shared_experts", "experts.0", "experts.1")]
        for mlp in mlps:
            linear(f"{mlp}.gate_proj", 128, 256)
            linear(f"{mlp}.up_proj", 128, 256)
            linear(f"{mlp}.down_proj", 256, 128)
    prefix = f"model.layers.{layers}"
    made.plain(f"{prefix}.eh_proj.weight", 256, 512)
    made.plain(f"{prefix}.shared_head.norm.weight", 256)
    return made


def deepseek_v4(
    experts: torch.dtype | None = torch.int8, nested: bool = False, span: int = 6
) -> Layout:
    """DeepSeek's own names. `experts` is the dtype of the FP4 codes, None for FP8 experts with
    float32 scales (Flash-Base); `nested` is V4.1, with 32 x 32 blocks."""
    scale = "fp32" if experts is None else "e8m0"
    block = (32, 32) if nested else (128, 128)
    quantization = {**FP8_CONFIG, "scale_fmt": "ue8m0", "weight_block_size": list(block)}
    if experts is None:
        del quantization["scale_fmt"]
    inner = {"model_type": "deepseek_v4", "hidden_size": 256, "num_hidden_layers": 2,
             "num_nextn_predict_layers": 1, "n_routed_experts": 2, "num_experts_per_tok": 1,
             "torch_dtype": "bfloat16"}  # fmt: skip
    dtype = "fp8" if experts is None else "fp4"
    if nested:
        quantization["expert_dtype"] = dtype
        config = {"model_type": "deepseek_v41",
                  "text_config": {**inner, "quantization_config": quantization}}  # fmt: skip
    else:
        config = {**inner, "expert_dtype": dtype, "quantization_config": quantization}
    made = Layout(config)

    def linear(module: str, rows: int, cols: int) -> None:
        made.fp8_block(module, rows, cols, "scale", scale, block)

    def float32(name: str, *shape: int) -> None:
        made.plain(name, *shape, dtype=torch.float32)

    made.plain("embed.weight", 64, 256)
    made.plain("head.weight", 64, 256)
    made.plain("norm.weight", 256)
    float32("hc_head_fn", 4, 1024)
    float32("hc_head_base", 4)
    float32("hc_head_scale", 1)
    for prefix in ("layers.0", "layers.1", "mtp.0"):
        for norm in ("attn_norm", "ffn_norm"):
            made.plain(f"{prefix}.{norm}.weight", 256)
            float32(f"{prefix}.hc_{norm[:-5]}_fn", 24, 1024)
            float32(f"{prefix}.hc_{norm[:-5]}_base", 24)
            float32(f"{prefix}.hc_{norm[:-5]}_scale", 3)
        linear(f"{prefix}.attn.wq_a", 128, 256)
        linear(f"{prefix}.attn.wq_b", 256, 128)
        linear(f"{prefix}.attn.wkv", 128, 256)
        linear(f"{prefix}.attn.wo_a", 128, 256)
        linear(f"{prefix}.attn.wo_b", 256, 128)
        float32(f"{prefix}.attn.attn_sink", 4)
        made.plain(f"{prefix}.attn.q_norm.weight", 128)
        float32(f"{prefix}.attn.compressor.ape", 4, 128)
        made.plain(f"{prefix}.attn.compressor.wkv.weight", 128, 256)
        made.plain(f"{prefix}.attn.compressor.wgate.weight", 128, 256)
        linear(f"{prefix}.attn.indexer.wq_b", 128, 128)
        made.plain(f"{prefix}.attn.indexer.weights_proj.weight", 8, 256)
        made.plain(f"{prefix}.ffn.gate.weight", 2, 256)
        if prefix == "layers.0":
            made.tensors[f"{prefix}.ffn.gate.tid2eid"] = made.integers(0, 2, 64, 1)
        else:
            float32(f"{prefix}.ffn.gate.bias", 2)
        for mlp in ("shared_experts", "experts.0", "experts.1"):
            for leaf, rows, cols in (("w1", 128, 256), ("w2", 256, 128), ("w3", 128, 256)):
                module = f"{prefix}.ffn.{mlp}.{leaf}"
                if experts is None or mlp == "shared_experts":
                    linear(module, rows, cols)
                else:
                    made.v4_fp4(module, rows, cols, experts, span)
    if nested:  # a scale a row and 32 columns, whatever weight_block_size says
        linear, block = made.fp8_block, (1, 32)
        linear("layers.1.engram.embed", 96, 64, "scale", scale, block)
    made.plain("mtp.0.e_proj.weight", 256, 256)
    made.plain("mtp.0.enorm.weight", 256)
    return made


def kimi() -> Layout:
    """Kimi-K2.5: everything nested, INT4 experts, a vision tower that stays."""
    text = {"model_type": "kimi_k2", "hidden_size": 256, "num_hidden_layers": 2,
            "num_nextn_predict_layers": 0, "n_routed_experts": 2, "num_experts_per_tok": 1,
            "quantization_config": KIMI_QUANTIZATION, "torch_dtype": "bfloat16"}  # fmt: skip
    made = Layout({"model_type": "kimi_k25", "torch_dtype": "bfloat16", "text_config": text})
    model = "language_model.model"
    made.plain(f"{model}.embed_tokens.weight", 64, 256)
    made.plain("language_model.lm_head.weight", 64, 256)
    for layer in range(2):
        prefix = f"{model}.layers.{layer}"
        made.plain(f"{prefix}.input_layernorm.weight", 256)
        for leaf, rows, cols in (("q_a_proj", 128, 256), ("q_b_proj", 256, 128),
                                 ("kv_a_proj_with_mqa", 160, 256), ("kv_b_proj", 256, 128),
                                 ("o_proj", 256, 256)):  # fmt: skip
            made.plain(f"{prefix}.self_attn.{leaf}.weight", rows, cols)
        mlps = [f"{prefix}.mlp"]
        if layer:
            made.plain(f"{prefix}.mlp.gate.weight", 2, 256)
            mlps = [f"{prefix}.mlp.{m}" for m in ("shared_experts", "experts.0", "experts.1")]
        for mlp in mlps:
            for leaf, rows, cols in (("gate_proj", 128, 256), ("up_proj", 128, 256),
                                     ("down_proj", 256, 128)):  # fmt: skip
                if ".experts." in mlp:
                    made.int4(f"{mlp}.{leaf}", rows, cols, 32)
                else:
                    made.plain(f"{mlp}.{leaf}.weight", rows, cols)
    for name in ("vision_tower.encoder.blocks.0.wqkv", "vision_tower.encoder.blocks.0.mlp.up_proj",
                 "vision_tower.encoder.blocks.0.attn.q_proj", "mm_projector.linear_1"):  # fmt: skip
        made.plain(f"{name}.weight", 96, 64)
        made.plain(f"{name}.bias", 96)
    made.plain("vision_tower.patch_embed.proj.weight", 64, 3, 14, 14)
    return made


def gpt_oss_mxfp4() -> Layout:
    """gpt-oss as published: fused, interleaved experts in MXFP4 with biases, the rest BF16."""
    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head"]  # fmt: skip
    made = Layout(
        {
            "model_type": "gpt_oss",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": skip},
        }
    )
    made.plain("model.embed_tokens.weight", 64, 64)
    made.plain("lm_head.weight", 64, 64)
    prefix = "model.layers.0"
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        made.plain(f"{prefix}.self_attn.{leaf}.weight", 64, 64)
        made.plain(f"{prefix}.self_attn.{leaf}.bias", 64)
    made.plain(f"{prefix}.self_attn.sinks", 4)
    made.plain(f"{prefix}.mlp.router.weight", 3, 64)
    made.plain(f"{prefix}.mlp.router.bias", 3)
    for leaf, rows, cols in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
        blocks = made.integers(0, 256, 3, rows, cols // 32, 16).to(torch.uint8)
        exponents = made.powers(-10, -4, 3, rows, cols // 32)
        made.tensors[f"{prefix}.mlp.experts.{leaf}_blocks"] = blocks
        made.tensors[f"{prefix}.mlp.experts.{leaf}_scales"] = exponents
        made.plain(f"{prefix}.mlp.experts.{leaf}_bias", 3, rows)
        bias = made.values.pop(f"{prefix}.mlp.experts.{leaf}_bias")
        for expert in range(3):
            whole = fp4_values(blocks[expert].flatten(1), exponents[expert])
            halves = {leaf: (whole, bias[expert])}
            if leaf == "gate_up_proj":
                halves = {
                    "gate_proj": (whole[0::2], bias[expert, 0::2]),
                    "up_proj": (whole[1::2], bias[expert, 1::2]),
                }
            for projection, (weight, vector) in halves.items():
                module = f"{prefix}.mlp.experts.{expert}.{projection}"
                made.values |= {f"{module}.weight": weight, f"{module}.bias": vector}
                made.formats[f"{module}.weight"] = "mxfp4[container=gpt-oss]"
    return made


def modelopt(where: str) -> Layout:
    """NVFP4 MLPs beside BF16 attention; the config in config.json, or in ModelOpt's own file."""
    made = Layout({"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
                   "torch_dtype": "bfloat16"})  # fmt: skip
    kept = ["lm_head", "model.layers.*.self_attn*"]
    if where == "config.json":
        group = {"input_activations": {"dynamic": False, "num_bits": 4, "type": "float",
                                       "group_size": 16},
                 "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                 "targets": ["Linear"]}  # fmt: skip
        made.config["quantization_config"] = {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": kept,
            "config_groups": {"group_0": group}, "producer": {"name": "modelopt"},
        }  # fmt: skip
    else:
        quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
                        "exclude_modules": kept}  # fmt: skip
        made.extra["hf_quant_config.json"] = {
            "producer": {"name": "modelopt"},
            "quantization": quantization,
        }
    made.plain("model.embed_tokens.weight", 64, 64)
    made.plain("lm_head.weight", 64, 64)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            made.plain(f"{prefix}.self_attn.{leaf}.weight", 64, 64)
        for leaf, rows, cols, whole in (("gate_proj", 96, 64, 0.003), ("up_proj", 96, 64, 0.003),
                                        ("down_proj", 64, 96, 0.007)):  # fmt: skip
            made.modelopt_nvfp4(f"{prefix}.mlp.{leaf}", rows, cols, whole)
    return made


def minimax_mxfp8() -> Layout:
    """MiniMax-M3-MXFP8: experts under Mixtral's names."""
    quantization = {**FP8_CONFIG, "quant_method": "mxfp8", "weight_block_size": [1, 32]}
    made = Layout({"model_type": "minimax_m3", "hidden_size": 64, "num_hidden_layers": 1,
                   "num_local_experts": 2, "num_experts_per_tok": 1, "torch_dtype": "bfloat16",
                   "quantization_config": quantization})  # fmt: skip
    prefix = "model.layers.0"
    made.plain("lm_head.weight", 64, 64)
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        made.mxfp8(f"{prefix}.self_attn.{leaf}", 64, 64)
    made.plain(f"{prefix}.block_sparse_moe.gate.weight", 2, 64)
    made.plain(f"{prefix}.block_sparse_moe.e_score_correction_bias", 2, dtype=torch.float32)
    for expert in range(2):
        for leaf, rows, cols in (("w1", 96, 64), ("w2", 64, 96), ("w3", 96, 64)):
            made.mxfp8(f"{prefix}.block_sparse_moe.experts.{expert}.{leaf}", rows, cols)
    return made


def dense(
    linear: Callable[[Layout, str, int, int], None], quantization: dict[str, Any] | None
) -> Layout:
    """A layer of a dense model, every linear layer written by `linear`."""
    made = Layout({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
                   "torch_dtype": "bfloat16"})  # fmt: skip
    if quantization is not None:
        made.config["quantization_config"] = quantization
    made.plain("model.embed_tokens.weight", 64, 64)
    made.plain("lm_head.weight", 64, 64)
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear(made, f"model.layers.0.self_attn.{leaf}", 64, 64)
    for leaf, rows, cols in (("gate_proj", 96, 64), ("up_proj", 96, 64), ("down_proj", 64, 96)):
        linear(made, f"model.layers.0.mlp.{leaf}", rows, cols)
    return made


def static_fp8(made: Layout, module: str, rows: int, cols: int) -> None:
    """transformers' FP8 per tensor, activations static."""
    form = "fp8-tensor[container=fp8]"
    made.fp8_tensor(module, rows, cols, "weight_scale_inv", form, "activation_scale")


def static_ct(made: Layout, module: str, rows: int, cols: int) -> None:
    """compressed-tensors' preset FP8."""
    made.fp8_tensor(module, rows, cols, "weight_scale", "fp8-tensor", "input_scale")


def mistral(made: Layout, module: str, rows: int, cols: int) -> None:
    made.fp8_tensor(module, rows, cols, "qscale_weight", "fp8-tensor[container=mistral]",
                    "qscale_act")  # fmt: skip


def mixed_ct(made: Layout, module: str, rows: int, cols: int) -> None:
    """FP8 attention per row, INT4 MLPs."""
    if "self_attn" not in module:
        made.int4(module, rows, cols, 32)
        return
    codes, scale = made.e4m3(rows, cols), (made.floats(rows, 1).abs() + 0.1).to(torch.bfloat16)
    made.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    made.values[f"{module}.weight"] = codes.to(torch.float32) * scale.to(torch.float32)
    made.formats[f"{module}.weight"] = "fp8-channel"


def act_order(made: Layout, module: str, rows: int, cols: int) -> None:
    """Asymmetric INT4 whose groups are scattered over the columns."""
    order = (torch.arange(cols) // 32)[torch.randperm(cols, generator=made.random)]
    made.int4(module, rows, cols, 32, symmetric=False, order=order)


_TENSOR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor",
           "group_size": None, "dynamic": False}  # fmt: skip
_TOKEN = {**_TENSOR, "strategy": "token", "dynamic": True}

STATIC_HF = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
             "modules_to_not_convert": ["lm_head"]}  # fmt: skip
STATIC_CT = ct_config(
    "float-quantized",
    ct_group(["Linear"], 8, "float", "tensor", input_activations=_TENSOR),
    ignore=["lm_head"],
)
MIXED_CT = ct_config(
    "mixed-precision",
    ct_group([r"re:.*self_attn\..*_proj$"], 8, "float", "channel", input_activations=_TOKEN,
             format="float-quantized"),
    ct_group([r"re:.*mlp\..*_proj$"], 4, "int", "group", group_size=32, format="pack-quantized"),
    ignore=["lm_head"],
)  # fmt: skip
INT4_CT = ct_config(
    "pack-quantized",
    ct_group(["Linear"], 4, "int", "group", group_size=32),
    ignore=[],
)
ACT_ORDER_CT = ct_config(
    "pack-quantized",
    ct_group(["Linear"], 4, "int", "group", group_size=32, symmetric=False, actorder="group"),
    ignore=["lm_head"],
)

LAYOUTS: dict[str, Callable[[], Layout]] = {
    "deepseek-v3": deepseek_v3,
    "deepseek-v3.1": lambda: deepseek_v3("ue8m0"),
    "deepseek-v3.2": lambda: deepseek_v3("ue8m0", indexer=True),
    "deepseek-v4": deepseek_v4,
    "deepseek-v4-u8": lambda: deepseek_v4(torch.uint8),
    "deepseek-v4-f4": lambda: deepseek_v4(torch.float4_e2m1fn_x2),
    "deepseek-v4-base": lambda: deepseek_v4(None),
    "deepseek-v4.1": lambda: deepseek_v4(nested=True),
    "kimi-k2.5": kimi,
    "gpt-oss": gpt_oss_mxfp4,
    "modelopt-config": lambda: modelopt("config.json"),
    "modelopt-file": lambda: modelopt("hf_quant_config.json"),
    "minimax-mxfp8": minimax_mxfp8,
    "mistral": lambda: dense(mistral, None),
    "fp8-static": lambda: dense(static_fp8, STATIC_HF),
    "ct-fp8-static": lambda: dense(static_ct, STATIC_CT),
    "ct-mixed": lambda: dense(mixed_ct, MIXED_CT),
    "ct-act-order": lambda: dense(act_order, ACT_ORDER_CT),
}
