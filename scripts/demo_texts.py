"""The prose files of the demo checkpoint: chat template, model card, licence and notice."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)

LICENSE = """\
Copyright the requant authors

The weights, configuration and tokenizer in this folder are licensed under the Apache License,
Version 2.0 (the "License"); you may not use them except in compliance with the License.
You may obtain a copy of the License at

    https://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the License
is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express
or implied. See the License for the specific language governing permissions and limitations under
the License.
"""

NOTICE = """\
requant demo checkpoint

The model and its tokenizer were trained on text from CPython 3.11: the Language Reference topics
in `pydoc_data/topics.py` and the docstrings and comments of the standard library.
`heldout.txt`, one folder up, is an excerpt of that text.

    Copyright (c) 2001-2023 Python Software Foundation. All rights reserved.

That text is licensed under the Python Software Foundation License Version 2 (PSF-2.0), given in
LICENSE.python.txt; some modules of the standard library carry further permissive notices.
"""

CARD = """\
---
license: apache-2.0
language: en
tags: [deepseek_v3, fp8, test]
---

# requant demo checkpoint

A very small DeepSeek-V3 that exists to be converted, run and verified by requant's examples and
tests. It has learnt the look of Python documentation and nothing else: it writes fluent nonsense,
its statements about Python are wrong, and it is no use as a language model.

| | |
|---|---|
| architecture | DeepSeek-V3: MLA, sigmoid router with groups and correction bias, one MTP layer |
| size | hidden 256, 4 layers (1 dense, 3 MoE) + 1 MTP, 8 routed experts (top 3) + 1 shared |
| storage | FP8 E4M3 in 128x128 blocks; embeddings, head, norms, router and `eh_proj` in BF16 |
| tokenizer | byte-level BPE, 1024 tokens; insert `<|begin_of_text|>` yourself, it adds none |
| context | trained on windows of 512 tokens |
| text | CPython 3.11 docstrings, comments and reference topics (see NOTICE), about 2.3 MB |
| steps | {steps} of 4096 tokens, AdamW, bf16 autocast, two CPU cores |

Held-out text (`heldout.txt`, {tokens} tokens, {bytes_per_token:.2f} bytes each, measured in
float32 in windows of 512 tokens behind a BOS, weights as stored here):

| | |
|---|---|
| loss | {loss:.4f} nats per token (before FP8: {loss_before:.4f}) |
| MTP loss | {mtp_loss:.4f} nats per token: t[i+2] from the main state of t[i] and from t[i+1] |
| MTP and main model name the same next token | {mtp_agreement:.1%} |

One docstring in six was also shown as the answer to `<|User|>Explain NAME.<|Assistant|>`, so the
chat template is not foreign to the model.

`scripts/train_demo.py` in the requant repository made this folder.
"""


def model_card(figures: dict[str, object]) -> str:
    """Fill the model card with the measured figures."""
    return CARD.format(**figures)
