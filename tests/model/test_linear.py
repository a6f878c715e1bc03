"""One linear layer, on one device and on four, against its definition in float64.

Activations are made from codes: whatever rounding the device does in between, the codes it must find are known.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME
from podquant.families.declaration import DeclaredWeight
from podquant.model.axes import spec_of
from podquant.model.linear import Linear, RMSNorm, project
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.model.parameter import Module
from podquant.quantize.qarray import QArray
from podquant.quantize.weights import quantize_weight
from tests.matrix import half

Array = np.ndarray[Any, np.dtype[Any]]

FP8 = "float8_e4m3fn"
BATCHES = (1, 2, 5)
WEIGHT_ONLY = [Scheme("int8"), Scheme(FP8)]
WITH_ACTIVATIONS = [Scheme("int8", "int8"), Scheme(FP8, FP8), Scheme("int8", FP8), Scheme(FP8, "int8")]
PARALLEL = {
    "column": (("heads", "embed"), (320, 200)),
    "row": (("embed", "ffn"), (200, 512)),
    "narrow row": (("embed", "ffn"), (200, 100)),
    "straddling row": (("embed", "ffn"), (200, 840)),
    "shared block row": (("embed", "ffn"), (200, 256)),
    "short row": (("embed", "ffn"), (200, 384)),
}
"""Axes and shape. Blocks of 128 are partial along both axes of the first, along the uncut one of the second. In the
third a single partial block is cut; of four shards, those of the fourth begin and end inside blocks, those of the fifth
have half a block each, and those of the last three quarters."""


def blocked(scheme: Scheme) -> Scheme:
    return Scheme(scheme.weight_dtype, scheme.activation_dtype, (128, 128))


def weight_of(shape: tuple[int, int]) -> Array:
    return np.random.default_rng(5).standard_normal(shape, np.float32)


def activations(scheme: Scheme | None, rows: int, width: int, parts: int, dtype: str) -> tuple[Array, Array]:
    """[rows, width] to feed in and what the product must see of them, each of `parts` runs of columns with a scale."""
    random = np.random.default_rng(rows)
    shape = (rows, parts, width // parts)
    if scheme is None or scheme.activation_dtype is None:
        x = random.standard_normal((rows, width), np.float32).astype(BY_NAME[dtype].numpy)
        return x, x.astype(np.float64)
    qmax = BY_NAME[scheme.activation_dtype].qmax
    assert qmax is not None
    # Powers of two where bfloat16 has to hold the largest value exactly.
    exponents = random.uniform(-9, 3, (rows, parts, 1))
    scales = 2.0 ** (exponents if dtype == "float32" else exponents.round())
    if scheme.activation_dtype == "int8":
        codes = random.integers(-126, 127, shape).astype(np.float64)
        near = codes + random.uniform(-0.2, 0.2, shape)
    else:
        codes = random.integers(0, 0x7E, shape, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        codes *= random.choice([-1.0, 1.0], shape)
        near = codes * random.uniform(0.98, 1.02, shape)
    codes[..., 3] = near[..., 3] = -qmax
    x = (near * scales).reshape(rows, width).astype(BY_NAME[dtype].numpy)
    return x, (codes * scales).reshape(rows, width)


def run(linear: Linear, values: dict[str, Array], tp: int, xs: list[Array]) -> list[Array]:
    """Apply the layer to each of `xs` over `tp` devices."""
    graph, state = nnx.split(linear)
    flat = nnx.to_flat_state(state)
    tree = jax.tree.structure(state)
    axes = [tuple(weight.axes) for _, weight in flat]
    arrays = [values[str(path[-1])] for path, _ in flat]
    for array, (_, weight) in zip(arrays, flat, strict=True):
        assert (array.shape, array.dtype) == (weight.get_value().shape, weight.get_value().dtype)

    def apply(arrays: list[jax.Array], xs: list[jax.Array]) -> list[jax.Array]:
        layer = nnx.merge(graph, jax.tree.unflatten(tree, arrays))
        return [layer(x) for x in xs]

    cut = PartitionSpec(None, "tp")
    mapped = jax.shard_map(
        apply,
        mesh=make_mesh("cpu", tp),
        in_specs=([spec_of(a) for a in axes], cut if linear.row_parallel else PartitionSpec()),
        out_specs=PartitionSpec() if linear.row_parallel else cut,
        check_vma=False,
    )
    return [np.asarray(y).astype(np.float64) for y in jax.jit(mapped)(arrays, xs)]


def module_of(
    axes: tuple[str, ...], shape: tuple[int, ...], scheme: Scheme | None = None, *, bias: bool = False, tp: int = 1
) -> Module:
    """A module outside the layers, as families declare one."""
    names = {"weight": axes, "bias": axes[:1]} if bias else {"weight": axes}
    weights = {
        name: DeclaredWeight(None, "m", name, its_axes, shape[: len(its_axes)], "dense", ())
        for name, its_axes in names.items()
    }
    return Module("m", weights, dict(zip(axes, shape, strict=True)), scheme, shards=tp)


def layer(
    parallel: str, scheme: Scheme | None, dtype: str, tp: int = 1, *, bias: bool = True
) -> tuple[Linear, dict[str, Array], Array, Array]:
    """A layer, its arrays as they lie on the devices, and the weight and bias it stands for in float64."""
    axes, shape = PARALLEL[parallel]
    numerics = Numerics(dtype, "cpu")
    linear = nnx.eval_shape(lambda: Linear(module_of(axes, shape, scheme, bias=bias, tp=tp), numerics))
    weight = weight_of(shape)
    narrow = BY_NAME[dtype].numpy
    offsets = np.random.default_rng(6).standard_normal(shape[0], np.float32).astype(narrow)
    values = {"bias": offsets}
    if scheme is None:
        values["weight"] = weight.astype(narrow)
        return linear, values, values["weight"].astype(np.float64), offsets.astype(np.float64)
    quantized = quantize_weight(weight, scheme)
    values["weight"] = quantized.codes.astype(linear.form.weight_dtype)
    rows = (scheme.weight_block_size or (1, 1))[0]
    values["weight_scale"] = quantized.scales.repeat(rows, axis=0)[: shape[0], list(linear.form.scale_blocks)]
    return linear, values, dequantized(quantized), offsets.astype(np.float64)


def dequantized(quantized: QArray) -> Array:
    """codes · scales in float64, written out once more."""
    bo, bi = quantized.block or (1, quantized.codes.shape[1])
    rows, columns = np.indices(quantized.codes.shape)
    return np.asarray(
        quantized.codes.astype(np.float64) * quantized.scales.astype(np.float64)[rows // bo, columns // bi]
    )


def check(
    parallel: str, scheme: Scheme | None, dtype: str, tp: int, *, of_terms: float, of_largest: float = 0.0
) -> None:
    """The error is at most `of_terms` of the sum of the terms' magnitudes, `of_largest` of what that would be if all
    activations were as large as the token's largest, and what bfloat16 rounds off results and shards' parts."""
    linear, values, weight, bias = layer(parallel, scheme, dtype, tp)
    own_scale = tp if linear.row_parallel and dtype != "float32" else 1
    pairs = [activations(scheme, rows, weight.shape[1], own_scale, dtype) for rows in BATCHES]
    cuts = tp if linear.row_parallel else 1
    for got, (_, seen) in zip(run(linear, values, tp, [x for x, _ in pairs]), pairs, strict=True):
        parts = [part @ w.T for part, w in zip(np.split(seen, cuts, 1), np.split(weight, cuts, 1), strict=True)]
        expected = sum(parts) + bias
        terms = np.abs(seen) @ np.abs(weight).T + np.abs(bias)
        largest = np.abs(seen).max(axis=1, keepdims=True) * np.abs(weight).sum(axis=1)
        allowed = of_terms * terms + of_largest * largest
        if dtype == "bfloat16":
            allowed += 2.0**-8 * (3 * np.abs(parts).sum(axis=0) + np.abs(bias))
        assert np.all(np.abs(got - expected) <= allowed)
        if of_largest and dtype == "float32":
            assert np.linalg.norm(got - expected) <= 3e-5 * np.linalg.norm(expected)


def label(value: Any) -> str:
    return value.label if isinstance(value, Scheme) else str(value)


@pytest.mark.parametrize(("parallel", "dtype", "tp"), half(list(PARALLEL), ["float32", "bfloat16"], [1, 4]), ids=label)
def test_a_plain_weight(parallel: str, dtype: str, tp: int) -> None:
    check(parallel, None, dtype, tp, of_terms=1e-6)


@pytest.mark.parametrize(
    ("parallel", "scheme", "tp"),
    half(list(PARALLEL), WITH_ACTIVATIONS + [blocked(s) for s in WITH_ACTIVATIONS], [1, 4]),
    ids=label,
)
def test_quantized_activations_are_exact_to_the_definition(parallel: str, scheme: Scheme, tp: int) -> None:
    check(parallel, scheme, "float32", tp, of_terms=5e-7)


@pytest.mark.parametrize(("parallel", "scheme", "tp"), half(list(PARALLEL), WITH_ACTIVATIONS[:2], [1, 4]), ids=label)
def test_quantized_activations_in_bfloat16_have_a_scale_from_each_shard(parallel: str, scheme: Scheme, tp: int) -> None:
    check(parallel, scheme, "bfloat16", tp, of_terms=1e-6)


@pytest.mark.parametrize(
    ("parallel", "scheme", "dtype", "tp"),
    half(list(PARALLEL), WEIGHT_ONLY + [blocked(s) for s in WEIGHT_ONLY], ["float32", "bfloat16"], [1, 4]),
    ids=label,
)
def test_weight_only_is_near_exact(parallel: str, scheme: Scheme, dtype: str, tp: int) -> None:
    # Two int8 parts are within 1.6e-5 of the token's largest magnitude.
    check(parallel, scheme, dtype, tp, of_terms=1e-6, of_largest=1.6e-5 if scheme.weight_dtype == "int8" else 0)


def test_no_row_changes_with_the_rows_beside_it() -> None:
    """A token's result must not depend on the batch it is in: int8 products are sums of integers."""
    linear, values, _, _ = layer("column", Scheme("int8", "int8"), "float32")
    x, _ = activations(Scheme("int8", "int8"), 5, 200, 1, "float32")
    whole, single = run(linear, values, 1, [x, x[2:3]])
    np.testing.assert_array_equal(whole[2:3], single)


