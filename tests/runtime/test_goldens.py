"""Logits of tiny checkpoints of every family, in every mode, against those transformers gives (see tests/data/goldens).

The modes with quantized activations cannot be held to a difference: where a value lies on the edge between two codes,
the order of a sum decides, and the reference moves as much when it is computed in float64. They are held to the
distributions they give, and to the effect of quantization they show over all checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.convert.plan import plan_conversion
from podquant.convert.run import convert
from podquant.model.attention import KVCache
from podquant.model.families import read_model_config
from podquant.model.matmul import Numerics
from podquant.runtime.load import load_weights
from podquant.runtime.mesh import make_mesh
from podquant.runtime.programs import CacheShape, Model, step_positions
from podquant.runtime.source import WeightSource, open_source

Array = np.ndarray[Any, np.dtype[Any]]
Logits = Callable[..., Array]

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
NAMES = (
    "llama",
    "llama3-rope",
    "mistral-window",
    "qwen2",
    "qwen2-mha",
    "qwen3",
    "gemma2",
    "gemma3",
    "qwen1",
)
VARIANTS = ("gemma", "gemma3-global", "granite", "olmo2", "phi3", "qwen1-long", "smollm3")
"""Smaller ones, of a detail each: two rotations, layers without one, prompts past the trained length, norms behind."""
MOE_NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3")

MODES: Mapping[str, str | None] = {
    "none": None,
    "int8": "int8_keep_embedding.yaml",
    "fp8": "fp8_keep_embedding.yaml",
    "int8_all": "int8.yaml",
    "int8_w8a8": "int8_w8a8_keep_embedding.yaml",
    "fp8_w8a8": "fp8_w8a8_keep_embedding.yaml",
}
"""Each mode of the reference, and the shipped rules that say the same."""

EXACT_MODES = ("none", "int8", "fp8", "int8_all")
MOST_KL = {"int8_w8a8": 1e-3, "fp8_w8a8": 3e-3}
MOST_KL_MOE = {"int8_w8a8": 5e-3, "fp8_w8a8": 2e-2}
"""A rounding that flips can flip a route."""
LEAST_CORRELATION = {"int8": 0.85, "int8_all": 0.85, "int8_w8a8": 0.85, "fp8": 0.90, "fp8_w8a8": 0.90}
TP_SIZES = (1, 2, 4)
SHARDS = [(name, mode, 1, 1) for name in MOE_NAMES for mode in MODES]
SHARDS += [(name, mode, 4, 2) for name in MOE_NAMES for mode in MODES]
SHARDS += [
    (name, mode, tp, ep)
    for name in ("qwen2_moe", "glm4_moe", "deepseek_v2", "deepseek_v3")
    for mode in ("int8", "int8_w8a8")
    for tp, ep in ((2, 1), (2, 2), (4, 1), (4, 4))
]
"""(checkpoint, mode, tp, ep): on how many devices, and in how many groups experts are shared out among them."""
PAGE_SIZE = 16


@cache
def reference(name: str) -> Mapping[str, Array]:
    with np.load(GOLDENS / name / "reference.npz") as arrays:
        return dict(arrays)


def open_on_load(name: str, mode: str) -> WeightSource:
    rules = MODES[mode]
    return open_source(str(GOLDENS / name), load_quantization_config(rules) if rules else None)


def open_artifact(name: str, mode: str, directory: Path) -> WeightSource:
    rules = MODES[mode]
    assert rules is not None
    checkpoint = Checkpoint.open(str(GOLDENS / name))
    plan = plan_conversion(checkpoint, load_quantization_config(rules), source_name=name)
    target = str(directory / name / mode)
    convert(checkpoint, plan, target, threads=1)
    checkpoint.close()
    return open_source(target)


def load(source: WeightSource, tp: int, ep: int = 1) -> tuple[Model, tuple[jax.Array, ...]]:
    config, numerics = read_model_config(source.config), Numerics("float32", "cpu")
    model = Model(config, source.scheme_of, numerics, make_mesh("cpu", tp), ep)
    return model, load_weights(model, source)


def all_logits(model: Model, weights: tuple[jax.Array, ...], tokens: Array) -> Array:
    """The logits at every position of [B, T] token ids, computed in one step: [B, T, V]."""
    batch, length = tokens.shape
    shape = CacheShape(1 + batch * 16, PAGE_SIZE, batch, 256)
    page_table = 1 + np.arange(batch * shape.table_width, dtype=np.int32).reshape(batch, -1)
    keys, values, _ = model.cache_arrays(shape)

    def run(weights: tuple[jax.Array, ...], cache: KVCache, tokens: jax.Array) -> jax.Array:
        decoder = model.decoder(weights)
        starts, lengths = jnp.zeros(batch, jnp.int32), jnp.full(batch, length, jnp.int32)
        at = step_positions(model, shape, starts, lengths, jnp.asarray(page_table), length)
        hidden, _ = decoder.hidden(tokens, cache, at)
        return decoder.logits(hidden)

    specs = tuple(sharding.spec for sharding in model.shardings)
    cache = KVCache(*(jnp.zeros(array.shape, array.dtype, device=array.sharding) for array in (keys, values)))
    mapped = jax.shard_map(
        run,
        mesh=model.mesh,
        in_specs=(specs, KVCache(keys.sharding.spec, values.sharding.spec), PartitionSpec()),
        out_specs=PartitionSpec(None, "tp"),
        check_vma=False,
    )
    # A hundred programs that run once: what LLVM would do to make them fast takes longer than running them.
    program = jax.jit(mapped).lower(weights, cache, tokens).compile({"xla_backend_optimization_level": 0})
    logits = np.asarray(program(weights, cache, tokens))
    return logits[:, : model.config.vocab_size].reshape(batch, length, -1)


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Logits:
    """Logits of a golden in a mode: on one device from an artifact, on several quantized on load."""
    directory = tmp_path_factory.mktemp("artifacts")

    @cache
    def compute(name: str, mode: str, tp: int, ep: int = 1) -> Array:
        source = open_on_load(name, mode)
        model, weights = load(source, tp, ep)
        source.close()
        if tp == 1 and MODES[mode]:
            artifact = open_artifact(name, mode, directory)
            model, converted = load(artifact, tp)
            artifact.close()
            for leaf, once, again in zip(model.leaves, converted, weights, strict=True):
                assert np.asarray(once).tobytes() == np.asarray(again).tobytes(), leaf.path
            weights = converted
        return all_logits(model, weights, reference(name)["input_ids"])

    return compute


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mean_kl(expected: Array, got: Array) -> float:
    """KL(expected ‖ got) per position in nats."""
    p, q = log_softmax(expected), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference(logits: Logits, name: str, mode: str, tp: int) -> None:
    difference = np.abs(logits(name, mode, tp) - reference(name)[f"logits_{mode}"])
    assert difference.max() <= 2e-3


@pytest.mark.parametrize("cell", [("none", 4), ("int8_all", 1), ("fp8", 2)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_the_reference(logits: Logits, name: str, cell: tuple[str, int]) -> None:
    difference = np.abs(logits(name, *cell) - reference(name)[f"logits_{cell[0]}"])
    assert difference.max() <= 2e-3


@pytest.mark.parametrize("mode", MOST_KL)
@pytest.mark.parametrize("name", VARIANTS)
def test_distributions_of_variants_equal_the_reference(logits: Logits, name: str, mode: str) -> None:
    assert mean_kl(reference(name)[f"logits_{mode}"], logits(name, mode, 2)) <= MOST_KL[mode]


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("mode", MOST_KL)
@pytest.mark.parametrize("name", NAMES)
def test_distributions_equal_the_reference(logits: Logits, name: str, mode: str, tp: int) -> None:
    assert mean_kl(reference(name)[f"logits_{mode}"], logits(name, mode, tp)) <= MOST_KL[mode]


@pytest.mark.parametrize(("name", "mode", "tp", "ep"), SHARDS)
def test_logits_of_experts_equal_the_reference(logits: Logits, name: str, mode: str, tp: int, ep: int) -> None:
    expected, got = reference(name)[f"logits_{mode}"], logits(name, mode, tp, ep)
    if mode in MOST_KL_MOE:
        assert mean_kl(expected, got) <= MOST_KL_MOE[mode]
    else:
        assert np.abs(got - expected).max() <= 2e-3


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("mode", LEAST_CORRELATION)
def test_the_effect_of_quantization_is_the_references(logits: Logits, mode: str, tp: int) -> None:
    def effects(of: Callable[[str], Array]) -> Array:
        return np.concatenate([(of(name) - reference(name)["logits_none"]).ravel() for name in NAMES])

    expected = effects(lambda name: reference(name)[f"logits_{mode}"])
    got = effects(lambda name: logits(name, mode, tp))
    assert np.corrcoef(expected, got)[0, 1] >= LEAST_CORRELATION[mode]


def test_the_measure_tells_unquantized_activations(logits: Logits) -> None:
    """The bound on the correlation would be worth nothing if weight-only logits passed it too."""
    expected = np.concatenate([(reference(n)["logits_fp8_w8a8"] - reference(n)["logits_none"]).ravel() for n in NAMES])
    weight_only = np.concatenate([(logits(n, "fp8", 1) - reference(n)["logits_none"]).ravel() for n in NAMES])
    assert np.corrcoef(expected, weight_only)[0, 1] < LEAST_CORRELATION["fp8_w8a8"] - 0.1
