"""What makes a checkpoint unfit is found from headers and config.json, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.conversion.contents import read_contents
from podquant.errors import CheckpointError, UnsupportedModelError

MATRIX = np.ones((96, 32), np.float32)
BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (
        {"lm_head.qweight": np.ones((96, 1), np.float32)},
        {"quantization_config": {"quant_method": "awq"}},
        UnsupportedModelError,
        "quantization_config with .* awq.* serve it",
    ),
    (
        {"lm_head.qweight": np.ones((96, 1), np.float32)},
        {"compression_config": {"bits": 4}},
        UnsupportedModelError,
        "compression_config with .* an unnamed method",
    ),
    (
        {"lm_head.weight_scale": np.ones((96, 1), np.float32)},
        {},
        UnsupportedModelError,
        "holds lm_head.weight_scale F32 .*, as a checkpoint quantized by compressed-tensors does",
    ),
    ({}, {"num_hidden_layers": 3}, CheckpointError, r"layer model.layers.2 is missing: .* num_hidden_layers: 3"),
    (
        {"model.layers.1.mlp.up_proj.weight": None},
        {},
        CheckpointError,
        r"model.layers.1.mlp.up_proj.weight is missing: model.layers.0 has it",
    ),
    ({"lm_head.weight": None}, {}, CheckpointError, "lm_head.weight is missing: .* tie_word_embeddings: false"),
    (
        {"lm_head.weight": MATRIX},
        {"tie_word_embeddings": True},
        CheckpointError,
        r"ties lm_head.weight to model.embed_tokens.weight, but they are F32 \[96, 32\] and BF16 \[96, 32\]",
    ),
]


@pytest.mark.parametrize(("changes", "config", "error", "message"), BAD)
def test_unfit_checkpoints_are_refused(
    make_source: Callable[..., Any],
    changes: dict[str, Any],
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    source = make_source(changes, **config)
    with pytest.raises(error, match=message) as caught:
        read_contents(Checkpoint.open(str(source.path)))
    assert str(source.path) in str(caught.value)


def test_layers_that_differ_on_purpose_are_no_loss(make_source: Callable[..., Any]) -> None:
    """A dense first layer and sparse others, as DeepSeek has: each has something that the other lacks."""
    source = make_source(
        {"model.layers.1.mlp.up_proj.weight": None, "model.layers.1.mlp.experts.0.up_proj.weight": MATRIX}
    )
    assert "model.layers.1.mlp.experts.0.up_proj" in read_contents(Checkpoint.open(str(source.path))).modules


@pytest.mark.parametrize("config", [{"num_nextn_predict_layers": 1}, {}])
def test_layers_that_predict_further_tokens_are_left_out(
    make_source: Callable[..., Any], config: dict[str, Any]
) -> None:
    """DeepSeek-V3 counts 61 layers and stores a 62nd, which only speculative decoding runs."""
    extra = {f"model.layers.1.{name}.weight": MATRIX for name in ("eh_proj", "mlp.up_proj")}
    source = make_source({**extra, "mtp.fc.weight": MATRIX}, num_hidden_layers=1, **config)
    contents = read_contents(Checkpoint.open(str(source.path)))
    names = [*contents.tensors, *contents.modules]
    assert not any(name.startswith(("model.layers.1.", "mtp.")) for name in names)
    assert any(name.startswith("model.layers.0.") for name in contents.tensors)


@pytest.mark.parametrize(
    ("says", "tied"), [({"tie_word_embeddings": True}, True), ({"tie_word_embeddings": None}, False)]
)
def test_a_tied_head_on_disk_is_redundant(make_source: Callable[..., Any], says: dict[str, Any], tied: bool) -> None:
    contents = read_contents(Checkpoint.open(str(make_source(**says).path)))
    assert contents.tied is tied
    assert ("lm_head.weight" in contents.tensors) is not tied
    assert ("lm_head" in contents.modules) is not tied
    assert (contents.redundant is not None) is tied


def test_modules_are_the_weight_matrices_in_order(source: Any) -> None:
    contents = read_contents(Checkpoint.open(str(source.path)))
    assert list(contents.modules)[:3] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert "model.norm" not in contents.modules
    assert len(contents.modules) == 2 * 7 + 2
    assert len(contents.tensors) == 2 * 9 + 2 + 3
