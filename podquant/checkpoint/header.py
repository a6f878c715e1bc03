"""The header of a safetensors file: read and validated in full, or encoded. Knows nothing of what tensors are for.

A file is: the header's length (8 bytes, little-endian), the header (a JSON object, padded with spaces), then the bytes
of the tensors, which cover the rest of the file without overlap or gap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c

from podquant.checkpoint.jsonfile import parse_object
from podquant.dtypes import BY_DISK_NAME, DType
from podquant.errors import CheckpointError
from podquant.foreign import shown
from podquant.storage.store import Store

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_BYTES = 2**63 - 1  # what offsets in a file, and NumPy, can count
_MAX_AXES = 64  # NumPy's
_FIRST_READ = 128 << 10  # one read takes most headers whole
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is.

    Attributes:
        offset: of its first byte, counted from the start of `file`.
        nbytes: its length; always the product of `shape` times the size of an element.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What one file says of itself.

    Attributes:
        tensors: by name, in the order of their bytes in the file.
        metadata: the free-form strings of `__metadata__`.
        sha256: of the header with its length prefix, as hexadecimal digits.
        crc32c: of the same bytes.
        data_offset: where the first tensor begins in the file; also the length of those bytes.
        size: bytes in the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    sha256: str
    crc32c: int
    data_offset: int
    size: int


def read_header(store: Store, file: str) -> Header:
    """Read and validate the header of one file; `CheckpointError` names the file and the tensor that is wrong."""
    where = f"{store.uri}/{file}"
    size = store.size(file)
    if size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{where}: {size} bytes are too few for a safetensors file, which begins with 8 bytes of length. "
            "It is truncated: copy it again."
        )
    raw = bytearray(min(size, _FIRST_READ))
    store.read_into(file, 0, raw)
    if raw.startswith(_LFS_POINTER):
        raise CheckpointError(f"{where}: a Git LFS pointer, not the file itself. Run `git lfs pull`.")
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{where}: claims a header of {length:,} bytes; at most {_MAX_HEADER:,} are allowed. "
            "It is damaged, or not a safetensors file."
        )
    data_offset = _LENGTH_BYTES + length
    if data_offset > size:
        raise CheckpointError(
            f"{where}: claims a header of {length:,} bytes, but the file has only {size:,}. "
            "It is truncated: copy it again."
        )
    if data_offset > len(raw):
        rest = bytearray(data_offset - len(raw))
        store.read_into(file, len(raw), rest)
        raw += rest
    header = bytes(raw[:data_offset])
    entries = parse_object(header[_LENGTH_BYTES:], f"{where}: header")
    metadata = _parse_metadata(entries.pop(_METADATA, {}), where)
    tensors = sorted(
        (_parse_tensor(name, entry, file, where, data_offset) for name, entry in entries.items()),
        key=lambda info: (info.offset, info.nbytes),
    )
    _check_cover(tensors, where, data_offset, size)
    digest = hashlib.sha256(header).hexdigest()
    crc32c = google_crc32c.value(header)
    return Header({info.name: info for info in tensors}, metadata, digest, crc32c, data_offset, size)


def encode_header(
    entries: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes that precede the tensors `entries` (name, dtype, shape), which follow in this order without gaps.

    Padded with spaces to a multiple of 8 bytes, as the safetensors library does. Tensors stay aligned to their elements
    if larger element types come first.
    """
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        if name in fields or name == _METADATA:
            raise CheckpointError(
                f"tensor {name!r}: the name is taken: names in a safetensors file must be unique. Rename one."
            )
        end = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": dtype.disk, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(
            f"a header of {len(text):,} bytes for {len(entries):,} tensors; at most {_MAX_HEADER:,} are allowed. "
            "Write fewer tensors to a file."
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _parse_metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: {_METADATA} must map strings to strings, got {shown(value)}.")
    return value


def _parse_tensor(name: str, entry: Any, file: str, where: str, data_offset: int) -> TensorInfo:
    where = f"{where}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets, got {shown(entry)}.")
    dtype = BY_DISK_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(BY_DISK_NAME)
        raise CheckpointError(f"{where}: unknown dtype {shown(entry['dtype'])}. podquant reads {known}.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_AXES:
        raise CheckpointError(f"{where}: shape must be a list of at most {_MAX_AXES} counts, got {shown(shape)}.")
    # With 1 for 0, so that an empty tensor cannot hide an axis too long for NumPy.
    if math.prod(max(axis, 1) for axis in shape) * dtype.itemsize > _MAX_BYTES:
        raise CheckpointError(f"{where}: shape {shown(shape)} of {dtype.disk} overflows 63 bits of bytes.")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be [begin, end], 0 ≤ begin ≤ end, got {shown(offsets)}.")
    begin, end = offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: shape {shown(shape)} of {dtype.disk} takes {expected:,} bytes, "
            f"but data_offsets {shown(offsets)} span {end - begin:,}."
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_offset + begin, expected)


def _check_cover(tensors: Sequence[TensorInfo], where: str, data_offset: int, size: int) -> None:
    """The tensors, sorted by offset, must cover the file from `data_offset` to `size`, each byte once."""
    position, previous = data_offset, "the header"
    for info in tensors:
        name, end = repr(info.name), info.offset + info.nbytes
        if info.offset < position:
            raise CheckpointError(f"{where}: tensor {name} overlaps {previous} by {position - info.offset:,} bytes.")
        if info.offset > position:
            raise CheckpointError(
                f"{where}: tensor {name} leaves a gap of {info.offset - position:,} bytes after {previous}; "
                "the format allows none."
            )
        if end > size:
            raise CheckpointError(
                f"{where}: tensor {name} ends at byte {end:,}, but the file has only {size:,}. "
                "It is truncated: copy it again."
            )
        position, previous = end, f"tensor {name}"
    if position < size:
        raise CheckpointError(
            f"{where}: {size - position:,} bytes follow {previous}, the last tensor. The file is damaged."
        )


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
