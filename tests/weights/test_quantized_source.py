"""Checkpoints that other software quantized give the logits of their dequantized weights; or are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.config.rules import load_quantization_config
from podquant.errors import CheckpointError, ConfigError, UnsupportedModelError
from podquant.families.registry import read_model_config
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.storage.publication import open_publication
from podquant.weights.load import load_weights
from podquant.weights.source import open_source
from podquant.weights.windows import Limits
from tests.engine.test_goldens import GOLDENS, all_logits, load, mean_kl, reference
from tests.storage.gcs.emulator import GcsEmulator
from tests.weights.quantized_checkpoints import (
    TOKEN,
    Tensors,
    Write,
    blocks,
    compressed,
    group,
    inverse,
    packed,
    read_file,
    rows,
    with_next_token_layer,
    write_file,
    write_pair,
)

SIZE = (32, 80)
FORMS: Mapping[str, tuple[Any, Write]] = {
    "int8": (compressed("int-quantized", group_0=group("int")), rows("int")),
    "int8, bf16 scales of one axis": (
        compressed("int-quantized", group_0=group("int")),
        rows("int", dtype=ml_dtypes.bfloat16, shape=(-1,)),
    ),
    "int8, one scale": (
        compressed("naive-quantized", group_0=group("int", "tensor")),
        rows("int", "tensor", shape=()),
    ),
    "fp8, bf16 scales": (
        compressed("float-quantized", group_0=group("float")),
        rows("float", dtype=ml_dtypes.bfloat16),
    ),
    "fp8, one scale": (
        compressed("float-quantized", group_0=group("float", "tensor")),
        rows("float", "tensor", shape=(1,)),
    ),
    "fp8 blocks": (
        compressed("float-quantized", group_0=group("float", "block", block_structure=list(SIZE))),
        blocks(SIZE, "weight_scale"),
    ),
    "fp8 blocks, groups of activations": (
        compressed(
            "float-quantized",
            group_0=group(
                "float",
                "block",
                {"strategy": "group", "group_size": 80, "dynamic": True, "type": "float"},
                block_structure="32x80",
            ),
        ),
        blocks(SIZE, "weight_scale"),
    ),
    "packed": (compressed("pack-quantized", group_0=group("int")), packed()),
    "packed, strategy unsaid": (
        compressed("pack-quantized", group_0=group("int", group_size=-1, strategy=None)),
        packed(),
    ),
    "inverse": (inverse(SIZE), blocks(SIZE, "weight_scale_inv")),
}


def logits_of(place: Path, tp: int, golden: str = "llama", ep: int = 1) -> Any:
    source = open_source(str(place))
    model, weights = load(source, tp, ep)
    source.close()
    return all_logits(model, weights, reference(golden)["input_ids"])


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_dequantized_weights(tmp_path: Path, form: str) -> None:
    quantized, plain = write_pair(GOLDENS / "llama", tmp_path, *FORMS[form])
    expected = logits_of(plain, 1)
    for tp in (1, 2) if form in ("int8, one scale", "packed", "inverse") else (1,):
        assert np.abs(logits_of(quantized, tp) - expected).max() <= 2e-3
    assert np.abs(expected - reference("llama")["logits_none"]).max() > 1e-2  # quantizing did something


def test_experts_are_served_as_they_are_stored(tmp_path: Path) -> None:
    quantized, plain = write_pair(GOLDENS / "qwen3_moe", tmp_path, *FORMS["int8"])
    expected = logits_of(plain, 1, "qwen3_moe")
    assert np.abs(logits_of(quantized, 2, "qwen3_moe", 2) - expected).max() <= 2e-3
    assert np.abs(expected - reference("qwen3_moe")["logits_none"]).max() > 1e-2


@pytest.mark.slow
def test_deepseek_is_served_as_it_is_published(tmp_path: Path) -> None:
    """In blocks of which an expert's input has several on each device of a group."""
    golden = with_next_token_layer(GOLDENS / "deepseek_v3", tmp_path / "golden")
    quantized, plain = write_pair(golden, tmp_path, inverse((16, 4)), blocks((16, 4), "weight_scale_inv"))
    expected = logits_of(plain, 1, "deepseek_v3")
    for tp, ep in ((1, 1), (4, 2)):
        assert np.abs(logits_of(quantized, tp, "deepseek_v3", ep) - expected).max() <= 2e-3
    assert np.abs(expected - reference("deepseek_v3")["logits_none"]).max() > 1e-2


@pytest.mark.parametrize(("kind", "most_kl"), [("int", 1e-3), ("float", 3e-3)])
def test_activations_are_quantized_where_the_group_says_so(tmp_path: Path, kind: str, most_kl: float) -> None:
    section = compressed(f"{kind}-quantized", group_0=group(kind, activations={**TOKEN, "type": kind}))
    quantized, plain = write_pair(GOLDENS / "llama", tmp_path, section, rows(kind))
    found, expected = logits_of(quantized, 1), logits_of(plain, 1)
    assert mean_kl(expected, found) <= most_kl
    assert np.abs(found - expected).max() > 2e-3