def test_integers_summed_over_any_number_of_shards_give_the_same_bits() -> None:
    """In float32: where a flipped rounding of the next layer's activation would otherwise grow with depth."""
    linear, values, _, _ = layer("row", Scheme("int8", "int8"), "float32")
    x = np.random.default_rng(3).standard_normal((5, 512), np.float32)
    (alone,), *others = (run(linear, values, tp, [x]) for tp in (1, 2, 4, 8))
    for (cut,) in others:
        np.testing.assert_array_equal(cut, alone)


def test_layers_alike_share_one_quantized_activation() -> None:
    scheme, numerics = Scheme("int8", "int8"), Numerics("float32", "cpu")

    def program(x: jax.Array) -> list[jax.Array]:
        axes = ("heads", "embed")
        same = [Linear(module_of(axes, (8, 16), scheme), numerics) for _ in range(3)]
        other = Linear(module_of(axes, (8, 16)), numerics)
        return project(x, *same, other)

    jaxpr = str(jax.make_jaxpr(program)(jnp.zeros((2, 16), jnp.float32)))
    assert jaxpr.count("reduce_max") == 1


def test_a_layer_without_bias_has_none() -> None:
    linear = nnx.eval_shape(lambda: Linear(module_of(("heads", "embed"), (8, 16)), Numerics("float32", "cpu")))
    assert not hasattr(linear, "bias")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype: str) -> None:
    norm = RMSNorm(module_of(("embed",), (64,)), 1e-5, Numerics(dtype, "cpu"))
    random = np.random.default_rng(2)
    weight, x = (random.standard_normal(shape, np.float32).astype(BY_NAME[dtype].numpy) for shape in ((64,), (3, 64)))
    norm.weight.set_value(jnp.asarray(weight))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * weight.astype(np.float64)
    got = np.asarray(norm(jnp.asarray(x)))
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=1e-6 if dtype == "float32" else 2.0**-7)
