"""The model card of a conversion: what the Hub reads of it, and what people do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

from requant.convert.documents import SourceTexts
from requant.convert.inspect import inspect
from requant.convert.plan import make_plan
from requant.convert.recipe import default_recipe
from requant.convert.run import Runtime, convert
from requant.convert.source import Checkpoint
from requant.hub.model_card import model_card

HUB = {"source_repo": "deepseek-ai/DeepSeek-V3", "source_revision": "e815299" + "0" * 33}
VERDICT: dict[str, Any] = {
    "ok": True,
    "kl": 0.00723361,
    "max_kl": 0.1,
    "top1_agreement": 0.9326171875,
    "perplexity_source": 22.918871,
    "perplexity_output": 23.051542,
    "tokens": 2048,
    "mtp": None,
    "tensors": {"checked": 173, "identical": 37, "exact": 5, "worst": []},
    "problems": [],
}
SOURCE_CARD = """---
license: mit
language:
- no
- en
tags: [conversational]
released: 2026-13-45
---
# DeepSeek-V3

The source's own words.
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> Path:
    """A conversion to INT4."""
    folder = tmp_path_factory.mktemp("card") / "out"
    plan = make_plan(Checkpoint.open(source("fp8-block")), default_recipe("int4[group_size=32]"))
    convert(plan, folder, Runtime(torch.device("cpu"), 1))
    return folder


@pytest.fixture(scope="module")
def manifest(out: Path) -> dict[str, Any]:
    found = json.loads((out / "requant.json").read_bytes())
    assert isinstance(found, dict)
    return found


def metadata(card: str, tmp_path: Path) -> dict[str, Any]:
    """What the Hub's client finds in the card."""
    path = tmp_path / "README.md"
    path.write_text(card)
    found = metadata_load(path)
    assert found is not None
    assert ModelCard(card).data.to_dict() == found
    return found


def test_metadata(manifest: dict[str, Any], tmp_path: Path) -> None:
    texts = SourceTexts(SOURCE_CARD, "Apache License\n  Version 2.0")
    card = model_card(manifest | HUB, repo="org/name", source=texts)

    assert metadata(card, tmp_path) == {
        "base_model": "deepseek-ai/DeepSeek-V3",
        "base_model_relation": "quantized",
        "quantized_by": "requant",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["no", "en"],  # not False, which YAML 1.1 makes of it
        "license": "mit",
        "tags": ["requant", "int4"],
    }
    assert card.endswith(
        "## Card of the source model\n\n# DeepSeek-V3\n\nThe source's own words.\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("                Apache License\n          Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("DEEPSEEK LICENSE AGREEMENT", "other"),
        ("", None),
    ],
)
def test_a_licence_from_its_text(
    manifest: dict[str, Any], tmp_path: Path, text: str, expected: str | None
) -> None:
    card = model_card(manifest, repo="org/name", source=SourceTexts("# no metadata", text))
    found = metadata(card, tmp_path)
    assert found.get("license") == expected
    assert found.get("license_link") == ("LICENSE" if expected else None)
    assert "base_model" not in found and "base_model_relation" not in found


def test_a_licence_with_a_name_of_its_own(manifest: dict[str, Any], tmp_path: Path) -> None:
    front = "license: other\nlicense_name: deepseek\nlicense_link: LICENSE-MODEL"
    texts = SourceTexts(f"---\n{front}\n---\n", "MIT License")
    found = metadata(model_card(manifest, repo="org/name", source=texts), tmp_path)
    keys = ("license", "license_name", "license_link")
    assert [found[key] for key in keys] == ["other", "deepseek", "LICENSE-MODEL"]


@pytest.mark.parametrize(
    "front", ["- a list", "a: [", "[" * 2000, "license: [1, 2]\nlanguage: {a: b}\npipeline_tag:"]
)
def test_front_matter_that_cannot_be_used(
    manifest: dict[str, Any], tmp_path: Path, front: str
) -> None:
    texts = SourceTexts(f"---\n{front}\n---\nwords\n")
    card = model_card(manifest, repo="org/name", source=texts)
    found = metadata(card, tmp_path)
    assert sorted(found) == ["library_name", "pipeline_tag", "quantized_by", "tags"]
    assert found["pipeline_tag"] == "text-generation" and card.endswith("\n\nwords\n")


