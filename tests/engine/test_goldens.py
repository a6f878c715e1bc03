"""Logits of tiny checkpoints of every family, in every mode, against those transformers gives (see tests/data/goldens).

The modes with quantized activations cannot be held to a difference: where a value lies on the edge between two codes,
the order of a sum decides, and the reference moves as much when it is computed in float64. They are held to the
distributions they give, and to the effect of quantization they show over all checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.config.scheme import CacheDtype
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.families.registry import read_model_config
from podquant.model.batch import flat_batch
from podquant.model.kv_cache import Cache
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.weights.load import load_weights
from podquant.weights.source import WeightSource, open_source

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, np.dtype[Any]]


class Cell(NamedTuple):
    """A checkpoint in a mode on a layout."""

    name: str
    mode: str
    tp: int
    ep: int


Logits = Callable[[Cell], Array]

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

MOST_DIFFERENCE = 2e-3
MOST_KL = {"int8_w8a8": 1e-3, "fp8_w8a8": 3e-3}
MOST_KL_MOE = {"int8_w8a8": 5e-3, "fp8_w8a8": 2e-2}
"""A rounding that flips can flip a route."""
LEAST_CORRELATION = {"int8": 0.85, "int8_all": 0.85, "int8_w8a8": 0.85, "fp8": 0.90, "fp8_w8a8": 0.90}

LAYOUTS = ((1, 1), (2, 1), (4, 1))
"""(tp, ep): on how many devices, and in how many groups experts are shared out among them."""
MOE_LAYOUTS = (((1, 1), (4, 2)), ((1, 1), (2, 2)), ((4, 1), (4, 4)))
"""The same for those with experts, which take turns."""
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


def load(source: WeightSource, tp: int, ep: int = 1, dtype: str = "float32") -> tuple[Model, tuple[jax.Array, ...]]:
    config, numerics = read_model_config(source.config, source.tensors), Numerics(dtype, "cpu")
    model = Model(config, source.scheme_of, numerics, make_mesh("cpu", tp), ep)
    return model, load_weights(model, source)


def all_logits(model: Model, weights: tuple[jax.Array, ...], tokens: Array, cache_dtype: CacheDtype = "auto") -> Array:
    """The logits at every position of [B, T] token ids, computed in one step: [B, T, V]."""
    batch, length = tokens.shape
    shape = CacheShape(1 + batch * 16, PAGE_SIZE, batch, 256, cache_dtype)
    page_table = 1 + np.arange(batch * shape.table_width, dtype=np.int32).reshape(batch, -1)
    arrays = model.cache_arrays(shape)

    def run(weights: tuple[jax.Array, ...], cache: Cache, tokens: jax.Array) -> jax.Array:
        decoder = model.decoder(weights)
        starts, lengths = jnp.zeros(batch, jnp.int32), jnp.full(batch, length, jnp.int32)
        table = jnp.asarray(page_table)
        pages = {"page_size": PAGE_SIZE, "pages_per_layer": shape.num_pages}
        at = flat_batch(model.config, batch * length, starts, lengths, lengths, table, **pages)
        hidden, _ = decoder.hidden(tokens, cache, at)
        return decoder.logits(hidden)

    specs = tuple(sharding.spec for sharding in model.shardings)
    cache = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), arrays)
    mapped = jax.shard_map(
        run,
        mesh=model.mesh,
        in_specs=(specs, jax.tree.map(lambda array: array.sharding.spec, arrays), PartitionSpec()),
        out_specs=PartitionSpec(None, "tp"),
        check_vma=False,
    )
    tokens = tokens.reshape(-1)
    # A hundred programs that run once: what LLVM would do to make them fast takes longer than running them.
    program = jax.jit(mapped).lower(weights, cache, tokens).compile({"xla_backend_optimization_level": 0})
    logits = np.asarray(program(weights, cache, tokens), np.float32)
    return logits[:, : model.config.vocab_size].reshape(batch, length, -1)


def compute(name: str, mode: str, tp: int, ep: int, directory: Path) -> Array:
    """Logits of a golden in a mode: on one device from an artifact below `directory`, on several quantized on load."""
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


def spread(names: Sequence[str], step: int, layouts: Sequence[Sequence[tuple[int, int]]]) -> list[Cell]:
    """Each checkpoint in every n-th mode, the next one in the modes beside, each on the next of its layouts."""
    cells = []
    for i, name in enumerate(names):
        turn = layouts[i % len(layouts)]
        modes = list(MODES)[i % step :: step]
        cells += [Cell(name, mode, *turn[(i // step + j) % len(turn)]) for j, mode in enumerate(modes)]
    return cells


DENSE_CELLS = spread(NAMES, 2, [LAYOUTS])
CELLS = [*DENSE_CELLS, *spread(VARIANTS, 3, [LAYOUTS]), *spread(MOE_NAMES, 3, MOE_LAYOUTS)]
"""What is tested. Each checkpoint has two or three modes and layouts; each mode has all of `LAYOUTS`; on one device an
artifact is converted and has the same bits. `python -m tests.benchmarks.goldens` computes everything with everything.
"""


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Logits:
    directory = tmp_path_factory.mktemp("artifacts")
    return cache(lambda cell: compute(cell.name, cell.mode, cell.tp, cell.ep, directory))


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mean_kl(expected: Array, got: Array) -> float:
    """KL(expected ‖ got) per position in nats."""
    p, q = log_softmax(expected), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def reference_of(cell: Cell) -> Array:
    return reference(cell.name)[f"logits_{cell.mode}"]


def distance(cell: Cell, got: Array) -> tuple[float, float]:
    """From the reference, and the most that it may be: the largest difference, or the mean KL."""
    expected = reference_of(cell)
    if cell.mode not in MOST_KL:
        return float(np.abs(got - expected).max()), MOST_DIFFERENCE
    return mean_kl(expected, got), (MOST_KL_MOE if cell.name in MOE_NAMES else MOST_KL)[cell.mode]


def effects(cells: Iterable[Cell], of: Callable[[Cell], Array]) -> Array:
    """What quantization changes."""
    return np.concatenate([(of(cell) - reference(cell.name)["logits_none"]).ravel() for cell in cells])


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_logits_equal_the_reference(logits: Logits, cell: Cell) -> None:
    found, most = distance(cell, logits(cell))
    assert found <= most


@pytest.mark.parametrize(
    ("name", "tp", "dtype", "most"),
    [
        ("llama", 2, "int8", 1e-4),
        ("gemma2", 1, "fp8", 1e-3),
        ("mistral-window", 4, "int8", 1e-4),
        ("deepseek_v2", 2, "int8", 1e-3),
        ("qwen3", 1, "fp8", 1e-3),
    ],
)
def test_a_cache_in_8_bits_changes_the_logits_a_little(name: str, tp: int, dtype: CacheDtype, most: float) -> None:
    with closing(open_on_load(name, "none")) as source:
        model, weights = load(source, tp)
    tokens, expected = reference(name)["input_ids"], reference(name)["logits_none"]
    got = all_logits(model, weights, tokens, dtype)
    assert np.abs(got - expected).max() > MOST_DIFFERENCE / 10  # it is in 8 bits
    assert mean_kl(expected, got) <= most


@pytest.mark.parametrize("mode", LEAST_CORRELATION)
def test_the_effect_of_quantization_is_the_references(logits: Logits, mode: str) -> None:
    cells = [cell for cell in DENSE_CELLS if cell.mode == mode]
    correlation = np.corrcoef(effects(cells, reference_of), effects(cells, logits))[0, 1]
    assert correlation >= LEAST_CORRELATION[mode]


def test_the_measure_tells_unquantized_activations(logits: Logits) -> None:
    """The bound on the correlation would be worth nothing if weight-only logits passed it too."""
    weight_only = [cell for cell in DENSE_CELLS if cell.mode == "fp8"]
    expected = effects((cell._replace(mode="fp8_w8a8") for cell in weight_only), reference_of)
    correlation = np.corrcoef(expected, effects(weight_only, logits))[0, 1]
    assert correlation < LEAST_CORRELATION["fp8_w8a8"] - 0.1
