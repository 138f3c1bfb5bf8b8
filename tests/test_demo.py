"""The main job on the real thing: the demo model, converted, compared with the reference libraries,
and run. Figures that are printed here are those that README and docs/FORMATS.md explain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from requant.convert.names import TensorName
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path, heldout_text
from requant.runner.model import Model
from requant.runner.tokenizer import load_tokenizer
from requant.verify.comparison import verify

CPU = torch.device("cpu")
LADDER = ["fp32", "bf16", "int8-channel", "int4[group_size=32]", "int4"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`converted(format, source=demo)`: the demo (or another folder) in a format, made once."""
    made: dict[tuple[str, Path], Path] = {}

    def make(text: str, source: Path | None = None) -> Path:
        source = source or demo_path()
        if (text, source) not in made:
            out = tmp_path_factory.mktemp("demo") / "out"
            convert(make_plan(Checkpoint.open(source), default_recipe(text)), out, Runtime(CPU, 2))
            made[text, source] = out
        return made[text, source]

    return make


@pytest.fixture(scope="session")
def verdict(converted: Callable[..., Path]) -> Callable[[str], dict[str, Any]]:
    """`verdict(format)`: what verify says of the demo in that format, asked once."""
    said: dict[str, dict[str, Any]] = {}

    def ask(text: str) -> dict[str, Any]:
        if text not in said:
            said[text] = verify(demo_path(), converted(text), device=CPU, max_kl=None)
        return said[text]

    return ask


def encoded() -> list[str]:
    """Names of the weights that the demo stores in FP8."""
    source = Checkpoint.open(demo_path())
    return [n for n, w in source.weights.items() if w.codec and w.codec.name == "fp8-block"]


