"""Which piece of which weight lies on which rank, and which numbers of ranks are legal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.convert.cut_rules import Demand, Rule, helpful_formats
from requant.convert.parallel import Parallel, usual
from requant.convert.placement import Loads, balance, read_loads
from requant.convert.plan import make_plan
from requant.convert.ranks import Piece, Split, split
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.errors import CheckpointError, FormatError, RequantError
from requant.quant import CODECS, parse_format
from requant.quant.cutting import plan_cut
from tests.convert.layouts import LAYOUTS, kimi
from tests.convert.sparse import BF16, V2_LITE, V3, Specs, deepseek, linear, plain, write_sparse
from tests.helpers import CPU

#: V3's widths, in six layers: three dense, two of experts, one of MTP.
LAYERS = {"num_hidden_layers": 5}


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = V3 | LAYERS
    return write_sparse(tmp_path_factory.mktemp("v3") / "model", config, deepseek(config))


def check_sums(checkpoint: Checkpoint, made: Split) -> dict[str, Any]:
    """Bytes of every rank, counted piece by piece, are the summary's; every row, column and expert
    is somewhere, as often as elsewhere. Returns the summary."""
    facts = made.summary()
    copies: dict[str, Counter[tuple[int, int]]] = {}
    for rank in range(made.parallel.ranks):
        roles: Counter[str] = Counter()
        for piece in made.pieces(rank):
            roles[piece.weight.role] += counted_bytes(piece)
            span = (piece.start, piece.stop)
            copies.setdefault(piece.weight.name, Counter())[span] += 1
        assert facts["rank_role_bytes"][rank] == dict(roles)
        assert facts["rank_bytes"][rank] == sum(roles.values())
    assert list(copies) and set(copies) == set(checkpoint.weights)
    extra = 0
    for share in made.shares:
        weight, spans = share.item.weight, copies[share.item.weight.name]
        ordered = sorted(spans)
        assert ordered[0][0] == 0 and ordered[-1][1] in (weight.shape or (1,))
        assert all(a[1] == b[0] for a, b in zip(ordered, ordered[1:], strict=False))
        assert len(set(spans.values())) == 1 and len({b - a for a, b in ordered}) == 1
        (held,) = set(spans.values())
        extra += held * len(ordered) * share.nbytes - weight.nbytes
    assert facts["replicated_bytes"] == extra
    assert sum(facts["rank_bytes"]) == checkpoint.nbytes + extra
    assert facts["max_rank_bytes"] == max(facts["rank_bytes"])
    assert facts["min_rank_bytes"] == min(facts["rank_bytes"])
    return facts


def counted_bytes(piece: Piece) -> int:
    """The bytes of a piece by what a cut has of each part."""
    weight = piece.weight
    whole = sum(part.spec.nbytes for part in weight.activations.values())
    if piece.axis is None:
        return weight.nbytes
    if weight.codec is None:
        (part,) = weight.parts.values()
        return part.spec.nbytes * (piece.stop - piece.start) // weight.shape[0]
    shape = weight.shape[0], weight.shape[1]
    cuts = plan_cut(weight.codec, shape, piece.axis, piece.start, piece.stop).values()
    return whole + sum(cut.spec.nbytes for cut in cuts)


def where(made: Split, ending: str) -> list[str | None]:
    """Where each rank has its piece of the one weight whose name ends like this."""
    (name,) = (n for n in made.survey.checkpoint.weights if n.endswith(ending))
    return [made.table(rank).get(name) for rank in range(made.parallel.ranks)]


@pytest.mark.parametrize(
    ("parallel", "places"),
    [
        (Parallel(2, 2), [(0, 0, 0), (0, 1, 1)]),
        (Parallel(4, 2), [(0, 0, 0), (0, 1, 0), (0, 2, 1), (0, 3, 1)]),
        (Parallel(2, 4), [(0, 0, 0), (0, 1, 1), (0, 0, 2), (0, 1, 3)]),
        (Parallel(1, 2, 2), [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]),
    ],
)
def test_a_rank_has_a_stage_a_cut_and_a_group(
    parallel: Parallel, places: list[tuple[int, int, int]]
) -> None:
    assert [parallel.place(rank) for rank in range(parallel.ranks)] == places


def test_ranks_mean_what_is_usual(v3: Checkpoint, tmp_path: Path) -> None:
    assert usual(v3, 8) == Parallel(8, 8)
    assert usual(v3, 8, tp=2) == Parallel(2, 8)
    assert usual(v3, 8, ep=4) == Parallel(8, 4)
    assert usual(v3, 8, pp=2) == Parallel(4, 4, 2)
    assert usual(v3, None, tp=4) == Parallel(4, 4)
    assert usual(v3, None, tp=4, ep=8, pp=3) == Parallel(4, 8, 3)
    dense = write_sparse(tmp_path / "dense", GQA, llama())
    assert usual(dense, 4) == Parallel(4, 1)
    assert usual(dense, 8, pp=2) == Parallel(4, 1, 2)
    assert str(Parallel(4, 8, 2)) == "tp=4 ep=8 pp=2"
    assert Parallel(4, 8, 2).meaning(moe=True) == (
        "heads, MLPs and vocabulary in 4 pieces, each on 2 ranks, routed experts in 8 groups, "
        "layers in 2 stages"
    )
    assert Parallel(8, 4).meaning(moe=True).endswith("in 4 groups, each expert in 2 pieces")
    assert Parallel(4, 1).meaning(moe=False) == "heads, MLPs and vocabulary in 4 pieces"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, None, None, None), "^ranks is 0, expected at least 1"),
        ((8, 2, -1, None), "^ep is -1, expected at least 1"),
        ((None, None, None, 2), "^give the number of ranks, or tp or ep"),
        ((8, None, None, 3), "^ranks 8, pp 3: 8 ranks do not divide into 3 stages"),
        ((8, 16, None, None), r"tp=16 ep=8 pp=1 is for 16 ranks, pp \* max\(tp, ep\), not 8"),
        ((8, 8, 3, None), "^ranks 8, tp 8, ep 3: of tp 8 and ep 3 neither divides the other"),
    ],
)
def test_numbers_that_contradict_are_refused(
    v3: Checkpoint, numbers: tuple[int | None, int | None, int | None, int | None], message: str
) -> None:
    with pytest.raises(RequantError, match=message):
        usual(v3, *numbers)


def test_a_dense_model_takes_no_expert_parallelism(tmp_path: Path) -> None:
    dense = write_sparse(tmp_path / "dense", GQA, llama())
    with pytest.raises(RequantError, match="ranks 4, ep 2: .* has no routed experts; leave out ep"):
        usual(dense, 4, ep=2)


@pytest.mark.parametrize(
    "parallel",
    [Parallel(1, 1), Parallel(8, 8), Parallel(16, 16), Parallel(16, 64), Parallel(16, 4),
     Parallel(1, 8), Parallel(4, 1), Parallel(4, 8, 3), Parallel(1, 1, 5)],
    ids=str,
)  # fmt: skip
def test_the_bytes_of_v3s_ranks_add_up(v3: Checkpoint, parallel: Parallel) -> None:
    facts = check_sums(v3, split(v3, parallel))
    if parallel.pp == 1:
        assert facts["balance"] == 1
    assert facts["ranks"] == parallel.ranks == len(facts["rank_bytes"])
    assert facts["meaning"] == parallel.meaning(moe=True)


def test_v3_on_eight_ranks(v3: Checkpoint) -> None:
    made = split(v3, usual(v3, 8))
    table = made.table(3)
    layer = "model.layers.3"
    assert {name.removeprefix(layer): table[name] for name in table if name.startswith(layer)
            and (".experts." not in name or ".experts.97." in name)} == {
        ".input_layernorm.weight": "replicated",
        ".post_attention_layernorm.weight": "replicated",
        ".self_attn.q_a_proj.weight": "replicated",
        ".self_attn.q_a_layernorm.weight": "replicated",
        ".self_attn.q_b_proj.weight": "rows 9216:12288",
        ".self_attn.kv_a_proj_with_mqa.weight": "replicated",
        ".self_attn.kv_a_layernorm.weight": "replicated",
        ".self_attn.kv_b_proj.weight": "rows 12288:16384",
        ".self_attn.o_proj.weight": "cols 6144:8192",
        ".mlp.gate.weight": "replicated",
        ".mlp.gate.e_score_correction_bias": "replicated",
        ".mlp.shared_experts.gate_proj.weight": "rows 768:1024",
        ".mlp.shared_experts.up_proj.weight": "rows 768:1024",
        ".mlp.shared_experts.down_proj.weight": "cols 768:1024",
        ".mlp.experts.97.gate_proj.weight": "experts",
        ".mlp.experts.97.up_proj.weight": "experts",
        ".mlp.experts.97.down_proj.weight": "experts",
    }  # fmt: skip
    held = {int(name.split(".")[5]) for name in table if name.startswith(f"{layer}.mlp.experts.")}
    assert held == set(range(96, 128))
    assert table["model.embed_tokens.weight"] == table["lm_head.weight"] == "rows 48480:64640"
    assert table["model.layers.5.shared_head.head.weight"] == "rows 48480:64640"
    assert table["model.layers.5.eh_proj.weight"] == "replicated"
    facts = made.summary()
    assert facts["unknown_tensors"] == {"model.layers.*.eh_proj.weight": 1}
    assert facts["replicated_tensors"]["model.layers.*.self_attn.q_a_proj.weight"] == 6
    assert facts["legal_ranks"] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("ranks", [32, 64])
def test_the_reason_and_the_ways_out_are_told(v3: Checkpoint, ranks: int) -> None:
    """And each way out that is told is one."""
    with pytest.raises(FormatError) as caught:
        split(v3, usual(v3, ranks))
    message = str(caught.value)
    assert (
        f"tp={ranks} ep={ranks} pp=1 is not legal: model.layers.0.mlp.gate_proj.weight" in message
    )
    assert (
        f"model.layers.3.mlp.shared_experts.gate_proj.weight [2048, 7168]: 2048 rows / {ranks} = "
        f"{2048 // ranks}, no multiple of 128 in fp8-block: one step of weight_scale_inv is 128 "
        "rows" in message
    )
    assert "Of up to 512 ranks these are legal in this way: 1, 2, 4, 8, 16. " in message
    assert f"use tp=16 ep={ranks} pp=1; or use tp=8 ep={ranks} pp=1" in message
    assert (
        "replicate dense_mlp, shared_expert; or convert dense_mlp, shared_expert to fp8-chan"
        in (message)
    )
    split(v3, usual(v3, ranks, tp=16))
    made = split(v3, usual(v3, ranks), replicate=["shared_expert", "dense_mlp"])
    check_sums(v3, made)
    assert where(made, "layers.3.mlp.shared_experts.up_proj.weight") == ["replicated"] * ranks


def test_320_ranks_need_stages_or_redundant_experts(v3: Checkpoint) -> None:
    with pytest.raises(FormatError) as caught:
        split(v3, usual(v3, 320))
    message = str(caught.value)
    assert "256 routed experts do not divide into 320 groups (256 % 320 = 256); " in message
    assert "so it is with 4 more kinds" in message
    assert "For 320 ranks: use tp=16 ep=64 pp=5; or use tp=8 ep=64 pp=5" in message
    assert "or use tp=16 ep=320 pp=1 with redundant_experts=64" in message
    made = split(v3, Parallel(4, 320), {None: list(range(256))}, redundant=64)
    for rank in (0, 319):
        assert Counter(made.table(rank).values())["experts"] == 3 * 3
    check_sums(v3, made)
    check_sums(v3, split(v3, Parallel(16, 64, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 16, 32, 64, 320])
def test_v3_as_it_is(ranks: int, whole_v3: Checkpoint) -> None:
    try:
        made = split(whole_v3, usual(whole_v3, ranks))
    except FormatError as error:
        other = {32: Parallel(16, 32), 64: Parallel(16, 64), 320: Parallel(16, 64, 5)}[ranks]
        assert f"use {other}" in str(error)
        made = split(whole_v3, other)
    facts = made.summary()
    assert len(whole_v3.weights) == 46183 and facts["source_bytes"] == 688574839360
    assert sum(facts["rank_bytes"]) == facts["source_bytes"] + facts["replicated_bytes"]


@pytest.fixture(scope="module")
def whole_v3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_sparse(tmp_path_factory.mktemp("v3") / "model", V3, deepseek(V3))


#: A small Llama, Qwen2 and Qwen3-MoE: 8 query heads of 32, 2 KV heads.
GQA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def llama(biases: bool = False, tied: bool = False, experts: int = 0) -> Specs:
    specs = {"model.embed_tokens.weight": plain(96, 128), "model.norm.weight": plain(128)}
    if not tied:
        specs["lm_head.weight"] = plain(96, 128)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        heads = {"q_proj": 256, "k_proj": 64, "v_proj": 64}
        for leaf, rows in heads.items():
            specs |= linear(f"{prefix}.self_attn.{leaf}", rows, 128, BF16)
            if biases:
                specs[f"{prefix}.self_attn.{leaf}.bias"] = plain(rows)
        specs |= linear(f"{prefix}.self_attn.o_proj", 128, 256, BF16)
        mlps = [f"{prefix}.mlp.experts.{e}" for e in range(experts)] or [f"{prefix}.mlp"]
        if experts:
            specs[f"{prefix}.mlp.gate.weight"] = plain(experts, 128)
            specs |= {f"{prefix}.self_attn.{n}_norm.weight": plain(32) for n in "qk"}
        for mlp in mlps:
            for leaf, rows, cols in (("gate_proj", 64, 128), ("up_proj", 64, 128),
                                     ("down_proj", 128, 64)):  # fmt: skip
                specs |= linear(f"{mlp}.{leaf}", rows, cols, BF16)
                if biases:
                    specs[f"{mlp}.{leaf}.bias"] = plain(rows)
        specs[f"{prefix}.input_layernorm.weight"] = plain(128)
    return specs


def test_kv_heads_are_repeated_where_they_are_fewer_than_ranks(tmp_path: Path) -> None:
    checkpoint = write_sparse(tmp_path / "model", GQA, llama(biases=True))
    made = split(checkpoint, Parallel(4, 1))
    check_sums(checkpoint, made)
    layer = "layers.1.self_attn."
    for part in ("weight", "bias"):
        assert where(made, f"{layer}q_proj.{part}") == [
            "rows 0:64", "rows 64:128", "rows 128:192", "rows 192:256"
        ]  # fmt: skip
        for leaf in ("k_proj", "v_proj"):
            repeated = ["rows 0:32", "rows 0:32", "rows 32:64", "rows 32:64"]
            assert where(made, f"{layer}{leaf}.{part}") == repeated
    assert where(made, f"{layer}o_proj.weight")[1] == "cols 64:128"
    # A bias is added to rows, or once to the sum.
    assert where(made, "layers.1.mlp.up_proj.bias")[3] == "rows 48:64"
    assert where(made, "layers.1.mlp.down_proj.bias") == ["replicated"] * 4
    assert made.summary()["legal_ranks"] == [1, 2, 4, 8]
    with pytest.raises(FormatError, match="3 ranks cannot share 2 KV heads evenly"):
        split(checkpoint, Parallel(3, 1))
    with pytest.raises(FormatError) as caught:
        split(checkpoint, Parallel(16, 1))
    assert "256 rows / 16 = 16 rows each: 32 rows belong to one of 8 num_att" in str(caught.value)
    assert "or replicate attention" in str(caught.value)


def test_stages_are_runs_of_layers(tmp_path: Path) -> None:
    checkpoint = write_sparse(tmp_path / "model", GQA, llama())
    made = split(checkpoint, Parallel(2, 1, 2))
    check_sums(checkpoint, made)
    first, last = ["rows 0:48", "rows 48:96", None, None], [None, None, "rows 0:48", "rows 48:96"]
    assert where(made, "embed_tokens.weight") == first
    assert where(made, "lm_head.weight") == last
    assert where(made, "model.norm.weight") == [None, None, "replicated", "replicated"]
    held = [where(made, f"layers.{n}.input_layernorm.weight")[0] is not None for n in range(3)]
    assert held == [True, True, False]
    assert made.summary()["legal_ranks"] == [2, 4, 8, 16]
    with pytest.raises(FormatError, match="3 layers do not fill 4 stages.*use tp=4 ep=1 pp=1"):
        split(checkpoint, Parallel(1, 1, 4))
    tied = write_sparse(tmp_path / "tied", GQA, llama(tied=True) | {"model.odd": plain(2, 2)})
    both = split(tied, Parallel(2, 1, 2))
    check_sums(tied, both)
    assert where(both, "embed_tokens.weight") == ["rows 0:48", "rows 48:96"] * 2
    assert where(both, "model.odd") == ["replicated"] * 4
    assert both.summary()["unknown_tensors"] == {"model.odd": 1}


def test_experts_of_a_group_are_cut_where_heads_are_cut_more(tmp_path: Path) -> None:
    config = GQA | {"model_type": "qwen3_moe", "num_experts": 4}
    checkpoint = write_sparse(tmp_path / "model", config, llama(experts=4, biases=True))
    made = split(checkpoint, Parallel(4, 2))
    check_sums(checkpoint, made)
    prefix = "layers.2.mlp.experts.2"
    halves = [None, None, "experts, rows 0:32", "experts, rows 32:64"]
    assert where(made, f"{prefix}.gate_proj.weight") == halves
    assert where(made, f"{prefix}.gate_proj.bias") == halves
    assert where(made, f"{prefix}.down_proj.weight")[2:] == [
        "experts, cols 0:32", "experts, cols 32:64"
    ]  # fmt: skip
    assert where(made, f"{prefix}.down_proj.bias") == [None, None, "experts", "experts"]
    assert where(made, "layers.2.self_attn.q_norm.weight") == ["replicated"] * 4
    assert made.summary()["legal_ranks"] == [2, 4, 8]
    wide = split(checkpoint, Parallel(2, 4))
    assert where(wide, f"{prefix}.up_proj.weight") == [None, None, "experts", None]
    assert where(wide, "layers.0.self_attn.q_proj.weight") == ["rows 0:128", "rows 128:256"] * 2
    assert wide.summary()["legal_ranks"] == [2, 4]
    with pytest.raises(FormatError, match=r"4 routed experts do not divide into 8 groups \(4 % 8"):
        split(checkpoint, Parallel(8, 8))


def test_gpt_oss_sinks_go_with_their_heads(tmp_path: Path) -> None:
    layout = LAYOUTS["gpt-oss"]()
    layout.config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    checkpoint = Checkpoint.open(layout.write(tmp_path / "model"))
    with pytest.raises(FormatError) as caught:
        split(checkpoint, Parallel(2, 1))
    assert "96 columns / 2 = 48, no multiple of 32 in mxfp4[container=gpt-oss]" in str(caught.value)
    assert "use tp=2 ep=2 pp=1 with redundant_experts=1; or convert routed" in str(caught.value)
    made = split(checkpoint, Parallel(2, 2), {None: [1, 1, 5]}, redundant=1)
    check_sums(checkpoint, made)
    assert where(made, "self_attn.sinks") == ["rows 0:2", "rows 2:4"]
    assert where(made, "mlp.router.bias") == where(made, "mlp.router.weight")
    assert where(made, "mlp.router.bias") == ["replicated"] * 2
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for part in ("weight", "bias"):
            assert where(made, f"experts.0.{leaf}.{part}") == ["experts", None]
            assert where(made, f"experts.1.{leaf}.{part}") == [None, "experts"]
            assert where(made, f"experts.2.{leaf}.{part}") == ["experts"] * 2
    assert made.summary()["legal_ranks"] == [2, 4]


def test_kimis_tower_stays_whole_on_the_first_stage(tmp_path: Path) -> None:
    layout = kimi()
    layout.config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    layout.plain("vision_tower.encoder.layers.1.norm.weight", 64)
    checkpoint = Checkpoint.open(layout.write(tmp_path / "model"))
    made = split(checkpoint, Parallel(2, 2, 2))
    check_sums(checkpoint, made)
    for name in (
        "blocks.0.attn.q_proj.bias",
        "blocks.0.attn.q_proj.weight",
        "layers.1.norm.weight",
    ):
        assert where(made, name) == ["replicated", "replicated", None, None]
    assert where(made, "experts.1.down_proj.weight") == [None, None, None, "experts"]
    assert where(made, "layers.1.mlp.shared_experts.up_proj.weight")[3] == "rows 64:128"
    assert where(made, "language_model.lm_head.weight")[2] == "rows 0:32"
    assert set(made.summary()["unknown_tensors"]) == {
        "mm_projector.linear_1.weight", "vision_tower.encoder.blocks.*.attn.q_proj.weight",
        "vision_tower.encoder.blocks.*.mlp.up_proj.weight",
        "vision_tower.encoder.blocks.*.wqkv.weight", "vision_tower.patch_embed.proj.weight",
    }  # fmt: skip


def test_v2_lites_queries_are_cut_at_heads(tmp_path: Path) -> None:
    config = V2_LITE | {"num_hidden_layers": 2, "n_routed_experts": 4}
    checkpoint = write_sparse(tmp_path / "model", config, deepseek(config, BF16))
    made = split(checkpoint, usual(checkpoint, 4))
    check_sums(checkpoint, made)
    assert where(made, "layers.1.self_attn.q_proj.weight")[2] == "rows 1536:2304"
    int4 = parse_format("int4")
    config |= {"quantization_config": int4.config([])}
    specs = deepseek(config | {"intermediate_size": 11008}, int4)
    packed = write_sparse(tmp_path / "int4", config, specs)
    with pytest.raises(FormatError) as caught:
        split(packed, usual(packed, 4))
    assert "[2048, 2816]: 2816 columns / 4 = 704, no multiple of 128 in int4: " in str(caught.value)
    # A way out: 11008 / 4 = 86 * 32, and 704 = 22 * 32.
    assert "convert dense_mlp, shared_expert to int4[group_size=64] first" in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_legal_or_has_a_reason(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    nested = layout.config.get("text_config", layout.config)
    nested |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "index_n_heads": 8,
        "o_groups": 2,
    }
    checkpoint = Checkpoint.open(layout.write(tmp_path / "model"))
    for parallel in (Parallel(1, 1), Parallel(2, 2), Parallel(2, 1), Parallel(2, 1, 2)):
        try:
            check_sums(checkpoint, split(checkpoint, parallel))
        except FormatError as error:
            assert parallel.ranks > 1
            assert f"{parallel} is not legal: " in str(error)


@pytest.fixture(scope="module")
def demo_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def get(text: str) -> Checkpoint:
        out = tmp_path_factory.mktemp("demo") / "out"
        convert(make_plan(Checkpoint.open(demo_path()), default_recipe(text)), out, Runtime(CPU, 1))
        return Checkpoint.open(out)

    return get


#: Which numbers of ranks cut the demo: 4 heads of 96, 128 and 64; MLPs of 512 and 128; 8 experts.
DEMO_RANKS = {
    "bf16": [1, 2, 4], "fp16": [1, 2, 4], "fp32": [1, 2, 4], "fp8-channel": [1, 2, 4],
    "fp8-tensor": [1, 2, 4], "int8-channel": [1, 2, 4], "mxfp8": [1, 2, 4], "mxfp4": [1, 2, 4],
    "nvfp4": [1, 2, 4], "fp8-block": [1], "int8-block": [1], "int4": [1], "int4-awq": [1],
    "int4-gptq": [1], "nf4": [1, 2], "bnb-fp4": [1, 2],
}  # fmt: skip


@pytest.mark.parametrize("text", [codec.name for codec in CODECS])
def test_every_format_is_cut_or_says_why_not(text: str, demo_in: Any) -> None:
    checkpoint = demo_in(text)
    for ranks in (1, 2, 4, 8):
        if ranks in DEMO_RANKS[text]:
            facts = check_sums(checkpoint, split(checkpoint, usual(checkpoint, ranks)))
            assert facts["legal_ranks"] == DEMO_RANKS[text]
        else:
            with pytest.raises(
                FormatError, match=f"tp={ranks} ep={ranks} pp=1 is not legal: model"
            ):
                split(checkpoint, usual(checkpoint, ranks))
            check_sums(checkpoint, split(checkpoint, usual(checkpoint, ranks, tp=1)))


LISTS = st.lists(st.integers(0, 50), min_size=1, max_size=24)


@given(counts=LISTS, groups=st.integers(1, 8), copies=st.integers(0, 24))
def test_experts_are_placed_evenly_and_once_more_where_hot(
    counts: list[int], groups: int, copies: int
) -> None:
    copies = min(copies, len(counts)) if groups > 1 else 0
    counts += [0] * (-(len(counts) + copies) % groups)
    held = balance(counts, groups, copies)
    assert held == balance(counts, groups, copies)
    sizes = Counter(group for holders in held for group in holders)
    assert [sizes[group] for group in range(groups)] == [(len(counts) + copies) // groups] * groups
    hottest = sorted(range(len(counts)), key=lambda expert: -counts[expert])[:copies]
    for expert, holders in enumerate(held):
        assert len(holders) == len(set(holders)) == 1 + (expert in hottest)


def test_the_heaviest_go_first_to_the_least_loaded() -> None:
    # 9, 8, 7 apart; then 6 beside 7, 5 beside 8, 1 beside 9.
    assert balance([1, 9, 5, 8, 6, 7], 3) == ((0,), (0,), (1,), (1,), (2,), (2,))
    assert balance([10, 6, 3, 0], 2, redundant=0) == ((0,), (1,), (1,), (0,))
    assert balance([10, 6, 3], 2, redundant=1) == ((0, 1), (0,), (1,))
    # Halves of 5 come after both 6, so that one lies alone at first.
    assert balance([10, 6, 6, 1, 1], 3, redundant=1) == ((0, 2), (0,), (1,), (2,), (1,))
    # Four small ones fill groups 1 and 2 but for the last, which has room in group 0 only, twice:
    # the lightest of group 2 makes place for one copy.
    assert balance([200, 120, 2, 2, 2, 2], 3, redundant=6) == (
        (0, 1), (0, 2), (0, 1), (1, 2), (1, 2), (0, 2)
    )  # fmt: skip
    loads = [0.0, 0.0]
    counts = [40, 3, 9, 27, 14, 14, 1, 1]
    for expert, (group,) in enumerate(balance(counts, 2)):
        loads[group] += counts[expert]
    assert abs(loads[0] - loads[1]) <= 5


def test_a_load_file_places_experts_by_layer(v3: Checkpoint, tmp_path: Path) -> None:
    hot = {layer: [1] * 256 for layer in ("3", "4", "5")}
    hot["4"] = [1] * 255 + [300]
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(hot))
    made = split(v3, Parallel(4, 4), read_loads(path), redundant=4)
    check_sums(v3, made)
    for layer, copied in (("3", {0, 1, 2, 3}), ("4", {255, 0, 1, 2})):
        tables = [made.table(rank) for rank in range(4)]
        held = Counter(name for table in tables for name in table
                       if name.startswith(f"model.layers.{layer}.mlp.experts."))  # fmt: skip
        twice = {int(name.split(".")[5]) for name, count in held.items() if count == 2}
        assert twice == copied and set(held.values()) == {1, 2}
    facts = made.summary()
    assert facts["redundant_experts"] == 4 and facts["balance"] == 1
    assert facts["legal_ranks"] == [2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "loads.json: not valid JSON: "),
        ("3", r'loads.json: expected a list of counts, or \{"3": \[counts\], ...\} by layer'),
        ("{}", "loads.json: expected a list of counts, or"),
        ('{"3": 4}', "loads.json: layer 3: expected a list of counts, one for each expert"),
        ("[]", "loads.json: expected a list of counts, one for each expert"),
        ("[1, -1]", "loads.json: the count of expert 1 is -1, expected a number from 0"),
        ('{"7": [1, true]}', "layer 7: the count of expert 1 is True, expected a number"),
        ("[NaN]", "the count of expert 0 is nan, expected a number from 0"),
    ],
)
def test_a_load_file_is_checked(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_loads(path)


def test_a_load_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.json: not a file of at most"):
        read_loads(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="xxx: File name too long; cannot read it"):
        read_loads(tmp_path / ("x" * 300))


def test_layers_that_are_numbered_apart_have_loads_of_their_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(LAYOUTS["deepseek-v4"]().write(tmp_path / "model"))
    loads: Loads = {"0": [1, 2], "1": [2, 1], "mtp.0": [1, 2]}
    made = split(checkpoint, Parallel(1, 2), loads)
    for prefix, place in (("layers.0", 1), ("layers.1", 0), ("mtp.0", 1)):
        held = [table is not None for table in where(made, f"{prefix}.ffn.experts.0.w1.weight")]
        assert held == [place == 0, place == 1]
    check_sums(checkpoint, made)


def test_smaller_groups_are_offered_where_a_format_has_them() -> None:
    def offered(text: str, cols: int, ways: int) -> list[str]:
        demand = Demand("x.weight", (256, cols), parse_format(text), Rule(1), 1)
        return helpful_formats([(demand, ways)])

    assert offered("int4-awq", 384, 4) == ["int4-awq[group_size=32]", "fp8-channel"]
    assert offered("int4", 256, 4) == ["int4[group_size=64]", "fp8-channel"]
    assert offered("fp8-block", 320, 4) == ["fp8-channel"]
    assert offered("bf16", 321, 2) == []


def test_blocks_of_the_flattened_weight_may_forbid_all_cuts_along_columns() -> None:
    nf4 = Demand("x.weight", (64, 96), parse_format("nf4"), Rule(1), 1)
    assert nf4.allows(1) and not nf4.allows(2)
    assert nf4.problem(2) == (
        "x.weight [64, 96]: 96 columns / 2 = 48: nf4 cannot be cut along columns: one step of "
        "weight.absmax is 64 values of the flattened weight, and 64 do not divide 96 columns"
    )


def test_settings_of_experts_that_say_nothing_are_refused(v3: Checkpoint, tmp_path: Path) -> None:
    even: dict[str | None, list[int]] = {None: [1] * 256}
    dense = write_sparse(tmp_path / "dense", GQA, llama())
    cases: list[tuple[Checkpoint, Parallel, dict[str, Any], str]] = [
        (v3, Parallel(4, 4), {"redundant": -1}, "^-1 redundant experts: expected at least 0"),
        (v3, Parallel(4, 4), {"redundant": 4}, "^4 redundant experts: give their loads as well"),
        (v3, Parallel(4, 1), {"loads": even}, "no routed experts to place into 1 group"),
        (dense, Parallel(4, 1), {"loads": even}, "no routed experts to place in .*dense"),
        (v3, Parallel(4, 4), {"loads": even, "redundant": 260},
         "^260 redundant experts of 256: one copy of each at most; give up to 256"),
        (v3, Parallel(4, 4), {"loads": {None: [1] * 8}},
         "^expert loads: 8 counts for the 256 experts of model.layers.3.mlp.experts"),
        (v3, Parallel(4, 4), {"loads": {"3": [1] * 256, "9": [1] * 256}},
         "no counts for layer 4 .2 layers are missing and 1 have no experts here.; give every"),
        (v3, Parallel(4, 4), {"loads": {"3": [1], "4": [1], "5": [1], "0": [1]}},
         "expert loads: no layer 0 .0 layers are missing and 1 have no"),
        (v3, Parallel(4, 4), {"replicate": ["norm"]}, "^replicate norm: expected one of embedding"),
        (dense, Parallel(4, 1), {"replicate": ["shared_expert"]},
         "^replicate shared_expert: .*dense has no tensor of this role"),
        (v3, Parallel(1, 4), {"replicate": ["attention"]}, "with tp 1 it is on every rank anyway"),
    ]  # fmt: skip
    for checkpoint, parallel, options, message in cases:
        with pytest.raises(RequantError, match=message):
            split(checkpoint, parallel, **options)


def test_what_a_config_does_not_tell_is_not_guessed(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3}
    checkpoint = write_sparse(tmp_path / "none", config, llama())
    assert split(checkpoint, Parallel(1, 1)).summary()["legal_ranks"] == [1]
    with pytest.raises(FormatError, match="256 rows / 2: config.json has None num_attention_heads"):
        split(checkpoint, Parallel(2, 1))
    wrong = write_sparse(tmp_path / "wrong", GQA | {"num_attention_heads": 7}, llama())
    with pytest.raises(FormatError, match="config.json has 7 num_attention_heads, so heads cannot"):
        split(wrong, Parallel(2, 1))


def test_an_expert_that_is_missing_is_noticed(tmp_path: Path) -> None:
    config = GQA | {"model_type": "qwen3_moe"}
    specs = {
        name: spec for name, spec in llama(experts=4).items() if ".1.mlp.experts.2." not in name
    }
    checkpoint = write_sparse(tmp_path / "model", config, specs)
    with pytest.raises(FormatError, match="1.mlp.experts: has 3 experts, numbered up to 3; down"):
        split(checkpoint, Parallel(2, 2))


def test_inputs_scaled_column_by_column_are_not_cut(tmp_path: Path) -> None:
    specs = llama() | {"model.layers.0.self_attn.o_proj.input_scale": plain(256, dtype="F32")}
    checkpoint = write_sparse(tmp_path / "model", GQA, specs)
    with pytest.raises(FormatError, match="o_proj.input_scale tells of single columns"):
        split(checkpoint, Parallel(2, 1))
