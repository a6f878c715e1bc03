"""Loading: the same bits from an artifact and from quantizing while loading, on any mesh; and all that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.config.scheme import Scheme
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.errors import (
    CheckpointError,
    ConfigError,
    MeshError,
    NonFiniteWeightError,
    StorageError,
    UnsupportedModelError,
)
from podquant.families.registry import read_model_config
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import advise, make_mesh
from podquant.quantize.weights import quantize_weight
from podquant.weights.load import load_weights
from podquant.weights.source import open_source

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
Arrays = dict[tuple[str | int, ...], np.ndarray[Any, Any]]


def load(uri: str, rules: str | None = None, tp: int = 1, dtype: str = "float32") -> Arrays:
    """Every array on the devices, by its path."""
    source = open_source(uri, load_quantization_config(rules) if rules else None)
    model = Model(
        read_model_config(source.config, source.tensors), source.scheme_of, Numerics(dtype, "cpu"), make_mesh("cpu", tp)
    )
    seen: list[int] = []
    weights = load_weights(model, source, seen.append)
    source.close()
    assert 0 < sum(seen) <= source.num_bytes
    return {leaf.path: np.asarray(array) for leaf, array in zip(model.leaves, weights, strict=True)}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(GOLDENS / "llama", tmp_path / "model")
    return tmp_path / "model"


def to_artifact(checkpoint: Path, rules: str, target: Path, tp_size: int = 1) -> str:
    source = Checkpoint.open(str(checkpoint))
    plan = plan_conversion(source, load_quantization_config(rules), source_name="golden", tp_size=tp_size)
    convert(source, plan, str(target), threads=1)
    source.close()
    return str(target)


@pytest.mark.parametrize("rules", ["int8.yaml", "fp8_w8a8.yaml"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen1"])
def test_an_artifact_and_quantizing_on_the_way_give_the_same_bits(tmp_path: Path, name: str, rules: str) -> None:
    expected = load(str(GOLDENS / name), rules)
    for tp_size in (1, 4):
        artifact = to_artifact(GOLDENS / name, rules, tmp_path / f"artifact-{tp_size}", tp_size)
        for tp in (1, 2):
            found = load(artifact, tp=tp)
            assert found.keys() == expected.keys()
            for path, array in found.items():
                assert array.tobytes() == expected[path].tobytes(), path


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("rules", ["int8.yaml", "fp8.yaml"])
def test_experts_of_an_artifact_are_those_quantized_on_the_way(tmp_path: Path, rules: str, tp: int) -> None:
    expected = load(str(GOLDENS / "qwen3_moe"), rules, tp=tp)
    found = load(to_artifact(GOLDENS / "qwen3_moe", rules, tmp_path / "artifact", 2), tp=tp)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert array.tobytes() == expected[path].tobytes(), path


def test_experts_lie_in_the_order_of_their_numbers() -> None:
    disk = load_file(GOLDENS / "mixtral" / "model.safetensors")
    found = load(str(GOLDENS / "mixtral"), tp=2)
    prefix = "model.layers.2.block_sparse_moe.experts"
    for projection, name, axis in (("gate_proj", "w1", 0), ("up_proj", "w3", 0), ("down_proj", "w2", 1)):
        weights = found["segments", 0, "layers", "mlp", "experts", projection, "weight"]
        for expert in range(8):
            whole = np.concatenate(weights[2, :, expert], axis=axis)
            np.testing.assert_array_equal(whole, disk[f"{prefix}.{expert}.{name}.weight"].astype(np.float32))


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "qwen3_moe", tmp_path / "model")
    lost = "model.layers.1.mlp.experts.6.up_proj.weight"
    rewrite_tensors(lambda tensors: tensors.pop(lost))(tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"tensor {lost} is missing".replace(".", r"\.")):
        load(str(tmp_path / "model"))


def test_experts_of_a_layer_are_quantized_alike(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("quantization:\n  moe: {weight_dtype: int8}\n  ignored_layers: ['re:.*experts\\.3\\.up_proj']\n")
    with pytest.raises(UnsupportedModelError, match=r"experts\.3\.up_proj is not quantized as .*experts\.0\.up_proj"):
        load(str(GOLDENS / "qwen3_moe"), str(rules))


def test_weights_that_share_a_tensor_share_its_scale_blocks(tmp_path: Path) -> None:
    """64 rows of q, 32 of k, 32 of v in one tensor, quantized in blocks of 24 rows: two of the blocks are shared."""
    rule = "{module_path: '.*layers.*', weight_dtype: int8, weight_block_size: [24, 8]}"
    (tmp_path / "rules.yaml").write_text(f"quantization: {{dense: {{rules: [{rule}]}}}}")
    rules = str(tmp_path / "rules.yaml")
    artifact = to_artifact(GOLDENS / "phi3", rules, tmp_path / "artifact", tp_size=2)
    loads = [load(str(GOLDENS / "phi3"), rules), load(artifact), load(artifact, tp=2)]
    disk = load_file(GOLDENS / "phi3" / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    whole = quantize_weight(disk, Scheme("int8", weight_block_size=(24, 8)))
    scales = np.repeat(whole.scales, 24, axis=0)
    for found in loads:
        for name, first, last in (("q_proj", 0, 64), ("k_proj", 64, 96), ("v_proj", 96, 128)):
            module = ("segments", 0, "layers", "self_attn", name)
            np.testing.assert_array_equal(found[*module, "weight"][1], whole.codes[first:last])
            np.testing.assert_array_equal(found[*module, "weight_scale"][1], scales[first:last])
        for path, array in found.items():
            assert array.tobytes() == loads[0][path].tobytes(), path


def as_internlm2(directory: Path) -> Path:
    """The golden Llama under InternLM 2's names, q, k and v in one tensor: those of each key/value head together."""
    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    tensors = load_file(GOLDENS / "llama" / "model.safetensors")
    heads = config["num_key_value_heads"]
    words = {"lm_head": "output", "embed_tokens": "tok_embeddings", "self_attn.o_proj": "attention.wo"}
    words |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    words |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    found = {}
    for name in tensors:
        before, _, after = name.partition("q_proj")
        if after:
            parts = [tensors[f"{before}{part}_proj.weight"] for part in "qkv"]
            rows = [part.reshape(heads, -1, part.shape[1]) for part in parts]
            found[before.replace("self_attn", "attention") + "wqkv.weight"] = np.concatenate(rows, axis=1).reshape(
                -1, parts[0].shape[1]
            )
        elif not ("k_proj" in name or "v_proj" in name):
            found[next((name.replace(a, b) for a, b in words.items() if a in name), name)] = tensors[name]
    directory.mkdir()
    changes = {"architectures": ["InternLM2ForCausalLM"], "bias": False}
    (directory / "config.json").write_text(json.dumps(config | changes))
    save_file(found, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_weights_that_take_turns_in_a_tensor_are_found(tmp_path: Path) -> None:
    """8 query and 4 key/value heads of 8 rows: 16 rows of q, 8 of k, 8 of v, four times; in blocks of 24 rows."""
    checkpoint = as_internlm2(tmp_path / "checkpoint")
    (tmp_path / "rules.yaml").write_text(
        "quantization: {dense: {rules: [{module_path: '.*wqkv', weight_dtype: int8, weight_block_size: [24, 8]},"
        " {module_path: '.*', weight_dtype: int8}]}}"
    )
    plain, int8 = load(str(GOLDENS / "llama")), load(str(GOLDENS / "llama"), "int8.yaml")
    blocks = load(str(checkpoint), str(tmp_path / "rules.yaml"))
    artifact = to_artifact(checkpoint, "int8.yaml", tmp_path / "artifact", 2)
    pairs = [
        (plain, load(str(checkpoint))),
        (plain, load(str(checkpoint), tp=2)),
        (int8, load(artifact)),
        (int8, load(artifact, tp=4)),
        (blocks, load(str(checkpoint), str(tmp_path / "rules.yaml"), tp=4)),
    ]
    for expected, found in pairs:
        assert found.keys() == expected.keys()
        for path, array in found.items():
            assert array.tobytes() == expected[path].tobytes(), path
    tensor = load_file(checkpoint / "model.safetensors")["model.layers.1.attention.wqkv.weight"]
    whole = quantize_weight(tensor, Scheme("int8", weight_block_size=(24, 8)))
    rows = np.arange(128).reshape(4, 32)[:, 16:24].reshape(-1)
    path = ("segments", 0, "layers", "self_attn", "k_proj")
    np.testing.assert_array_equal(blocks[*path, "weight"][1], whole.codes[rows])
    np.testing.assert_array_equal(blocks[*path, "weight_scale"][1], whole.scales[rows // 24])


def test_a_tensor_that_several_weights_share_has_the_rows_of_all(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "phi3", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.2.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name][:-8]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \[128, 48\] .* got \[120, 48\]"):
        load(str(tmp_path / "model"))


def test_weights_are_those_of_the_file() -> None:
    disk = load_file(GOLDENS / "llama" / "model.safetensors")
    found = load(str(GOLDENS / "llama"), dtype="bfloat16")
    layers = found["segments", 0, "layers", "mlp", "down_proj", "weight"]
    for layer in range(3):
        np.testing.assert_array_equal(layers[layer], disk[f"model.layers.{layer}.mlp.down_proj.weight"])
    np.testing.assert_array_equal(found["lm_head", "weight"], disk["lm_head.weight"])


def test_key_value_heads_are_copied_where_there_are_fewer_than_shards() -> None:
    one, eight = (load(str(GOLDENS / "qwen2"), tp=tp) for tp in (1, 8))
    for leaf in ("weight", "bias"):
        path = ("segments", 0, "layers", "self_attn", "k_proj", leaf)
        heads = one[path].reshape(3, 4, 8, -1)
        np.testing.assert_array_equal(eight[path].reshape(3, 8, 8, -1), np.repeat(heads, 2, axis=1))


def test_rules_by_layer_give_segments(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "quantization:\n  dense:\n    rules:\n"
        "      - {module_path: '.*layers\\.1\\..*', weight_dtype: null}\n"
        "      - {module_path: '.*', weight_dtype: int8}\n"
    )
    found = load(str(GOLDENS / "llama"), str(rules))
    dtypes = [found["segments", s, "layers", "mlp", "up_proj", "weight"].dtype.name for s in range(3)]
    assert dtypes == ["int8", "float32", "int8"]


def rewrite_config(**change: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return apply


def rewrite_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return apply


def poison(tensors: dict[str, Any]) -> None:
    weight = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    weight[7, 3] = np.nan
    tensors["model.layers.1.mlp.up_proj.weight"] = weight


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (rewrite_tensors(lambda t: t.pop("model.norm.weight")), CheckpointError, r"model\.norm\.weight is missing"),
        (rewrite_config(vocab_size=500), CheckpointError, r"expected shape \[500, 64\] .* got \[512, 64\]"),
        (rewrite_config(architectures=["GPT2LMHeadModel"]), UnsupportedModelError, "GPT2LMHeadModel"),
        (rewrite_tensors(poison), NonFiniteWeightError, r"model\.safetensors: model\.layers\.1\.mlp\.up_proj.* row 7"),
    ],
    ids=["missing", "shape", "architecture", "nan"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    copy: Path, change: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    change(copy)
    with pytest.raises(kind, match=message):
        load(str(copy), "int8.yaml")


def test_rules_that_contradict_an_artifact_are_refused(tmp_path: Path) -> None:
    artifact = to_artifact(GOLDENS / "llama", "int8.yaml", tmp_path / "artifact")
    with pytest.raises(ConfigError, match=r"contradicts its manifest: .* is int8 there and float8_e4m3fn by the rules"):
        load(artifact, "fp8.yaml")
    assert load(artifact, "int8.yaml").keys() == load(artifact).keys()


def test_a_mesh_that_cannot_be() -> None:
    with pytest.raises(MeshError, match="this process has 8"):
        make_mesh("cpu", 9)
    with pytest.raises(MeshError, match="no tpu devices"):
        make_mesh("tpu", 1)
    with pytest.raises(MeshError, match="sizes that fit this model: 1, 2, 4, 8"):
        load(str(GOLDENS / "llama"), tp=3)


@pytest.mark.parametrize(
    ("kind", "scheme", "count"),
    [
        ("TPU v6 lite", Scheme("int8", "int8"), 0),
        ("TPU v5 lite", Scheme("float8_e4m3fn", "float8_e4m3fn"), 1),
        ("TPU v5 lite", Scheme("float8_e4m3fn"), 0),
        ("TPU7x", Scheme("int8", "float8_e4m3fn"), 1),
        ("cpu", Scheme("int8"), 0),
    ],
)
def test_advice_names_the_types_a_chip_does_not_multiply(kind: str, scheme: Scheme, count: int) -> None:
    lines = advise(kind, [scheme])
    assert len(lines) == count
    assert all(kind in line for line in lines)


@pytest.mark.parametrize("rules", [None, "int8.yaml"])
def test_a_checkpoint_that_changes_while_it_is_loaded_is_refused(copy: Path, rules: str | None) -> None:
    """Even by the last window, and where neither size nor time of the file tells."""
    file = copy / "model.safetensors"
    source = open_source(str(copy), load_quantization_config(rules) if rules else None)
    config = read_model_config(source.config, source.tensors)
    model = Model(config, source.scheme_of, Numerics("float32", "cpu"), make_mesh("cpu", 1))
    read = 0

    def change_at_the_end(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if read == source.num_bytes:
            before = file.stat()
            file.write_bytes(file.read_bytes())
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(StorageError, match=r"model\.safetensors: changed while it was loaded"):
        load_weights(model, source, change_at_the_end)
    source.close()
    assert read == source.num_bytes
