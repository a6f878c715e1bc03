"""Latent attention, absorbed and over a paged cache, against its expanded definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME
from podquant.errors import CheckpointError
from podquant.families.config import FULL_ATTENTION, ConfigReader, ModelConfig, RopeConfig, read_rope
from podquant.families.declaration import declare
from podquant.families.deepseek import read_latent
from podquant.families.latent import LatentConfig
from podquant.families.layout import plan_layout
from podquant.families.registry import read_model_config
from podquant.model.axes import spec_of
from podquant.model.batch import flat_batch
from podquant.model.decoder import modules_in
from podquant.model.kv_cache import Cache, KVCache, cache_layout
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.model.mla import LatentAttention
from podquant.model.paged_attention import CHUNK_TOKENS
from podquant.quantize.weights import quantize_weight

Array = np.ndarray[Any, np.dtype[Any]]

HIDDEN, HEADS, TOKENS, PAGE_SIZE = 64, 4, 11, 8
LATENT = LatentConfig(
    q_rank=40, kv_rank=24, nope_dim=16, rope_dim=8, value_dim=12, interleaved=True, score_scale=0.2041
)
ROPE = RopeConfig("default", 10000.0, {})
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "head_dim": LATENT.rope_dim,
}
FP8 = "float8_e4m3fn"


def config_with(latent: LatentConfig) -> ModelConfig:
    return replace(read_model_config(CONFIG, ()), latent=latent)


def weights_of(latent: LatentConfig) -> dict[str, Array]:
    """Weights by module, [out, in], and norms."""
    random = np.random.default_rng(7)
    declared = declare(config_with(latent)).modules[0]
    found = {name.removeprefix("self_attn."): each["weight"] for name, each in declared.items() if "self_attn" in name}
    shapes = {name: each.shape for name, each in found.items() if each.kind != "norm"}
    weights = {name: random.standard_normal(shape, np.float32) * shape[1] ** -0.5 for name, shape in shapes.items()}
    norms = {name: each.shape for name, each in found.items() if each.kind == "norm"}
    return weights | {name: random.uniform(0.5, 1.5, size).astype(np.float32) for name, size in norms.items()}


def rounded(x: Array, scheme: Scheme | None) -> Array:
    """An activation as the scheme's products see it."""
    if scheme is None or scheme.activation_dtype is None:
        return x
    target = BY_NAME[scheme.activation_dtype]
    assert target.qmax is not None
    scale = np.abs(x).max(axis=-1, keepdims=True) / target.qmax
    ratio = np.round(x / scale) if scheme.activation_dtype == "int8" else (x / scale).astype(target.numpy)
    return np.asarray(ratio.astype(np.float64) * scale)


def expected(latent: LatentConfig, weights: dict[str, Array], x: Array, scheme: Scheme | None) -> Array:
    """The layer in float64 with every head's keys and values written out: [T, D]."""

    def linear(name: str, x: Array) -> Array:
        weight = weights[name] if scheme is None else quantize_weight(weights[name], scheme).dequantize()
        return np.asarray(rounded(x, scheme) @ weight.astype(np.float64).T)

    def norm(name: str, x: Array) -> Array:
        return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * weights[name])

    def rotate(x: Array) -> Array:
        half = latent.rope_dim // 2
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        turn = np.exp(1j * angles)[:, None, :]
        pairs = x[..., 0::2] + 1j * x[..., 1::2] if latent.interleaved else x[..., :half] + 1j * x[..., half:]
        return np.concatenate([(pairs * turn).real, (pairs * turn).imag], axis=-1)

    q = (
        linear("q_proj", x)
        if latent.q_rank is None
        else linear("q_b_proj", norm("q_a_layernorm", linear("q_a_proj", x)))
    )
    q = q.reshape(len(x), HEADS, -1)
    compressed = linear("kv_a_proj_with_mqa", x)
    context = norm("kv_a_layernorm", compressed[:, : latent.kv_rank])
    key_value = linear("kv_b_proj", context).reshape(len(x), HEADS, -1)
    keys, values = key_value[..., : latent.nope_dim], key_value[..., latent.nope_dim :]
    scores = np.einsum("tnd,snd->nts", q[..., : latent.nope_dim], keys)
    shared = rotate(compressed[:, None, latent.kv_rank :])[:, 0]
    scores += np.einsum("tnd,sd->nts", rotate(q[..., latent.nope_dim :]), shared)
    scores = np.where(np.tri(len(x), dtype=bool), scores * latent.score_scale, -np.inf)
    probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    y = np.einsum("nts,snd->tnd", probabilities, values)
    return linear("o_proj", y.reshape(len(x), -1))


def arrays_of(path: tuple[Any, ...], shape: tuple[int, ...], weights: dict[str, Array], scheme: Scheme | None) -> Array:
    """A parameter's array of one layer: codes padded to whole blocks, a row of scales for every output channel."""
    weight = weights[path[-2]]
    if weight.ndim == 1 or scheme is None:
        return weight[None]
    quantized = quantize_weight(weight, scheme)
    if path[-1] == "weight":
        codes = quantized.codes.astype(np.float32) if scheme.weight_dtype == FP8 else quantized.codes
        return np.pad(codes, ((0, 0), (0, shape[2] - codes.shape[1])))[None]
    rows = scheme.weight_block_size[0] if scheme.weight_block_size else 1
    return np.repeat(quantized.scales, rows, axis=0)[None, : len(weight)]


