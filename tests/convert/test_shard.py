"""`requant shard` and `requant merge`: every format, cut for ranks and put together again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import requant.convert.writer as writer
from requant.convert.deepseek import split_deepseek
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, RANKS_NAME
from requant.convert.parallel import Parallel
from requant.convert.plan import Plan, make_plan
from requant.convert.rank_folders import open_rank, read_layout
from requant.convert.ranks import split
from requant.convert.recipe import KEEP, default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.shard import as_written, merge, shard
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from requant.quant import CODECS
from tests.helpers import CPU, hashes

HIDDEN, HEADS, EXPERTS, VOCAB, DENSE, EXPERT = 256, 8, 8, 256, 1024, 1024
NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 128, 128, 128, 128, 128
#: As DeepSeek has it, for every format; the others for those whose rules differ most.
SQUARE = [Parallel(1, 1), Parallel(2, 2), Parallel(4, 4), Parallel(8, 8)]
MIXED = [Parallel(1, 2), Parallel(4, 1), Parallel(1, 1, 2), Parallel(2, 4), Parallel(4, 2, 2)]
CASES = [(codec.name, square) for codec in CODECS for square in SQUARE]
CASES += [(name, mixed) for name in ("bf16", "fp8-block", "int4", "nvfp4") for mixed in MIXED]


def run(plan: Plan, out: Path) -> Path:
    convert(plan, out, Runtime(CPU, 2))
    return out


def cut(source: Path, parallel: Parallel, out: Path, layout: str = "hf") -> Path:
    plan = make_plan(Checkpoint.open(source), KEEP)
    if layout == "deepseek":
        return run(shard(plan, split_deepseek(as_written(plan), parallel.ranks), layout), out)
    return run(shard(plan, split(as_written(plan), parallel)), out)


def linear(rows: int, cols: int, seed: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=chance).mul_(0.03).bfloat16()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 with one dense, one MoE and one MTP layer, wide enough to be cut 8 ways."""
    folder = tmp_path_factory.mktemp("plain")
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_a_proj": (Q_RANK, HIDDEN),
            f"{prefix}.self_attn.q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK),
            f"{prefix}.self_attn.kv_a_proj_with_mqa": (KV_RANK + ROPE, HIDDEN),
            f"{prefix}.self_attn.kv_b_proj": (HEADS * (NOPE + VALUE), KV_RANK),
            f"{prefix}.self_attn.o_proj": (HIDDEN, HEADS * VALUE),
        }
        mlps = {f"{prefix}.mlp": DENSE}
        if layer:
            mlps = {f"{prefix}.mlp.shared_experts": EXPERT}
            mlps |= {f"{prefix}.mlp.experts.{expert}": EXPERT // 2 for expert in range(EXPERTS)}
        for module, width in mlps.items():
            shapes |= {f"{module}.gate_proj": (width, HIDDEN), f"{module}.up_proj": (width, HIDDEN)}
            shapes[f"{module}.down_proj"] = (HIDDEN, width)
    tensors = {
        f"{m}.weight": linear(*shape, seed) for seed, (m, shape) in enumerate(shapes.items())
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for norm, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN),
                            ("self_attn.q_a_layernorm", Q_RANK),
                            ("self_attn.kv_a_layernorm", KV_RANK)):  # fmt: skip
            tensors[f"{prefix}.{norm}.weight"] = torch.rand(width).bfloat16()
        if layer:
            tensors[f"{prefix}.mlp.gate.weight"] = linear(EXPERTS, HIDDEN, 900 + layer)
            tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = torch.rand(EXPERTS)
    tensors["model.layers.2.eh_proj.weight"] = linear(HIDDEN, 2 * HIDDEN, 990)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.2.{norm}.weight"] = torch.rand(HIDDEN).bfloat16()
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = linear(VOCAB, HIDDEN, len(name))
    tensors["model.norm.weight"] = torch.rand(HIDDEN).bfloat16()
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, content in files.items():
        save_file({name: tensors[name] for name in content}, folder / file)
    places = {name: file for file, content in files.items() for name in content}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "intermediate_size": DENSE, "moe_intermediate_size": EXPERT // 2, "vocab_size": VOCAB,
        "first_k_dense_replace": 1, "torch_dtype": "bfloat16", "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "rope_theta": 10000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def stored(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint in a format; in BF16 as the reference library wrote it."""
    made = {"bf16": plain}

    def make(name: str) -> Path:
        if name not in made:
            plan = make_plan(Checkpoint.open(plain), default_recipe(name))
            made[name] = run(plan, tmp_path_factory.mktemp("stored") / "model")
        return made[name]

    return make