def stored(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """The stored parts of a weight."""
    weight = checkpoint.weights[name]
    return checkpoint.read_tile(weight, 0, weight.shape[0])


def tokens(count: int) -> torch.Tensor:
    """Held-out tokens [1, count]."""
    ids = load_tokenizer(demo_path()).encode(heldout_text()[: 8 * count]).ids
    return torch.tensor([ids[:count]])


def test_demo_is_what_published_checkpoints_are() -> None:
    source = Checkpoint.open(demo_path())
    assert len(source.files) > 1 and all("-of-0000" in file for file in source.files)
    across = [
        name
        for name, weight in source.weights.items()
        if len({part.location.file for part in weight.parts.values()}) > 1
    ]
    assert across, "no weight has its scale in another file"
    kv_a = source.weights["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert kv_a.shape == (160, 256)
    assert kv_a.parts["weight_scale_inv"].spec.shape == (2, 2)
    bias = stored_bias(source)
    assert bias.dtype is torch.float32 and bool((bias != 0).any())
    assert sum(f.stat().st_size for f in demo_path().parent.rglob("*") if f.is_file()) <= 8_000_000
    index = json.loads((demo_path() / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source.nbytes


def stored_bias(source: Checkpoint) -> torch.Tensor:
    (part,) = source.weights["model.layers.1.mlp.gate.e_score_correction_bias"].parts.values()
    return source.read_rows(part, 0, part.spec.shape[0])


def test_kl_orders_the_formats(verdict: Callable[[str], dict[str, Any]]) -> None:
    for text in [*LADDER, "fp8-block"]:
        assert verdict(text)["ok"], (text, verdict(text)["problems"])
    kl = {text: verdict(text)["kl"] for text in LADDER}
    print({text: f"{value:.2e}" for text, value in kl.items()})
    assert kl["fp32"] == 0 == verdict("fp8-block")["kl"]
    ladder = [kl[text] for text in LADDER]
    assert ladder == sorted(ladder) and len(set(ladder)) == len(ladder)


def test_demo_reads_like_text(verdict: Callable[[str], dict[str, Any]]) -> None:
    said = verdict("int4")
    assert said["tokens"] >= 2048
    assert said["perplexity_source"] < 30, "1,024 is noise"
    assert abs(said["perplexity_output"] / said["perplexity_source"] - 1) < 0.1


def test_mtp_layer_proposes_what_the_model_says() -> None:
    """Greedy acceptance of the multi-token-prediction layer: it was trained, not filled."""
    model = Model(Checkpoint.open(demo_path()))
    ids = tokens(512)
    hidden = model.hidden(ids)
    says = model.logits(hidden).argmax(-1)
    (index,) = model.mtp_layers
    given = model.final_norm(hidden)[:, :-1]
    proposed = model.mtp_logits(
        index, model.layer(index, model.mtp_input(index, ids[:, 1:], given))
    )
    acceptance = (proposed.argmax(-1) == says[:, 1:]).float().mean().item()
    print(f"MTP acceptance {acceptance:.3f}")
    assert acceptance > 0.3


def test_bf16_is_compressed_tensors_fp8_dequantizer(converted: Callable[..., Path]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    source, output = Checkpoint.open(demo_path()), Checkpoint.open(converted("bf16"))
    reference = FP8BlockDequantizer(targets=["Linear"])
    names = encoded()
    assert len(names) > 100
    for name in names:
        module = TensorName.parse(name).module
        parts = {f"{module}.{part}": tensor for part, tensor in stored(source, name).items()}
        assert torch.equal(reference.process(parts)[name], stored(output, name)["weight"]), name


@pytest.mark.parametrize("text", ["int8-channel", "int4", "int4[group_size=32]"])
def test_integers_are_compressed_tensors_in_its_arithmetic(
    text: str, converted: Callable[..., Path]
) -> None:
    """With arithmetic=bf16: codes, scales and packing of its own quantizer, for every weight. And
    its decompression of what we write by default is what we decode."""
    from tests.quant.test_quant_oracles import exact, reference_encode

    codec = exact(text)
    head, _, options = text.rstrip("]").partition("[")
    exactly = f"{head}[{options + ',' if options else ''}arithmetic=bf16]"
    plain, output = Checkpoint.open(converted("bf16")), Checkpoint.open(converted(exactly))
    default = Checkpoint.open(converted(text))
    for name in encoded():
        weight = stored(plain, name)["weight"]
        if text.startswith("int4") and "kv_b_proj" in name:  # engines take it apart
            assert torch.equal(stored(output, name)["weight"], weight)
            continue
        compressor, scheme, theirs = reference_encode(codec, weight)
        ours = stored(output, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours), name
        decompressed = compressor.decompress(stored(default, name), scheme)["weight"]
        assert torch.equal(default.decode(name).to(torch.bfloat16), decompressed), name


def test_fp8_survives_fp32(converted: Callable[..., Path]) -> None:
    """FP8 -> FP32 -> FP8: the source's codes and scales, bit for bit."""
    source = Checkpoint.open(demo_path())
    back = Checkpoint.open(converted("fp8-block", converted("fp32")))
    for name in encoded():
        ours, theirs = stored(back, name), stored(source, name)
        for part in theirs:
            assert torch.equal(ours[part].view(torch.uint8), theirs[part].view(torch.uint8)), name


def test_fp8_codes_survive_bf16(converted: Callable[..., Path]) -> None:
    """FP8 -> BF16 -> FP8: the same codes; a scale moves in its low bits (docs/FORMATS.md)."""
    source = Checkpoint.open(demo_path())
    back = Checkpoint.open(converted("fp8-block", converted("bf16")))
    differing = total = 0
    for name in encoded():
        ours, theirs = stored(back, name), stored(source, name)
        differing += int(
            (ours["weight"].view(torch.uint8) != theirs["weight"].view(torch.uint8)).sum()
        )
        total += theirs["weight"].numel()
        scale, original = ours["weight_scale_inv"], theirs["weight_scale_inv"]
        assert ((scale / original - 1).abs() <= 2**-8).all(), name
    print(f"FP8 -> BF16 -> FP8: {differing} of {total} codes differ")
    assert differing == 0


def load(folder: Path, **options: Any) -> Any:
    """transformers' model from the folder as it is; it reports the MTP layer as unexpected."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", **options
    )


@torch.inference_mode()
def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) of logits [..., V] in nats."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@torch.inference_mode()
def test_transformers_loads_bf16_and_agrees(converted: Callable[..., Path]) -> None:
    ids, folder = tokens(256), converted("bf16")
    theirs = load(folder, dtype=torch.float32)(ids).logits
    ours = Model(Checkpoint.open(folder)).forward(ids)
    print(f"bf16: largest logit difference {float((ours - theirs).abs().max()):.1e}")
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)  # other order of sums


@torch.inference_mode()
def test_transformers_loads_int4_and_agrees(converted: Callable[..., Path]) -> None:
    """As it comes it computes in BF16, whose own noise is KL 1e-3 or less (ours is float32)."""
    ids, folder = tokens(256), converted("int4")
    ours = Model(Checkpoint.open(folder)).forward(ids)
    distance = kl(ours, load(folder)(ids).logits)
    print(f"int4 as loaded, in BF16: KL {distance:.1e}")
    assert distance < 1e-3


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_decompresses_int4_to_our_weights(converted: Callable[..., Path]) -> None:
    """Decompressed by transformers (to BF16) and run in float32, against our INT4 -> BF16."""
    transformers = pytest.importorskip("transformers")
    ids, folder = tokens(256), converted("int4")
    scheme = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = load(folder, quantization_config=scheme).float()(ids).logits
    ours = Model(Checkpoint.open(converted("bf16", folder))).forward(ids)
    print(f"int4: largest logit difference {float((ours - theirs).abs().max()):.1e}")
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
