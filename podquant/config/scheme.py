"""How one module is quantized. Knows nothing of files, names or arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CacheDtype = Literal["auto", "bfloat16", "int8", "fp8"]
"""What keys and values are kept in; auto: what the model computes in."""


@dataclass(frozen=True)
class Scheme:
    """How the weight of one module, and the activations it is multiplied with, are quantized.

    A module without a scheme (`Scheme | None`) stays in its own dtype.

    Attributes:
        weight_dtype: `int8` or `float8_e4m3fn`.
        activation_dtype: the type activations are quantized to per token at run time; None for weight-only.
        weight_block_size: `(rows, columns)` that share one scale; None for one scale per output channel.
    """

    weight_dtype: str
    activation_dtype: str | None = None
    weight_block_size: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """A short name for tables: `int8`, `int8_w8a8`, `float8_e4m3fn[128,128]`."""
        text = self.weight_dtype
        if self.activation_dtype is not None:
            text += "_w8a8" if self.activation_dtype == self.weight_dtype else f"_a:{self.activation_dtype}"
        if self.weight_block_size is not None:
            text += "[{},{}]".format(*self.weight_block_size)
        return text