def run(
    latent: LatentConfig, weights: dict[str, Array], x: Array, scheme: Scheme | None, tp: int, steps: list[int]
) -> Array:
    """The layer on [T, D], in steps of so many tokens, into a cache in pages of 8: [T, D]."""
    config, mesh = config_with(latent), make_mesh("cpu", tp)
    modules = modules_in(config, declare(config), plan_layout(config, tp), lambda module: scheme, (0, 1))
    module = nnx.eval_shape(lambda: LatentAttention(config, modules, Numerics("float32", "cpu")))
    graph, state = nnx.split(module)
    tree, flat = jax.tree.structure(state), nnx.to_flat_state(state)
    values = [
        arrays_of(path, weight.get_value().shape, weights, scheme).astype(weight.get_value().dtype)
        for path, weight in flat
    ]
    layout = cache_layout(config, HEADS, "auto", "float32")
    width = CHUNK_TOKENS // PAGE_SIZE
    table = jnp.asarray(np.random.default_rng(1).permutation(width).astype(np.int32)[None] + 1)

    def step(values: list[jax.Array], cache: Cache, x: jax.Array, start: jax.Array) -> tuple[jax.Array, Cache]:
        layer = nnx.merge(graph, jax.tree.unflatten(tree, [value[0] for value in values]))
        lengths = jnp.asarray([len(x)], jnp.int32)
        pages = {"page_size": PAGE_SIZE, "pages_per_layer": width + 1}
        at = flat_batch(config, len(x), start, lengths, lengths, table, **pages)
        return layer(x, cache, jnp.int32(0), jnp.int32(FULL_ATTENTION), at)

    specs = [spec_of(weight.axes) for _, weight in flat]
    spec: Any = spec_of(layout.axes)
    cache_spec = KVCache(spec, spec)
    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, cache_spec, PartitionSpec(), PartitionSpec()),
            out_specs=(PartitionSpec(), cache_spec),
            check_vma=False,
        )
    )
    cache = KVCache(
        *(jnp.zeros((width + 1, 1, PAGE_SIZE, size), jnp.float32) for size in (layout.key_dim, layout.value_dim))
    )
    results, start = [], 0
    for length in steps:
        y, cache = mapped(values, cache, x[start : start + length], np.asarray([start], np.int32))
        results.append(np.asarray(y))
        start += length
    return np.concatenate(results)


def check(latent: LatentConfig, scheme: Scheme | None, tp: int, steps: list[int], tolerance: float = 2e-5) -> None:
    weights = weights_of(latent)
    x = np.random.default_rng(3).standard_normal((TOKENS, HIDDEN), np.float32)
    got = run(latent, weights, x, scheme, tp, steps)
    np.testing.assert_allclose(got, expected(latent, weights, x.astype(np.float64), scheme), atol=tolerance, rtol=0)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_rank", [None, 40])
def test_absorbed_attention_is_the_expanded_one(q_rank: int | None, interleaved: bool) -> None:
    check(replace(LATENT, q_rank=q_rank, interleaved=interleaved), None, 1, [TOKENS])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_decoding_after_prefill_gives_the_same_at_any_number_of_shards(tp: int) -> None:
    check(LATENT, None, tp, [6, 1, 3, 1])


@pytest.mark.parametrize("block", [None, (16, 16), (128, 128)])
@pytest.mark.parametrize("dtype", ["int8", FP8])
def test_codes_are_scaled_on_the_side_they_lie_on(dtype: str, block: tuple[int, int] | None) -> None:
    """Blocks of 16 divide neither the rank (24) nor a head's rows (28)."""
    check(LATENT, Scheme(dtype, None, block), 1, [9, 1, 1], 2e-4)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("dtype", ["int8", FP8])
def test_the_latent_is_quantized_as_kv_b_projs_activation(dtype: str, tp: int) -> None:
    check(LATENT, Scheme(dtype, dtype), tp, [9, 1, 1], 2e-4)


def test_the_cache_keeps_one_latent_of_a_token() -> None:
    layout = cache_layout(config_with(LATENT), HEADS, "auto", "bfloat16")
    assert (layout.heads, layout.key_dim, layout.value_dim) == (1, 24 + 8, 0)
    assert spec_of(layout.axes) == PartitionSpec(None, None, None, None)


def test_wide_latents_fill_up_whole_lanes() -> None:
    wide = replace(LATENT, kv_rank=128, q_rank=None)
    assert cache_layout(config_with(wide), HEADS, "auto", "bfloat16").key_dim == 256
    check(wide, None, 1, [9, 1, 1])


def latent_from(**values: Any) -> LatentConfig:
    reader = ConfigReader({"max_position_embeddings": 4096, **values}, "config.json")
    return read_latent(reader, read_rope(reader))


def test_what_config_leaves_out_is_as_transformers_has_it() -> None:
    assert latent_from() == LatentConfig(1536, 512, 128, 64, 128, True, 192**-0.5)
    assert latent_from(q_lora_rank=None).q_rank is None


def test_yarn_sharpens_the_scores() -> None:
    """DeepSeek-V2-Lite: factor 40, mscale_all_dim 0.707, softmax scale 192^-0.5 * 1.2608^2."""
    scaling = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
    assert latent_from(rope_scaling=scaling).score_scale == pytest.approx(0.114721, rel=1e-5)
    unscaled = {name: value for name, value in scaling.items() if name != "mscale_all_dim"}
    assert latent_from(rope_scaling=unscaled).score_scale == 192**-0.5


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match="`kv_lora_rank` must be an integer from 1 on, got 'x'"):
        latent_from(kv_lora_rank="x")
