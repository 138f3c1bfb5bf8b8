"""`inspect` and `plan` on header-only copies of ten published models, against their own figures."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from requant.convert.inspect import inspect
from requant.convert.inspect_table import render
from requant.convert.plan import Plan, make_plan
from requant.convert.recipe import load_recipe
from requant.convert.source import Checkpoint
from requant.errors import FormatError
from tests.convert.published_models import FILES, write_published


@dataclass(frozen=True)
class Published:
    """What a model's publisher says, and what its repository holds.

    `parameters` and `active` as printed. `elements`: of all weights, MTP included, as the Hub
    counts safetensors (scales left out); `nbytes`: the index's total_size; `tensors`: those of the
    index. None where no copy of the figure was at hand.
    """

    parameters: str
    active: str | None
    cache: int
    mha: int
    elements: int | None = None
    nbytes: int | None = None
    tensors: int | None = None


#: Figures of model cards and reports. DeepSeek-V3: README_WEIGHTS.md of its repository; gpt-oss:
#: arXiv 2508.10925, table 1; GLM-4.6: arXiv 2508.06471; V2-Lite: arXiv 2405.04434, appendix B.
#: Kimi-K2: 1T of the model card. Its report (arXiv 2507.20534) says 1.04T, which is 17 B, about one
#: MTP layer, more than the published files hold; they also hold 61 buffers of RoPE (6,832 bytes).
PUBLISHED = {
    "DeepSeek-V2-Lite": Published(
        "15.7B", "2.4B", 31_104, 276_480, 15_706_484_224, 31_412_968_448, 5_291
    ),
    "DeepSeek-V3": Published(
        "671B", "36.7B", 70_272, 4_997_120, 684_489_845_504, 688_574_839_360, 91_991
    ),
    "DeepSeek-V3.2": Published("671B", "37B", 85_888, 4_997_120, 685_355_329_792),
    "DeepSeek-V4-Flash": Published("284B", "13B", 6_880, 5_636_096, None, 159_609_485_896, 69_187),
    "Kimi-K2-Instruct": Published(
        "1T", "32B", 70_272, 2_498_560, 1_026_408_232_448, 1_029_173_256_720 - 6_832, 139_644 - 61
    ),
    "GLM-4.6": Published("355B", "32B", 376_832, 4_521_984, 356_785_898_816),
    "Qwen3-235B-A22B": Published(
        "235B", "22B", 192_512, 3_080_192, 235_093_634_560, 470_187_269_120, 36_945
    ),
    "gpt-oss-120b": Published("116.83B", "5.13B", 36_864, 589_824, None, 65_248_815_744),
    "DeepSeek-R1-Distill-Llama-70B": Published(
        "70.6B", None, 327_680, 2_621_440, 70_553_706_496, 141_107_412_992, 723
    ),
    "DeepSeek-R1-Distill-Qwen-32B": Published(
        "32.8B", None, 262_144, 1_310_720, 32_763_876_352, 65_527_752_704, 771
    ),
}


@pytest.fixture(scope="module", params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    yield write_published(tmp_path_factory.mktemp("published") / name, name)


@pytest.fixture(scope="module")
def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return inspect(checkpoint)


def agrees(number: float, printed: str) -> bool:
    """Within 1 %, or printed with the same digits, rounded or cut: 2.45 B is published as 2.4B."""
    value = number / {"B": 1e9, "T": 1e12}[printed[-1]]
    digits = printed[:-1]
    scale: int = 10 ** len(digits.partition(".")[2])
    same = digits in (f"{round(value * scale) / scale:g}", f"{math.floor(value * scale) / scale:g}")
    return same or abs(value / float(digits) - 1) < 0.01


def test_parameters_are_the_published_ones(name: str, facts: dict[str, Any]) -> None:
    published = PUBLISHED[name]
    assert agrees(facts["parameters"], published.parameters)
    if published.active is not None:
        assert agrees(facts["active_parameters"], published.active)
    else:  # dense: all but the rows of the embedding that are not looked up
        unread = facts["roles"]["embedding"]["parameters"] * (1 - 1 / facts["vocabulary_size"])
        assert facts["active_parameters"] == facts["parameters"] - round(unread)
    assert facts["parameters"] == sum(
        row["parameters"] for role, row in facts["roles"].items() if role != "mtp"
    )


def test_sizes_are_those_of_the_repository(
    name: str, checkpoint: Checkpoint, facts: dict[str, Any]
) -> None:
    published = PUBLISHED[name]
    assert facts["files"] == FILES[name][2] - FILES[name][1] + 1
    if published.elements is not None:
        assert facts["parameters"] + facts["mtp_parameters"] == published.elements
    if published.nbytes is not None:
        assert facts["total_bytes"] == published.nbytes
    if published.tensors is not None:
        assert sum(len(w.tensors) for w in checkpoint.weights.values()) == published.tensors


def test_rows_add_up(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    for table in (facts["formats"], facts["roles"]):
        assert sum(row["bytes"] for row in table.values()) == facts["total_bytes"]
        assert sum(row["tensors"] for row in table.values()) == len(checkpoint.weights)
    for role in facts["roles"].values():
        assert sum(row["bytes"] for row in role["formats"].values()) == role["bytes"]
    stream = io.StringIO()
    Console(file=stream, width=120).print(render(facts))
    assert all(len(line.rstrip()) < 100 for line in stream.getvalue().splitlines()[1:])
    assert all(role in stream.getvalue() for role in facts["roles"])
    assert json.dumps(facts, allow_nan=False)


def test_what_a_model_is(name: str, facts: dict[str, Any]) -> None:
    whole = ("model_type", "quantization", "layers", "experts", "context_length", "vocabulary_size")
    found = tuple(facts[key] for key in whole)
    formats = {role: list(row["formats"]) for role, row in facts["roles"].items()}
    match name:
        case "DeepSeek-V3":
            assert found == ("deepseek_v3", "fp8", 61, 256, 163_840, 129_280)
            assert facts["roles"]["routed_expert"]["tensors"] == 58 * 256 * 3
            assert formats["routed_expert"] == formats["attention"] == ["fp8-block"]
            assert facts["roles"]["router_bias"]["formats"] == {
                "fp32": {"tensors": 58, "bytes": 58 * 256 * 4}
            }
        case "DeepSeek-V4-Flash":
            assert found == ("deepseek_v4", "fp8", 43, 256, 1_048_576, 129_280)
            assert [text.partition("[")[0] for text in formats["routed_expert"]] == ["mxfp4"]
            assert formats["router"] == ["bf16", "I64"]
        case "gpt-oss-120b":
            assert found == ("gpt_oss", "mxfp4", 36, 128, 131_072, 201_088)
            assert facts["roles"]["routed_expert"]["tensors"] == 36 * 128 * 3
            assert formats["attention"] == ["bf16"]


def test_cache_and_what_other_attention_would_need(name: str, facts: dict[str, Any]) -> None:
    assert facts["kv_cache_bytes_per_token"] == PUBLISHED[name].cache
    assert facts["kv_cache_alternatives"]["mha"] == PUBLISHED[name].mha
    assert facts["kv_cache_bytes_full_context"] >= facts["context_length"] * PUBLISHED[name].cache


def test_compute_is_twice_what_a_token_is_multiplied_with(facts: dict[str, Any]) -> None:
    """Active parameters but norms, biases and the row of the embedding: less than 1 %."""
    assert 0.99 < facts["flops_per_token"] / (2 * facts["active_parameters"]) < 1
    assert facts["flops_per_token_full_context"] > facts["flops_per_token"]


def test_mtp_is_told_apart(name: str, facts: dict[str, Any]) -> None:
    predicting = {"DeepSeek-V3", "DeepSeek-V3.2", "DeepSeek-V4-Flash", "GLM-4.6"}
    assert facts["mtp_layers"] == (name in predicting)
    assert (facts["mtp_parameters"] > 0) == (name in predicting)


def test_publishers_count_differently(name: str, facts: dict[str, Any]) -> None:
    """The conventions that `requant.convert.parameters` names, each within 1 % of its figure."""
    ends = {role: facts["roles"][role]["parameters"] for role in ("embedding", "lm_head")}
    match name:
        case "GLM-4.6":  # neither embeddings, nor head; MTP in the total
            total = facts["parameters"] - sum(ends.values()) + facts["mtp_parameters"]
            assert total == pytest.approx(355e9, rel=0.001)
            assert facts["active_parameters"] - ends["lm_head"] == pytest.approx(32e9, rel=0.01)
        case "Qwen3-235B-A22B":  # embedding and head
            active = facts["active_parameters"] + ends["embedding"]
            assert active == pytest.approx(22e9, rel=0.01)
        case "DeepSeek-V3":  # its MTP layer, "11.5B unique", without its copies
            unique = facts["mtp_parameters"] - sum(ends.values())
            assert unique == pytest.approx(11.5e9, rel=0.01)
        case "Kimi-K2-Instruct":  # multiplications that a count of its headers' matrices gave
            assert facts["flops_per_token"] == 2 * 31_686_066_176


#: The default INT4 groups do not divide the widths of these.
REFUSED = {
    "DeepSeek-V2-Lite": "layers.0.mlp.down_proj.weight: group size 128 does not divide 10944",
    "gpt-oss-120b": "layers.0.self_attn.q_proj.weight: group size 128 does not divide 2880",
}


@pytest.mark.slow
def test_plan_is_exact_or_explains(name: str, checkpoint: Checkpoint) -> None:
    recipe = load_recipe("int4")
    if name in REFUSED:
        with pytest.raises(FormatError, match=REFUSED[name]):
            make_plan(checkpoint, recipe)
        return
    plan = make_plan(checkpoint, recipe)
    by_role = written_by_role(plan)
    headers = sum(len(file.header) for file in plan.files)
    assert plan.written_bytes == headers + sum(by_role.values())
    assert set(by_role) == {weight.role for weight in checkpoint.weights.values()}
    assert sorted(file.name for file in plan.files) == sorted(checkpoint.files)
    experts = [w for w in checkpoint.weights.values() if w.role == "routed_expert"]
    elements = sum(math.prod(w.shape) for w in experts)
    # Half a byte, a BF16 scale for 128, and 16 bytes that tell the shape.
    assert by_role["routed_expert"] == elements // 2 + elements // 64 + 16 * len(experts)


def written_by_role(plan: Plan) -> Counter[str]:
    found: Counter[str] = Counter()
    for file in plan.files:
        for piece in file.pieces:
            nbytes = sum(spec.nbytes for spec in piece.specs.values())
            found[piece.weight.source.role] += nbytes
    return found
