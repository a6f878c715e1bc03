"""An artifact and what is exported of it give the same logits; so does an artifact that lost its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.artifact.export import export_artifact
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.weights.quantized_source import QuantizedSource
from podquant.weights.source import open_source
from tests.engine.test_goldens import GOLDENS, load

FP8_BLOCKS = "quantization:\n  weight_block_size: [32, 80]\n  dense:\n    rules:\n" + (
    "      - {module_path: '.*(lm_head|embed_tokens)', weight_dtype: null}\n"
    "      - {module_path: '.*', weight_dtype: float8_e4m3fn}\n"
)
FP8_EXPERTS = FP8_BLOCKS.replace("[32, 80]", "[16, 8]") + "  moe: {weight_dtype: float8_e4m3fn}\n"


def to_artifact(golden: str, rules: str, place: Path) -> Path:
    path = rules
    if "\n" in rules:
        path = str(place / "rules.yaml")
        Path(path).write_text(rules)
    checkpoint = Checkpoint.open(str(GOLDENS / golden))
    plan = plan_conversion(checkpoint, load_quantization_config(path), source_name="golden")
    convert(checkpoint, plan, str(place / "artifact"), threads=1)
    checkpoint.close()
    return place / "artifact"


def arrays(place: Path, tp: int) -> tuple[list[Any], list[Any]]:
    """What the programs are compiled for, and what they are given."""
    source = open_source(str(place))
    assert isinstance(source, QuantizedSource) != (place / "podquant.json").exists()
    model, weights = load(source, tp)
    source.close()
    # A lookup quantizes no activations: what is said of them counts only where the table is the head as well.
    head = "model.embed_tokens" if source.config["tie_word_embeddings"] else "lm_head"
    schemes = [source.scheme_of(name) for name in ("model.layers.0.mlp.up_proj", head)]
    return [*model.leaves, schemes], [np.asarray(array) for array in weights]


@pytest.mark.parametrize(
    ("golden", "rules", "form", "tp"),
    [
        ("llama", "int8.yaml", "pack-quantized", 2),
        ("qwen2", "int8_keep_embedding.yaml", "pack-quantized", 1),
        ("llama", FP8_BLOCKS, "fp8-block", 2),
        ("qwen3_moe", "int8_keep_embedding.yaml", "pack-quantized", 1),
        ("deepseek_v3", FP8_EXPERTS, "fp8-block", 2),
    ],
)
def test_what_is_exported_loads_as_the_artifact_does(
    tmp_path: Path, golden: str, rules: str, form: Any, tp: int
) -> None:
    artifact = to_artifact(golden, rules, tmp_path)
    export_artifact(str(artifact), str(tmp_path / "out"), form=form)
    expected, found = arrays(artifact, tp), arrays(tmp_path / "out", tp)
    assert found[0] == expected[0]
    for one, other in zip(expected[1], found[1], strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("golden", ["llama", "qwen2"])
@pytest.mark.parametrize("rules", ["int8_w8a8.yaml", "fp8_w8a8_keep_embedding.yaml"])
def test_an_artifact_without_its_manifest_is_a_quantized_checkpoint(tmp_path: Path, golden: str, rules: str) -> None:
    """The section of config.json alone says what the manifest says, tied embeddings and activations included."""
    artifact = to_artifact(golden, rules, tmp_path)
    expected = arrays(artifact, 1)
    (artifact / "podquant.json").unlink()
    found = arrays(artifact, 1)
    assert found[0] == expected[0]
    for one, other in zip(expected[1], found[1], strict=True):
        assert one.tobytes() == other.tobytes()
