"""Which files go along with the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from podquant.checkpoint.index import Checkpoint

CARD = """---
license: apache-2.0
---
![figure](figures/loss.png "Loss") and <img src="assets/logo%20big.svg"> and [paper](./docs/paper.pdf#page=3)
[elsewhere](https://example.org/a.png) [weights](original/consolidated.pth) [out](../secret.txt) [gone](none.png)
"""

COPIED = """LICENSE NOTICE.txt README.md USE_POLICY.md added_tokens.json additional_chat_templates/tool.jinja
assets/logo_big.svg chat_template.jinja chat_template.json docs/paper.pdf figures/loss.png generation_config.json
merges.txt modeling_x.py preprocessor_config.json processor_config.json qwen.tiktoken special_tokens_map.json
spiece.model tekken.json tokenization_x.py tokenizer.json tokenizer.model tokenizer_config.json
video_preprocessor_config.json vocab.json"""

OTHERS = """.cache/tokenizer.json .git/tokenizer.json .tokenizer.json adapter_model.safetensors figures/other.png
model.gguf onnx/tokenizer.json original/consolidated.pth original/tokenizer.model podquant.json pytorch_model.bin
tokenizer.bin tokenizer.safetensors"""


def test_files_that_belong_to_a_model_go_along(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    copied = [name.replace("logo_big", "logo big") for name in COPIED.split()]
    for name in copied + OTHERS.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text(CARD)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.other_files == tuple(sorted(copied))
    checkpoint.close()
