"""The model card of a conversion: README.md with the metadata that the Hub reads.

Source: https://huggingface.co/docs/hub/model-cards, and huggingface_hub's ModelCardData.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from requant.convert.documents import SourceTexts
from requant.errors import FormatError
from requant.output import size
from requant.quant import Codec, parse_format
from requant.quant.plain import Plain

#: What says how a format is laid out, and is no tag that people search for.
_LAYOUTS = frozenset(["block", "channel", "tensor"])
#: How an engine that loads the format is started.
_COMMANDS = {
    "vLLM": "vllm serve {repo}{revision}",
    "SGLang": "python -m sglang.launch_server --model-path {repo}{revision}",
}


def model_card(
    manifest: Mapping[str, Any],
    verdict: Mapping[str, Any] | None = None,
    *,
    repo: str,
    roles: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    source: SourceTexts | None = None,
) -> str:
    """The card of a conversion that goes to `repo`, "org/name[@branch]".

    `manifest`: of requant.json. `verdict`: verify's document. `roles`: as `inspect` tells them of
    the result. `recipe`: the text of a recipe that is more than a format's name.
    """
    source = source or SourceTexts()
    name, _, branch = repo.partition("@")
    parts = [
        f"---\n{_metadata(manifest, source)}\n---",
        f"# {name.rpartition('/')[2]}",
        _summary(manifest),
        "## Formats",
        _formats(manifest, roles),
        "## Quality",
        _quality(verdict),
        "## Loading",
        _loading(manifest, name, branch),
        "## How it was made",
        _making(manifest, recipe),
    ]
    if source.body:
        parts += ["## Card of the source model", source.body]
    return "\n\n".join(parts) + "\n"


def _metadata(manifest: Mapping[str, Any], source: SourceTexts) -> str:
    keys = ("language", "library_name", "pipeline_tag")
    told = {key: source.metadata[key] for key in keys if _is_text(source.metadata.get(key))}
    base = manifest.get("source_repo")
    names = [codec.name for codec in _codecs(manifest)]
    tags = ["requant", *(tag for name in names for tag in name.split("-") if tag not in _LAYOUTS)]
    relation = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    facts = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **told,
        **source.licenses,
        **relation,
        "quantized_by": "requant",
        "tags": list(dict.fromkeys(tags)),
    }
    return ModelCardData(**facts).to_yaml().strip()


def _summary(manifest: Mapping[str, Any]) -> str:
    base = manifest.get("source_repo")
    what = f"[{base}](https://huggingface.co/{base})" if base else _label(manifest)
    return (
        f"{what} in {manifest['format']}: {size(manifest['written_bytes'])} in "
        f"{_count(manifest['files'], 'file')}. Of {_count(manifest['tensors'], 'tensor')}, "
        f"{manifest['requantized_tensors']} were requantized, {manifest['lossless_tensors']} "
        f"stored differently with equal values, and {manifest['identical_tensors']} copied "
        "bit-identical."
    )


def _formats(manifest: Mapping[str, Any], roles: Mapping[str, Any] | None) -> str:
    if roles is None:
        rows = [(name, str(count)) for name, count in manifest["formats"].items()]
        return _table(("format", "tensors"), rows)
    return _table(
        ("role", "format", "tensors", "size"),
        [
            (role, name, str(counts["tensors"]), size(counts["bytes"]))
            for role, facts in roles.items()
            for name, counts in facts["formats"].items()
        ],
    )


def _quality(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "Not measured: `requant verify SOURCE OUTPUT` compares both."
    limit = "" if verdict["max_kl"] is None else f", limit {verdict['max_kl']:g}"
    kl = verdict["kl"]
    rows = [("verdict", "PASS" if verdict["ok"] else "FAIL")]
    if verdict["tokens"]:
        told = f"{_number(kl)} nats per token" if kl is not None else "not a number"
        perplexities = (verdict["perplexity_source"], verdict["perplexity_output"])
        rows += [
            ("KL divergence", told + limit),
            ("top-1 agreement", _percent(verdict["top1_agreement"])),
            ("perplexity", "source {}, output {}".format(*map(_number, perplexities))),
            ("tokens", str(verdict["tokens"])),
        ]
    if verdict["mtp"] is not None:
        agreement = _percent(verdict["mtp"]["top1_agreement"])
        rows.append(("MTP", f"KL {_number(verdict['mtp']['kl'])}, top-1 agreement {agreement}"))
    tensors = verdict["tensors"]
    rows.append(
        (
            "tensors",
            f"{tensors['checked']} compared: {tensors['identical']} bit-identical, "
            f"{tensors['exact']} stored differently with equal values",
        )
    )
    parts = [
        "Source and output, run side by side by `requant verify`:",
        _table(("measure", "value"), rows),
        "\n".join(f"- {problem}" for problem in verdict["problems"]),
    ]
    return "\n\n".join(filter(None, parts))


def _loading(manifest: Mapping[str, Any], repo: str, branch: str) -> str:
    codecs = _codecs(manifest)
    lines = [f"{codec.name}: loaded by {codec.loaded_by}." for codec in codecs]
    revision = f" --revision {branch}" if branch else ""
    commands = [f"requant run {repo}{'@' + branch if branch else ''} 'The capital of France is'"]
    commands += [
        command.format(repo=repo, revision=revision)
        for engine, command in _COMMANDS.items()
        if all(engine in codec.loaded_by for codec in codecs)
    ]
    return "\n\n".join([*lines, _code("bash", "\n".join(commands))])


def _making(manifest: Mapping[str, Any], recipe: str | None) -> str:
    name = PurePath(manifest["recipe"]).name
    form = manifest["format"]
    chosen = f"--to '{form}'" if form.partition("[")[0] == name else f"--recipe {name}"
    revision = manifest.get("source_revision")
    base = manifest.get("source_repo")
    where = base or _label(manifest)
    where += f"@{revision}" if base and revision else ""
    versions = [f"requant {manifest['requant']}, torch {manifest['torch']}"]
    versions += [f"source revision `{revision}`"] if revision else []
    versions += [f"recipe SHA-256 `{manifest['recipe_sha256']}`"]
    parts = [
        _code("bash", f"requant convert {where} OUT {chosen}"),
        "\n".join(f"- {line}" for line in versions),
        "requant.json lists the SHA-256 of every file that was read and written.",
    ]
    return "\n\n".join([*parts, *([_code("toml", recipe.strip())] if recipe else [])])


def _codecs(manifest: Mapping[str, Any]) -> list[Codec]:
    """The formats that are more than a dtype."""
    return [codec for codec in _parsed(manifest["formats"]) if not isinstance(codec, Plain)]


def _parsed(names: Mapping[str, int]) -> Iterator[Codec]:
    for name in names:
        try:
            yield parse_format(name)
        except FormatError:  # a dtype, such as I64, of a tensor that is no weight
            continue


def _label(manifest: Mapping[str, Any]) -> str:
    """The source's name, without where it lies on somebody's disk."""
    return PurePath(manifest["source"]).name


def _is_text(value: object) -> bool:
    """Whether a value is text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"
