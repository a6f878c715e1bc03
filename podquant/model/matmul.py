"""How a product with a weight is computed: plain, weight-only or with quantized activations, by scheme and platform.

Everything is `y = sum_k (rows_k . W^T) * row_scale_k * scale`: the weight is read from memory as it is stored, the
scales multiply the product. A dequantized weight is never made, save where XLA:CPU has no dot for the type: fp8 codes
are then held as bfloat16 (or float32), which represents each of them exactly.

Measured on XLA:CPU (jax 0.12): bf16 and int8 dots reach the fast library only from two rows up, so one row is padded to
two; an int8 weight-only product is fastest with the activation split into two int8 parts, at 1.6e-5 of the token's
largest magnitude. In float32, where parity is the point, there are three: such an error can change a token's experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from podquant.config.scheme import Scheme
from podquant.model.blocks import BlockCut, Matrix, block_product
from podquant.quantize.activations import LOW_STEPS, quantize_per_token, split_int8, token_absmax

OperandKind = Literal["plain", "split_int8", "int8", "float8_e4m3fn"]


@dataclass(frozen=True)
class Numerics:
    """What a model computes in.

    Attributes:
        dtype: of activations and unquantized weights: `bfloat16` or `float32`.
        platform: the JAX platform the programs are compiled for: `cpu`, `tpu`, `gpu`.
        device_kind: `jax.Device.device_kind`, empty if it is not known.
    """

    dtype: str
    platform: str
    device_kind: str = ""


_REBIASES = frozenset(("TPU v5 lite", "TPU v5", "TPU v6 lite"))
"""Device kinds whose matrix unit takes float8_e4m3b11fnuz as it is, and e4m3fn once the vector unit has converted it:
a product with 8 rows takes 0.90 of one in bfloat16 against 0.50 (libtpu 0.0.50, v6e, K 4096, N 14336)."""


def rebiases(scheme: Scheme, device_kind: str) -> bool:
    """Whether this kind of device holds the codes of weight-only fp8 as float8_e4m3b11fnuz.

    That is the same mantissas with an exponent that is 4 less: a sixteenth of the value, and -0 is 0. The scales are
    16 times as large on the device, and every product is the same.
    """
    return scheme.weight_dtype == "float8_e4m3fn" and not scheme.activation_dtype and device_kind in _REBIASES


def stored_dtype(scheme: Scheme, numerics: Numerics) -> str:
    """The element type of codes on a device that multiplies codes."""
    return "float8_e4m3b11fnuz" if rebiases(scheme, numerics.device_kind) else scheme.weight_dtype


@dataclass(frozen=True)
class Form:
    """How the product with one weight is computed.

    Attributes:
        operand: what the activation becomes in front of the dot.
        operand_dtype: the element type the dot sees on that side.
        weight_dtype: the element type the weight has on the device.
        accumulator: the dot's result type.
        min_rows: fewer rows are padded to this many.
        blocks: of scales along the input, None for one scale per output channel or no scale.
        parts: int8 parts of the activation under `split_int8`.
    """

    operand: OperandKind
    operand_dtype: str
    weight_dtype: str
    accumulator: str = "float32"
    min_rows: int = 1
    blocks: BlockCut | None = None
    parts: int = 1

    @property
    def scale_blocks(self) -> tuple[int, ...]:
        """Which block each column of scales is of, over all shards that have one; they share that of a single block."""
        return (0,) if self.blocks is None or self.blocks.is_one else self.blocks.columns

    @property
    def loops(self) -> bool:
        """Whether the product is one of several blocks, which reads a part of the weight at a time."""
        return self.blocks is not None and self.blocks.count > 1


def form_of(scheme: Scheme | None, numerics: Numerics, width: int, shards: int = 1) -> Form:
    """The fastest exact way to compute a product under `scheme` on this platform.

    Args:
        scheme: of the weight.
        numerics: what the model computes in.
        width: of the input axis on a shard.
        shards: that share out the input axis.
    """
    size = scheme.weight_block_size[1] if scheme and scheme.weight_block_size else None
    return replace(_form_of(scheme, numerics), blocks=None if size is None else BlockCut(size, width, shards))


def _form_of(scheme: Scheme | None, numerics: Numerics) -> Form:
    cpu = numerics.platform == "cpu"
    low = numerics.dtype != "float32"
    if scheme is None:
        return Form("plain", numerics.dtype, numerics.dtype, min_rows=2 if cpu and low else 1)
    weight, activation = scheme.weight_dtype, scheme.activation_dtype
    if activation is None:
        if not cpu:
            return Form("plain", numerics.dtype, stored_dtype(scheme, numerics))
        if weight == "int8":
            return Form("split_int8", "int8", "int8", "int32", parts=2 if low else 3)
        return Form("plain", numerics.dtype, numerics.dtype, min_rows=2 if low else 1)
    if weight == activation == "int8":
        return Form("int8", "int8", "int8", "int32", min_rows=2 if cpu else 1)
    kind: OperandKind = "int8" if activation == "int8" else "float8_e4m3fn"
    if weight == activation and not cpu:
        return Form(kind, activation, weight)
    # Codes of both types are exact in bfloat16, and their products in a float32 accumulator.
    return Form(kind, "bfloat16", "bfloat16" if cpu else weight, min_rows=2 if cpu else 1)


@dataclass(frozen=True)
class Operand:
    """An activation ready for the dot; made once for all weights that share it.

    Attributes:
        rows: [parts * M', D] in the form's operand dtype, M' = max(M, min_rows).
        scales: [parts * M', 1] float32, or None.
        parts: how many terms add up to the activation.
        num_rows: M.
    """

    rows: jax.Array
    scales: jax.Array | None
    parts: int
    num_rows: int


def prepare(x: jax.Array, form: Form, token_axis: str | None = None, absmax: jax.Array | None = None) -> Operand:
    """Bring `x` [M, D] into the form its product needs.

    Args:
        x: the activation, or this shard's part of its columns.
        form: of the product.
        token_axis: the mesh axis over which a token's scale is shared, at the price of a small collective; None: every
            shard scales its own columns by their own maximum.
        absmax: float32 [M, 1], each token's largest magnitude where it is known, of at least `min_rows` tokens.
    """
    num_rows = x.shape[0]
    if num_rows < form.min_rows:
        x = jnp.pad(x, ((0, form.min_rows - num_rows), (0, 0)))
    if form.operand == "plain":
        return Operand(x.astype(form.operand_dtype), None, 1, num_rows)
    if form.operand == "split_int8":
        *split, scale = split_int8(x, form.parts)
        scales = [scale / LOW_STEPS**part for part in range(form.parts)]
        return Operand(jnp.concatenate(split), jnp.concatenate(scales), form.parts, num_rows)
    if token_axis is not None:
        absmax = jax.lax.pmax(token_absmax(x), token_axis)
    codes, scale = quantize_per_token(x, form.operand, absmax)
    return Operand(codes.astype(form.operand_dtype), scale, 1, num_rows)


def matmul(
    operand: Operand, weight: Matrix, scale: Matrix | None, form: Form, sum_axis: str | None = None
) -> jax.Array:
    """The product with a weight.

    Args:
        operand: from `prepare` with the same form; M rows of D.
        weight: [out, D] codes or values.
        scale: [out, 1] or [out, blocks of this shard] float32, None for a plain weight.
        form: how.
        sum_axis: the mesh axis over whose shards the product is summed before it is scaled, exactly: for integers
            without blocks, where all shards have the same scales.

    Returns:
        [M, out] float32.
    """
    dot = partial(_dot, form)
    if form.blocks is not None and form.loops:
        assert scale is not None
        y = block_product(operand.rows, weight, scale, form.blocks, dot)
    else:
        y = dot(operand.rows, weight.whole())
        if sum_axis is not None:
            y = jax.lax.psum(y, sum_axis)
        y = y.astype(jnp.float32)
        if scale is not None:
            y = y * scale.whole().reshape(1, -1)
    if operand.scales is not None:
        y = y * operand.scales
    if operand.parts > 1:
        y = y.reshape(operand.parts, -1, y.shape[-1]).sum(axis=0)
    return y[: operand.num_rows]


def _dot(form: Form, rows: jax.Array, weight: jax.Array) -> jax.Array:
    exact = form.operand_dtype == "float32"
    return jax.lax.dot_general(
        rows,
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.dtype(form.accumulator),
    )