def test_groups_take_modules_by_name_before_pattern_before_class(tmp_path: Path) -> None:
    by_class, by_pattern, by_name = group("int"), group("int", activations={**TOKEN, "type": "int"}), group("int")
    by_pattern["targets"] = ["re:.*self_attn"]
    by_name["targets"] = ["model.layers.0.self_attn.q_proj"]
    by_name["weights"]["strategy"] = "tensor"
    section = compressed("int-quantized", a=by_class, b=by_pattern, c=by_name)

    def write(module: str, weight: Any) -> Any:
        strategy = "tensor" if module == by_name["targets"][0] else "channel"
        return rows("int", strategy)(module, weight)

    source = open_source(str(write_pair(GOLDENS / "llama", tmp_path, section, write)[0]))
    schemes = [
        source.scheme_of(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up")
    ]
    assert [scheme and scheme.label for scheme in schemes] == ["int8", "int8_w8a8", None]
    assert source.scheme_of("model.layers.2.mlp.up_proj") is not None
    assert source.scheme_of("lm_head") is None
    source.close()


def static(**activations: Any) -> Any:
    return compressed("int-quantized", group_0=group("int", activations={**TOKEN, "type": "int", **activations}))


REFUSED: list[tuple[Any, str]] = [
    (
        {"quant_method": "awq", "bits": 4},
        "quant_method 'awq' is not supported. podquant serves compressed-tensors in 8",
    ),
    ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method 'bitsandbytes'"),
    ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
    ({"bits": 4}, "has no quant_method"),
    (compressed("pack-quantized", g=group("int", "group", num_bits=4, group_size=128)), "g: weights: .* 4-bit int"),
    (compressed("pack-quantized", g=group("int", "group", group_size=64)), "strategy 'group' with group_size 64"),
    (compressed("int-quantized", g=group("int", symmetric=False)), "asymmetric"),
    (compressed("nvfp4-pack-quantized", g=group("float", num_bits=4)), "in the format 'nvfp4-pack-quantized'"),
    (compressed("marlin-24", g=group("int")), "in the format 'marlin-24'"),
    (static(dynamic=False), r"input_activations: .* static activations \(dynamic: False\)"),
    (static(symmetric=False), "input_activations: .* asymmetric"),
    (static(strategy="tensor"), "input_activations: .* strategy 'tensor'"),
    ({**static(), "kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
    ({**static(), "transform_config": {"config_groups": {}}}, "with transform_config"),
    ({**static(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config"),
    (compressed("int-quantized", g={**group("int"), "output_activations": TOKEN}), "with output_activations"),
    (compressed("int-quantized", g={"targets": ["Linear"]}), "without quantized weights"),
    ({**inverse(SIZE), "activation_scheme": "static"}, "fp8 with activation_scheme: 'static'"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8 without weight_block_size"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, section: Any, message: str) -> None:
    place, _ = write_pair(GOLDENS / "llama", tmp_path, section, rows("int"))
    with pytest.raises(UnsupportedModelError, match=f"config.json: quantization_config: .*{message}"):
        open_source(str(place))


def without(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"model.layers.0.mlp.up_proj.{suffix}"]

    return change


def replaced(suffix: str, by: Callable[[Any], Any]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = f"model.layers.0.mlp.up_proj.{suffix}"
        tensors[name] = by(tensors[name])

    return change


INT, PACKED = FORMS["int8"], FORMS["packed"]
DAMAGE: list[tuple[tuple[Any, Write], Callable[[Tensors], object], str]] = [
    (INT, without("weight_scale"), "up_proj.weight_scale is missing: without it .*up_proj.weight means nothing"),
    (PACKED, without("weight_shape"), "up_proj.weight_shape is missing"),
    (INT, without("weight"), "up_proj.weight_scale has no codes"),
    (INT, replaced("weight_scale", lambda s: s[:-1]), r"expected channel scales of shape \[160, 1\] or \[160\] .* got"),
    (
        INT,
        replaced("weight", lambda w: w.astype(ml_dtypes.float8_e4m3fn)),
        "up_proj.weight, a matrix of I8, .* F8_E4M3",
    ),
    ((PACKED[0], INT[1]), lambda tensors: None, "q_proj.weight_packed, a matrix of I32|weight_packed, a matrix of I32"),
    (({**INT[0], "ignore": ["re:.*up_proj"]}, INT[1]), lambda tensors: None, "does not list it as quantized"),
    (({**INT[0], "ignore": ["re:*"]}, INT[1]), lambda tensors: None, "ignore: 're:\\*' is not a regular expression"),
    (
        ({**INT[0], "ignore": ["re:((.|[a-z])*)*[XYZ]"]}, INT[1]),
        lambda tensors: None,
        r"the regular expression '.*' takes longer than 1 s on the name 'model\.",
    ),
    (
        ({**INT[0], "ignore": ["re:" + "(" * 3000]}, INT[1]),
        lambda tensors: None,
        r"ignore: 're:\(+\.\.\. is not a regular expression",
    ),
    (({**INT[0], "ignore": ["re:" + "a" * 10**6]}, INT[1]), lambda tensors: None, "it has 1,000,003 characters"),
    (({**INT[0], "config_groups": {}}, INT[1]), lambda tensors: None, "config_groups: expected an object with groups"),
    (
        ({**FORMS["inverse"][0], "modules_to_not_convert": ["model.layers.0"]}, FORMS["inverse"][1]),
        lambda tensors: None,
        "model.layers.0.* does not list it as quantized",
    ),
]


@pytest.mark.parametrize(("form", "change", "message"), DAMAGE)
def test_tensors_that_contradict_config_are_refused(
    tmp_path: Path, form: tuple[Any, Write], change: Callable[[Tensors], object], message: str
) -> None:
    place, _ = write_pair(GOLDENS / "llama", tmp_path, *form)
    tensors = read_file(place / "model.safetensors")
    change(tensors)
    write_file(place / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(place))


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    place, _ = write_pair(GOLDENS / "llama", tmp_path, *INT)
    tensors = read_file(place / "model.safetensors")
    scales = tensors["model.layers.0.mlp.up_proj.weight_scale"].copy()
    scales[7] = np.nan
    write_file(place / "model.safetensors", {**tensors, "model.layers.0.mlp.up_proj.weight_scale": scales})
    source = open_source(str(place))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*up_proj\.weight_scale: .* got nan in row 7"):
        load(source, 1)
    source.close()


@pytest.mark.parametrize("form", ["int8", "packed", "inverse"])
def test_quantized_without_a_word_of_it_is_refused(tmp_path: Path, form: str) -> None:
    place, _ = write_pair(GOLDENS / "llama", tmp_path, {}, FORMS[form][1])
    with pytest.raises(UnsupportedModelError, match=r"as a checkpoint quantized by .* does, but config\.json has no"):
        open_source(str(place))


RULES = "quantization:\n  {static}\n  weight_block_size: [32, 80]\n  dense:\n    rules:\n" + (
    "      - {{module_path: '.*(lm_head|embed_tokens)', weight_dtype: null}}\n"
    "      - {{module_path: '.*', weight_dtype: {dtype}, activation_dtype: float8_e4m3fn}}\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RULES.format(static="is_static_checkpoint: true", dtype="float8_e4m3fn"), None),
        (
            RULES.format(static="is_static_checkpoint: true", dtype="int8"),
            r"is float8_e4m3fn\[32,80\] there and int8_a",
        ),
        (RULES.format(static="is_static_checkpoint: false", dtype="float8_e4m3fn"), "already quantized .* leave rules"),
    ],
)
def test_rules_may_say_what_becomes_of_activations(tmp_path: Path, text: str, message: str | None) -> None:
    place, _ = write_pair(GOLDENS / "llama", tmp_path, *FORMS["inverse"])
    (tmp_path / "rules.yaml").write_text(text)
    rules = load_quantization_config(str(tmp_path / "rules.yaml"))
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            open_source(str(place), rules)
        return
    source = open_source(str(place), rules)
    scheme = source.scheme_of("model.layers.1.mlp.down_proj")
    assert scheme is not None
    assert scheme.activation_dtype == "float8_e4m3fn"
    assert source.scheme_of("lm_head") is None
    source.close()


@pytest.mark.parametrize("form", FORMS)
def test_windows_and_shards_give_the_same_arrays(tmp_path: Path, form: str) -> None:
    """Windows of a few rows over four devices (two where blocks do not go into four), and one window on one."""
    place, _ = write_pair(GOLDENS / "llama", tmp_path, *FORMS[form])
    source = open_source(str(place))
    _, expected = load(source, 1)
    config, mesh = (
        read_model_config(source.config, source.tensors),
        make_mesh("cpu", 2 if "blocks" in form or form == "inverse" else 4),
    )
    model = Model(config, source.scheme_of, Numerics("float32", "cpu"), mesh)
    few = Limits(window_bytes=2048, ahead_bytes=8192, gathered_bytes=2048, whole_bytes=100, tile_rows=1)
    for leaf, one, several in zip(model.leaves, expected, load_weights(model, source, limits=few), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(several).tobytes(), leaf.path
    source.close()


@pytest.mark.parametrize("form", ["int8, one scale", "packed"])
def test_every_byte_in_a_bucket_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """What no device asks for (shapes), and what all of them do (one scale for all), adds up to the file's checksum."""
    place, _ = write_pair(GOLDENS / "llama", tmp_path, *FORMS[form])
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        with open_publication("gs://b/model") as publication:
            for path in sorted(place.iterdir(), reverse=True):
                publication.write_small(path.name, path.read_bytes())
            publication.publish()
        here, there = open_source(str(place)), open_source("gs://b/model")
        assert there.wholes
        expected, found = load(here, 1)[1], load(there, 2)[1]
        here.close()
        there.close()
    for one, other in zip(expected, found, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