@pytest.mark.parametrize(("name", "parallel"), CASES, ids=str)
def test_cut_and_merged_is_as_it_was(
    name: str, parallel: Parallel, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    source = stored(name)
    ranks = cut(source, parallel, tmp_path / "ranks")
    whole, layout = Checkpoint.open(source), read_layout(ranks)
    assert layout is not None and len(layout.folders) == parallel.ranks
    for rank, table in enumerate(layout.tables):
        piece = open_rank(ranks, layout, rank)
        for weight, where in list(table.items())[::7]:
            value = whole.decode(weight)
            *_, kind, span = ["", *where.split()]
            if ":" in span:
                start, stop = map(int, span.split(":"))
                value = value[start:stop] if kind == "rows" else value[:, start:stop]
            assert torch.equal(piece.decode(weight), value), (rank, weight, where)
    merged = run(merge(ranks), tmp_path / "merged")
    before, after = hashes(source), hashes(merged)
    before.pop(MANIFEST_NAME, None)
    after.pop(MANIFEST_NAME)
    same = {file: digest == after.get(file) for file, digest in before.items()}
    same.pop("config.json"), same.pop("model.safetensors.index.json")  # the reference's own spacing
    assert all(same.values()) and before.keys() == after.keys(), same


def test_the_pieces_are_slices_by_hand(plain: Path, tmp_path: Path) -> None:
    """Read with the reference library, sliced by what each engine computes on each rank."""
    ranks = cut(plain, Parallel(4, 4), tmp_path / "ranks")
    tensors = {n: t for file in plain.glob("*.safetensors") for n, t in load_file(file).items()}
    for rank in range(4):
        found = {}
        for file in (ranks / f"rank-{rank:03}").glob("*.safetensors"):
            found |= load_file(file)
        expected = {}
        for name, tensor in tensors.items():
            leaf = name.split(".")[-2]
            if ".experts." in name:
                if int(name.split(".experts.")[1].split(".")[0]) // (EXPERTS // 4) == rank:
                    expected[name] = tensor
            elif leaf in ("o_proj", "down_proj"):
                expected[name] = tensor.chunk(4, 1)[rank]
            elif leaf in (
                "q_b_proj",
                "kv_b_proj",
                "gate_proj",
                "up_proj",
                "embed_tokens",
                "lm_head",
            ):
                expected[name] = tensor.chunk(4, 0)[rank]
            else:
                expected[name] = tensor
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_ranks_are_a_checkpoint_that_every_command_takes(plain: Path, tmp_path: Path) -> None:
    ranks = cut(plain, Parallel(2, 4), tmp_path / "ranks")
    direct = run(make_plan(Checkpoint.open(plain), default_recipe("int4")), tmp_path / "direct")
    joined = run(make_plan(Checkpoint.open(ranks), default_recipe("int4")), tmp_path / "joined")
    a, b = Checkpoint.open(direct), Checkpoint.open(joined)
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.equal(a.decode(name), b.decode(name)) for name in list(a.weights)[::5])


@pytest.mark.parametrize("to", ["int4", "nvfp4", "int8-channel"])
def test_converting_and_cutting_in_one_pass(to: str, plain: Path, tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(plain), default_recipe(to))
    once = run(shard(plan, split(as_written(plan), Parallel(4, 4))), tmp_path / "once")
    twice = cut(run(plan, tmp_path / "whole"), Parallel(4, 4), tmp_path / "twice")
    for file in sorted(path.relative_to(twice) for path in twice.rglob("*.safetensors")):
        assert load_bytes(once / file) == load_bytes(twice / file), file
    merged = run(merge(once), tmp_path / "merged")
    assert {f: d for f, d in hashes(merged).items() if f.endswith("safetensors")} == {
        f: d for f, d in hashes(tmp_path / "whole").items() if f.endswith("safetensors")
    }


