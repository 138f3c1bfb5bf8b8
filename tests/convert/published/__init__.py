"""The config.json of ten published models, beside this file; each tells all sizes of its model.

| file | source |
|---|---|
| DeepSeek-V3, -V3.2, -V4-Flash, Kimi-K2-Instruct, Qwen3-235B-A22B, gpt-oss-120b | as published, \
from the copies in github.com/ai-dynamo/aiconfigurator (095f58a), model_configs |
| DeepSeek-R1-Distill-Qwen-32B | as published, from copies in deployment guides |
| DeepSeek-R1-Distill-Llama-70B | reconstructed: that of Meta-Llama-3.1-70B, the same sizes |
| GLM-4.6 | reconstructed from copies in several loaders' tests, which agree on every size |
| DeepSeek-V2-Lite | reconstructed: sizes of DeepSeek's inference/configs/config_16B.json |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def published_config(name: str) -> dict[str, Any]:
    """The config.json of a model by the name of its repository."""
    config: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text())
    return config
