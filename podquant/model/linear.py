"""Linear layers on one shard of a mesh, plain or quantized."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from podquant.model.axes import RULES, TP, block_axis
from podquant.model.blocks import Matrix
from podquant.model.collectives import sum_over_shards
from podquant.model.matmul import Form, Numerics, Operand, form_of, matmul, prepare
from podquant.model.parameter import Module, StackedWeight, Weight


class Linear(nnx.Module):
    """`y = x W^T + b` with W [out, in].

    Cut along its output axis it is column-parallel: every shard computes its own outputs. Cut along its input axis it
    is row-parallel: the shards' partial products are added, see `sum_over_shards`.

    Args:
        module: its declaration; a bias is added if it declares one.
        numerics: what the model computes in.
    """

    def __init__(self, module: Module, numerics: Numerics) -> None:
        (out, width), (rows, columns) = module.shape, module.axes
        shards = module.shards if RULES[columns] == TP else 1
        self.form: Form = form_of(module.scheme, numerics, width // shards, shards)
        self.dtype = numerics.dtype
        self.row_parallel = RULES[columns] == TP
        # A token that is cut among shards gets a scale from each in bfloat16: finer, and without a collective in front
        # of the product. In float32, where parity is the point, it gets one, as on a single device; and where the
        # products are integers their sum is exact: the same bits for any number of shards and hosts.
        self.shares_scales = self.row_parallel and self.dtype == "float32"
        self.sums_exactly = self.shares_scales and self.form.operand == "int8" and self.form.accumulator == "int32"
        self.sums_exactly &= self.form.blocks is None
        kind = StackedWeight if self.form.loops else Weight
        self.layer: jax.Array | None = None
        self.weight = module.parameter("weight", self.form.weight_dtype, kind=kind)
        if module.scheme is not None:
            blocks = self.form.scale_blocks
            axes = (rows, block_axis(columns, len(blocks)))
            self.weight_scale = module.parameter("weight", "float32", (out, len(blocks)), axes, kind, blocks)
        if "bias" in module.weights:
            self.bias = module.parameter("bias", numerics.dtype)

    def prepare(self, x: jax.Array) -> Operand:
        """Bring `x` [M, in] into the form this layer's product needs."""
        return prepare(x, self.form, TP if self.shares_scales else None)

    def product(self, operand: Operand) -> jax.Array:
        """`x W^T` of this shard's outputs, [M, out] float32, without bias; partial if row-parallel, unless summed."""
        place = () if self.layer is None else (self.layer,)
        scale = Matrix(self.weight_scale[...], place) if hasattr(self, "weight_scale") else None
        return matmul(operand, Matrix(self.weight[...], place), scale, self.form, TP if self.sums_exactly else None)

    def __call__(self, x: jax.Array | Operand) -> jax.Array:
        """Apply to [M, in] (or to what `prepare` made of it): [M, out] in the model's dtype."""
        y = self.product(x if isinstance(x, Operand) else self.prepare(x))
        y = y.astype(self.dtype)
        if self.row_parallel and not self.sums_exactly:
            y = sum_over_shards(y)
        if hasattr(self, "bias"):
            y = y + self.bias[...].reshape(1, -1)
        return y


def at_layer[T: nnx.Module](layers: T, index: jax.Array) -> T:
    """Tell the linear layers among stacked modules which layer (int32 scalar) to take from stacks that are whole."""
    for _, module in nnx.iter_modules(layers):
        if isinstance(module, Linear) and isinstance(module.weight, StackedWeight):
            module.layer = index
    return layers


def project(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """Apply several layers to one `x` [M, in], quantizing it once for all that need the same form."""
    operands: dict[tuple[object, ...], Operand] = {}
    results = []
    for linear in linears:
        form = linear.form
        key = (form.operand, form.operand_dtype, form.min_rows)
        if key not in operands:
            operands[key] = linear.prepare(x)
        results.append(linear(operands[key]))
    return results


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)`, the mean in float32 (arXiv:1910.07467).

    Over an axis that is cut among the shards, the mean is that of all of it: one small collective.
    """

    def __init__(self, module: Module, eps: float, numerics: Numerics, offset: float = 0.0) -> None:
        self.eps = eps
        self.offset = offset
        self.is_cut = RULES[module.axes[0]] == TP
        self.weight = module.parameter("weight", numerics.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; same shape and dtype."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        if self.is_cut:  # heads that several shards have a copy of count alike, so that the mean is the same
            mean = sum_over_shards(mean) / jax.lax.axis_size(TP)
        wide = wide * jax.lax.rsqrt(mean + self.eps)
        weight = self.weight[...]
        weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
        if self.offset:  # 1 + weight has no exact bfloat16 where the weight is small
            return (wide * (weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return wide.astype(x.dtype) * weight