def load_bytes(path: Path) -> dict[str, bytes]:
    return {
        name: bytes(t.view(torch.uint8).flatten().numpy()) for name, t in load_file(path).items()
    }


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a rank less": (lambda d: d["ranks"].pop(), "on the ranks|is on no rank"),
    "another piece": (
        lambda d: d["ranks"][0]["weights"].update({"lm_head.weight": "rows 0:100"}), "gap at 100"),
    "nonsense": (
        lambda d: d["ranks"][0]["weights"].update({"lm_head.weight": "some"}), "'some' is none of"),
    "a weight less": (lambda d: d["ranks"][0]["weights"].pop("lm_head.weight"), "is not in ranks"),
    "a weight of two lines": (
        lambda d: d["ranks"][0]["weights"].update({" \n": "all"}), r"characters in ' \\n'"),
    "another version": (lambda d: d.update(version=9), "version 9, this requant reads 1"),
    "a way out": (lambda d: d["ranks"][0].update(folder="../elsewhere"), "no name of a file or"),
    "no table": (lambda d: d.update(ranks=[1]), "not what `requant shard` writes"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_spoilt_layout_is_refused(what: str, plain: Path, tmp_path: Path) -> None:
    ranks = cut(plain, Parallel(2, 2), tmp_path / "ranks")
    spoil, message = DAMAGE[what]
    document = json.loads((ranks / RANKS_NAME).read_text())
    spoil(document)
    (ranks / RANKS_NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        run(merge(ranks), tmp_path / "merged")


def damage(rank: Path, name: str) -> None:
    """Change one value of one tensor."""
    for file in rank.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].flatten()[3] += 1
            save_file(tensors, file)


def test_a_replicated_tensor_that_differs_is_found(plain: Path, tmp_path: Path) -> None:
    ranks = cut(plain, Parallel(2, 2), tmp_path / "ranks")
    damage(ranks / "rank-001", "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"rank-001.*model\.norm\.weight differs"):
        run(merge(ranks), tmp_path / "merged")


def test_a_piece_that_two_ranks_have_is_compared(plain: Path, tmp_path: Path) -> None:
    ranks = cut(plain, Parallel(2, 4), tmp_path / "ranks")
    damage(ranks / "rank-002", "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(CheckpointError, match=r"rank-002.*down_proj\.weight differs from the same"):
        run(merge(ranks), tmp_path / "merged")


def test_only_ranks_can_be_merged(plain: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no ranks\.json"):
        merge(plain)


@pytest.mark.parametrize("name", ["bf16", "fp8-block"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_deepseeks_layout_and_back(
    name: str, count: int, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    source = stored(name)
    ranks = cut(source, Parallel(count, count), tmp_path / "ranks", "deepseek")
    files = sorted(path.name for path in ranks.glob("*.safetensors"))
    assert files == sorted(
        f"{k}{r}-mp{count}.safetensors" for k in ("model", "mtp") for r in range(count)
    )
    first = load_file(ranks / f"model0-mp{count}.safetensors")
    assert first["layers.0.attn.wo.weight"].shape == (HIDDEN, HEADS * VALUE // count)
    assert first["embed.weight"].shape == (VOCAB // count, HIDDEN)
    assert sum(".experts.0.w1.weight" in name for name in first) == 1
    assert not any(name.startswith("layers.2.") for name in first)
    config = json.loads((ranks / "deepseek-inference.json").read_text())
    assert config["n_routed_experts"] == EXPERTS and config["dim"] == HIDDEN
    merged = run(merge(ranks), tmp_path / "merged")
    for file in source.glob("*.safetensors"):
        assert (merged / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_a_cut_that_was_interrupted_anywhere_goes_on(
    layout: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within DeepSeek's large files, of which each takes from every file of the source."""
    monkeypatch.setattr(writer, "LEAST_WINDOW_BYTES", 1 << 15)
    monkeypatch.setattr(writer, "WINDOW_BYTES", 1 << 15)
    pwrite, left, halfway = os.pwrite, 1 << 30, 0

    def counted(*args: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", counted)
    expected = hashes(cut(plain, Parallel(2, 2), tmp_path / "whole", layout))
    writes = (1 << 30) - left
    for share in (0, 30, 60, 90):
        out, left = tmp_path / f"out-{share}", writes * share // 100
        with pytest.raises(CheckpointError, match="No space left"):
            cut(plain, Parallel(2, 2), out, layout)
        left = 1 << 30
        assert not (out / "config.json").exists() and not (out / RANKS_NAME).exists()
        journal = out / JOURNAL_NAME
        halfway += journal.exists() and '"stage": 1' in journal.read_text()
        assert hashes(cut(plain, Parallel(2, 2), out, layout)) == expected
    assert (halfway > 0) == (layout == "deepseek")


def test_deepseeks_layout_is_what_its_script_writes_and_is_put_together(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """Ranks written here by the rules of its convert.py, without anything of requant."""
    dims = {"wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "embed": 0, "head": 0, "wo": 1, "w2": 1}
    names = {"embed_tokens": "embed", "lm_head": "head", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "q_a_proj": "wq_a", "q_b_proj": "wq_b",
             "q_a_layernorm": "q_norm", "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm",
             "kv_b_proj": "wkv_b", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
             "up_proj": "w3"}  # fmt: skip
    source, ranks = stored("fp8-block"), tmp_path / "ranks"
    tensors = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    main = {name: t for name, t in tensors.items() if "layers.2." not in name}
    ranks.mkdir()
    for rank in range(4):
        state = {}
        for name, tensor in main.items():
            new = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
            new = new.replace("weight_scale_inv", "scale").replace(
                "e_score_correction_bias", "bias"
            )
            leaf = new.split(".")[-2]
            new = new.replace(leaf, names.get(leaf, leaf))
            dim = dims.get(names.get(leaf, leaf))
            if ".experts." in new:
                if int(new.split(".experts.")[1].split(".")[0]) // (EXPERTS // 4) != rank:
                    continue
            elif dim is not None:
                tensor = tensor.chunk(4, dim)[rank].contiguous()
            state[new] = tensor
        save_file(state, ranks / f"model{rank}-mp4.safetensors")
    ours = cut(source, Parallel(4, 4), tmp_path / "ours", "deepseek")
    for file in sorted(ranks.iterdir()):
        assert load_bytes(ours / file.name) == load_bytes(file), file.name
    merged = run(merge(ranks, source / "config.json"), tmp_path / "merged")
    found = {n: t for file in merged.glob("*.safetensors") for n, t in load_file(file).items()}
    assert found.keys() == main.keys()
    assert all(
        torch.equal(found[n].view(torch.uint8), t.view(torch.uint8)) for n, t in main.items()
    )
    (ranks / "model3-mp4.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected model0-mpN"):
        merge(ranks, source / "config.json")
