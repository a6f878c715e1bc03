"""The quantized weights of a checkpoint: where their codes and scales are, and rows of them in one form.

The headers decide which modules are quantized, config.json decides how, and the two must agree. Codes are returned as
int8 or float8_e4m3fn `[out, in]`, scales as `[out, 1]` or one per block, however they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from podquant.checkpoint.check import MISFIT_ADVICE
from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.quantization import Quantization, Stored
from podquant.checkpoint.reader import read_rows, read_whole
from podquant.checkpoint.scales import refuse_wrong_scales
from podquant.checkpoint.undeclared import CODES
from podquant.dtypes import BY_DISK_NAME, BY_NAME
from podquant.errors import CheckpointError
from podquant.storage.store import Store

Array = np.ndarray[Any, np.dtype[Any]]

_LEAVES = (
    "qweight",
    "qzeros",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_shape",
    "weight_zero_point",
)
"""Last parts of the names of what a quantized matrix is stored in, beside `weight`."""

_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_SIGN = np.uint8(0x80)
"""Packed bytes are codes plus 128: codes with this bit flipped."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized matrix.

    Attributes:
        stored: how.
        codes, scales: where its parts are.
        shape: (out, in).
        scales_shape: of its scales as they are returned.
    """

    stored: Stored
    codes: TensorInfo
    scales: TensorInfo
    shape: tuple[int, int]
    scales_shape: tuple[int, int]

    @property
    def has_one_scale(self) -> bool:
        """Whether all rows share one scale, so that none is read row by row."""
        return self.stored.strategy == "tensor"


def find_quantized(
    tensors: Mapping[str, TensorInfo], quantization: Quantization, where: str
) -> dict[str, QuantizedWeight]:
    """Every quantized matrix by its module; no tensor is read.

    Raises:
        CheckpointError: the headers contradict config.json, or parts are missing or of a wrong type or shape.
    """
    found: dict[str, QuantizedWeight] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and len(info.shape) >= 2 and info.dtype.disk in CODES):
            stored = quantization.stored(module)
            if stored is None:
                raise CheckpointError(
                    f"{where}: {name} holds codes ({info.dtype.disk}), but the {quantization.method} section of "
                    f"config.json does not list it as quantized. {MISFIT_ADVICE}"
                )
            found[module] = _weight(module, info, stored, tensors, where)
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "weight_scale_inv", "qweight") and module not in found:
            raise CheckpointError(
                f"{where}: {name} has no codes, as the {quantization.method} section of config.json says "
                f"they are stored: expected {module}.weight in 8 bits or {module}.weight_packed. {MISFIT_ADVICE}"
            )
    return found


def parts_of(module: str) -> tuple[str, ...]:
    """Names of all tensors that a quantized matrix may be stored in."""
    return tuple(f"{module}.{leaf}" for leaf in ("weight", *_LEAVES))


def read_codes(store: Store, weight: QuantizedWeight, start: int, stop: int, out: Array) -> Array:
    """Rows `[start, stop)` of the codes, into `out` [stop - start, in] of the scheme's dtype."""
    if weight.stored.layout != "packed":
        return read_rows(store, weight.codes, start, stop, out)
    # An int32 holds four codes, the first in its lowest byte: in the order of the file, one byte is one code.
    words = out.view(BY_DISK_NAME["I32"].numpy)
    read_rows(store, weight.codes, start, stop, words)
    codes = out.view(np.uint8)
    np.bitwise_xor(codes, _SIGN, out=codes)
    return out


def read_scales(store: Store, weight: QuantizedWeight, start: int, stop: int) -> Array:
    """Rows `[start, stop)` of the scales, [stop - start, `scales_shape[1]`] in their type on disk."""
    info = weight.scales
    if weight.has_one_scale:
        return np.broadcast_to(read_whole(store, info).reshape(1, 1), (stop - start, 1))
    return read_rows(store, info, start, stop).reshape(stop - start, weight.scales_shape[1])


def check_scales(store: Store, weight: QuantizedWeight, start: int, scales: Array) -> None:
    """Refuse wrong scales, of rows from `start` on as `read_scales` gives them; reads codes where one is 0.

    Raises:
        CheckpointError: as `refuse_wrong_scales` says.
    """
    rows, columns = weight.shape
    dtype, block = BY_NAME[weight.stored.scheme.weight_dtype].numpy, weight.stored.scheme.weight_block_size
    if weight.has_one_scale:
        block, scales = weight.shape, scales[:1]
        start = 0

    def codes(first: int, last: int) -> Array:
        out = np.empty((min(last, rows) - first, columns), dtype)
        return read_codes(store, weight, first, min(last, rows), out)

    where = f"{store.uri}/{weight.scales.file}: {weight.scales.name}"
    refuse_wrong_scales(scales, start, where, codes, block, CheckpointError)


def _weight(
    module: str, codes: TensorInfo, stored: Stored, tensors: Mapping[str, TensorInfo], where: str
) -> QuantizedWeight:
    packed, scheme = stored.layout == "packed", stored.scheme
    name = f"{module}.weight_packed" if packed else f"{module}.weight"
    disk = "I32" if packed else BY_NAME[scheme.weight_dtype].disk
    if (codes.name, codes.dtype.disk, len(codes.shape)) != (name, disk, 2):
        raise _wrong(where, codes, f"{name}, a matrix of {disk}")
    shape = (codes.shape[0], codes.shape[1] * (4 if packed else 1))
    label = f"{module}.weight_scale_inv" if stored.layout == "inverse" else f"{module}.weight_scale"
    for needed in (label, f"{module}.weight_shape") if packed else (label,):
        if needed not in tensors:
            raise CheckpointError(
                f"{where}: {needed} is missing: without it {codes.name} means nothing. {MISFIT_ADVICE}"
            )
    scales, block = tensors[label], scheme.weight_block_size
    expected = (shape[0], 1) if block is None else (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    allowed = {"tensor": ((), (1,), (1, 1)), "channel": (expected, expected[:1]), "block": (expected,)}[stored.strategy]
    if scales.shape not in allowed or scales.dtype.disk not in _SCALES:
        shapes = " or ".join(str(list(each)) for each in allowed)
        raise _wrong(where, scales, f"{stored.strategy} scales of shape {shapes} in {', '.join(_SCALES)}")
    return QuantizedWeight(stored, codes, scales, shape, expected)


def _wrong(where: str, info: TensorInfo, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where}/{info.file}: expected {expected}, as config.json says, "
        f"got {info.name} {info.dtype.disk} {list(info.shape)}. {MISFIT_ADVICE}"
    )