def test_tables(manifest: dict[str, Any], out: Path) -> None:
    roles = inspect(Checkpoint.open(out))["roles"]
    card = model_card(manifest, VERDICT, repo="org/name", roles=roles)

    counts = roles["routed_expert"]["formats"]["int4[group_size=32]"]
    nbytes = f"{counts['bytes'] / 1000:.2f} kB"
    row = f"| routed_expert | int4[group_size=32] | {counts['tensors']} | {nbytes} |"
    for line in (
        row,
        "| verdict | PASS |",
        "| KL divergence | 0.007234 nats per token, limit 0.1 |",
        "| top-1 agreement | 93.26 % |",
        "| perplexity | source 22.92, output 23.05 |",
        "| tokens | 2048 |",
        "| tensors | 173 compared: 37 bit-identical, 5 stored differently with equal values |",
    ):
        assert f"\n{line}\n" in card
    assert "| MTP |" not in card
    count = manifest["formats"]["int4[group_size=32]"]
    row = f"\n| int4[group_size=32] | {count} |\n"
    assert row not in card and row in model_card(manifest, repo="org/name")


def test_what_was_not_measured_or_failed(manifest: dict[str, Any]) -> None:
    assert "Not measured: `requant verify" in model_card(manifest, repo="org/name")
    measured: dict[str, Any] = dict.fromkeys(
        ["kl", "max_kl", "top1_agreement", "perplexity_source", "perplexity_output"]
    )
    nothing = VERDICT | measured | {"ok": False, "tokens": 0, "problems": ["layer 3: wrong"]}
    card = model_card(manifest, nothing, repo="org/name")
    assert "| verdict | FAIL |" in card and "\n- layer 3: wrong\n" in card
    assert "KL divergence" not in card and "perplexity" not in card
    mtp = {"mtp": {"kl": None, "top1_agreement": None, "tokens": 7}}
    card = model_card(manifest, nothing | mtp | {"tokens": 7}, repo="org/name")
    assert "| KL divergence | not a number |" in card
    assert "| MTP | KL not a number, top-1 agreement unknown |" in card


def test_how_it_was_made(manifest: dict[str, Any]) -> None:
    card = model_card(manifest | HUB, repo="org/name")
    source = f"deepseek-ai/DeepSeek-V3@{HUB['source_revision']}"
    assert f"\nrequant convert {source} OUT --to 'int4[group_size=32]'\n" in card
    facts = (manifest["requant"], manifest["torch"], manifest["recipe_sha256"])
    assert all(str(fact) in card for fact in (*facts, HUB["source_revision"]))

    own = manifest | {"source": "/home/ada/models/tiny", "recipe": "/home/ada/mine.toml"}
    card = model_card(own, repo="org/name", recipe='[roles]\nattention = "int4"\n')
    assert "\nrequant convert tiny OUT --recipe mine.toml\n" in card and "/home" not in card
    assert '```toml\n[roles]\nattention = "int4"\n```' in card


def test_how_to_load_it(manifest: dict[str, Any], tmp_path: Path) -> None:
    card = model_card(manifest, repo="org/name@int4")
    assert "\nint4: loaded by transformers, vLLM, SGLang.\n" in card
    assert "\nrequant run org/name@int4 'The capital of France is'\n" in card
    assert "\nvllm serve org/name --revision int4\n" in card
    only = manifest | {"formats": {"int8-block": 3, "int4": 2, "bf16": 1, "I64": 1}}
    card = model_card(only, repo="org/name")
    assert "vllm serve" not in card
    assert metadata(card, tmp_path)["tags"] == ["requant", "int8", "int4"]
    assert "\npython -m sglang.launch_server --model-path org/name\n" in card


def test_texts_of_a_folder(source: Callable[[str], Path], tmp_path: Path) -> None:
    found = SourceTexts.read(source("fp8-block"))
    assert found == SourceTexts("# model\n", "MIT\n")
    assert (found.body, found.licenses["license"]) == ("# model", "other")
    assert SourceTexts.read(tmp_path) == SourceTexts()
