from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podquant.checkpoint.header import Header, encode_header, read_header
from podquant.dtypes import BY_DISK_NAME, BY_NAME
from podquant.errors import CheckpointError
from podquant.storage.store import open_store

I8, F32, BF16 = BY_NAME["int8"], BY_NAME["float32"], BY_NAME["bfloat16"]

GOLDEN = (
    (144).to_bytes(8, "little")
    + b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    + b'"b.c":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}  '
)


def _read(folder: Path, raw: bytes) -> Header:
    (folder / "m.safetensors").write_bytes(raw)
    return read_header(open_store(str(folder)), "m.safetensors")


def _file(fields: Any, data_bytes: int) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def _entry(shape: Any, offsets: Any, dtype: Any = "I8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_golden_bytes() -> None:
    assert encode_header([("a", F32, (2, 1)), ("b.c", I8, (3,))], {"format": "pt"}) == GOLDEN


def test_reads_what_it_encodes(tmp_path: Path) -> None:
    raw = encode_header(
        [("a", F32, (2, 1)), ("empty", BF16, (0, 5)), ("b.c", I8, (3,)), ("scalar", I8, ())], {"k": "ü"}
    )
    header = _read(tmp_path, raw + bytes(12))
    assert list(header.tensors) == ["a", "empty", "b.c", "scalar"]
    info = header.tensors["b.c"]
    assert (info.name, info.dtype, info.shape, info.file) == ("b.c", I8, (3,), "m.safetensors")
    assert (info.offset, info.nbytes) == (len(raw) + 8, 3)
    assert header.tensors["empty"].nbytes == 0
    assert header.tensors["scalar"].shape == ()
    assert header.metadata == {"k": "ü"}
    assert header.sha256 == hashlib.sha256(raw).hexdigest()
    assert (header.data_offset, header.size) == (len(raw), len(raw) + 12)


def test_reads_a_file_without_tensors_and_one_with_a_header_of_megabytes(tmp_path: Path) -> None:
    assert _read(tmp_path, encode_header([])).tensors == {}
    entries = [(f"layer.{i}.weight", I8, (1,)) for i in range(20_000)]
    header = _read(tmp_path, encode_header(entries) + bytes(20_000))
    assert header.data_offset > 1 << 20
    assert list(header.tensors) == [name for name, _, _ in entries]


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = _read(tmp_path, _file({"b": _entry([2], [1, 3]), "a": _entry([1], [0, 1])}, 3))
    assert list(header.tensors) == ["a", "b"]


WRONG = {
    "empty": (b"", "0 bytes are too few"),
    "too short": (b"1234567", "7 bytes are too few for a safetensors file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid 1", "a Git LFS pointer, not the file itself"),
    "header over the cap": (
        (2**63).to_bytes(8, "little") + b"{}",
        "claims a header of 9,223,372,036,854,775,808 bytes",
    ),
    "cap plus one": ((100_000_001).to_bytes(8, "little"), "claims a header of 100,000,001 bytes; at most 100,000,000"),
    "header over the file": (
        (3).to_bytes(8, "little") + b"{}",
        "claims a header of 3 bytes, but the file has only 10.",
    ),
    "not UTF-8": (_file(b'{"\xff":1}', 0), "header: not valid JSON: not UTF-8 at byte 2"),
    "not JSON": (_file(b'{"a":', 0), "header: not valid JSON"),
    "no header at all": (_file(b"", 5), "header: not valid JSON"),
    "header cut by its length": (_file(b'{"a":{}}', 0).replace(b"\x08", b"\x07", 1), "header: not valid JSON"),
    "not an object": (_file([], 0), "header: expected a JSON object, got list"),
    "duplicate tensor": (
        _file(b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0),
        "header: not valid JSON: duplicate key 'a'",
    ),
    "metadata not an object": (_file({"__metadata__": 3}, 0), "__metadata__ must map strings to strings, got 3."),
    "metadata of numbers": (_file({"__metadata__": {"a": 1}}, 0), "must map strings to strings, got {'a': 1}."),
    "tensor not an object": (
        _file({"a": 1}, 0),
        "tensor 'a': expected an object with dtype, shape and data_offsets, got 1.",
    ),
    "field missing": (
        _file({"a": {"dtype": "I8", "shape": []}}, 1),
        "tensor 'a': expected an object with dtype, shape",
    ),
    "unknown dtype": (
        _file({"a": _entry([1], [0, 1], "I4")}, 1),
        "tensor 'a': unknown dtype 'I4'. podquant reads BF16, F16",
    ),
    "dtype not text": (_file({"a": _entry([1], [0, 1], [])}, 1), "tensor 'a': unknown dtype []."),
    "long value": (_file({"a": "x" * 500}, 0), "got '" + "x" * 76 + "..."),
    "negative shape": (
        _file({"a": _entry([-1, -1], [0, 1])}, 1),
        "tensor 'a': shape must be a list of at most 64 counts, got [-1",
    ),
    "fractional shape": (
        _file({"a": _entry([1.0], [0, 1])}, 1),
        "shape must be a list of at most 64 counts, got [1.0].",
    ),
    "truth in shape": (
        _file({"a": _entry([True], [0, 1])}, 1),
        "shape must be a list of at most 64 counts, got [True].",
    ),
    "shape not a list": (_file({"a": _entry(1, [0, 1])}, 1), "shape must be a list of at most 64 counts, got 1."),
    "too many axes": (
        _file({"a": _entry([1] * 65, [0, 1])}, 1),
        "shape must be a list of at most 64 counts, got [1, 1",
    ),
    "shape overflows": (_file({"a": _entry([2**32, 2**32], [0, 0])}, 0), "of I8 overflows 63 bits of bytes."),
    "empty shape overflows": (_file({"a": _entry([0, 2**63], [0, 0])}, 0), "of I8 overflows 63 bits of bytes."),
    "length too long": (
        _file({"a": _entry([2, 3], [0, 25], "F32")}, 25),
        "tensor 'a': shape [2, 3] of F32 takes 24 bytes, but data_offsets [0, 25] span 25.",
    ),
    "length too short": (
        _file({"a": _entry([2], [0, 1])}, 1),
        "shape [2] of I8 takes 2 bytes, but data_offsets [0, 1] span 1.",
    ),
    "offsets reversed": (
        _file({"a": _entry([1], [1, 0])}, 1),
        "data_offsets must be [begin, end], 0 ≤ begin ≤ end, got [1, 0]",
    ),
    "offset negative": (_file({"a": _entry([1], [-1, 0])}, 1), "0 ≤ begin ≤ end, got [-1, 0]."),
    "three offsets": (_file({"a": _entry([1], [0, 1, 2])}, 1), "0 ≤ begin ≤ end, got [0, 1, 2]."),
    "truncated": (
        _file({"a": _entry([2], [0, 2]), "b": _entry([4], [2, 6])}, 5),
        "tensor 'b' ends at byte 134, but the file has only 133. It is truncated: copy it again.",
    ),
    "overlap": (
        _file({"a": _entry([4], [0, 4]), "b": _entry([3], [2, 5])}, 5),
        "tensor 'b' overlaps tensor 'a' by 2 bytes.",
    ),
    "same place": (
        _file({"a": _entry([4], [0, 4]), "b": _entry([4], [0, 4])}, 4),
        "tensor 'b' overlaps tensor 'a' by 4",
    ),
    "hole": (
        _file({"a": _entry([1], [0, 1]), "b": _entry([1], [3, 4])}, 4),
        "tensor 'b' leaves a gap of 2 bytes after tensor 'a'",
    ),
    "hole at the start": (_file({"a": _entry([1], [1, 2])}, 2), "tensor 'a' leaves a gap of 1 bytes after the header"),
    "trailing bytes": (_file({"a": _entry([1], [0, 1])}, 4), "3 bytes follow tensor 'a', the last tensor."),
    "bytes of no tensor": (_file({}, 1), "1 bytes follow the header, the last tensor."),
}


@pytest.mark.parametrize("way", WRONG)
def test_each_way_of_being_wrong_is_refused_by_file_and_reason(tmp_path: Path, way: str) -> None:
    raw, text = WRONG[way]
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        _read(tmp_path, raw)
    assert str(caught.value).startswith(f"{tmp_path}/m.safetensors: ")


@given(at=st.integers(0, len(GOLDEN) + 10), byte=st.integers(0, 255), cut=st.integers(0, len(GOLDEN) + 11))
def test_a_damaged_file_is_refused_or_still_covers_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
) -> None:
    raw = bytearray(GOLDEN + bytes(11))
    raw[at] = byte
    try:
        header = _read(tmp_path_factory.mktemp("file"), bytes(raw[:cut]))
    except CheckpointError:
        return
    assert header.data_offset + sum(info.nbytes for info in header.tensors.values()) == cut


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_names_to_encode_must_be_unique(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"tensor '{name}': the name is taken"):
        encode_header([("a", I8, (1,)), (name, I8, (1,))])


def test_a_header_too_long_to_read_is_not_encoded() -> None:
    with pytest.raises(CheckpointError, match=r"a header of 10\d,\d{3},\d{3} bytes for 2 tensors; at most 100,000,000"):
        encode_header([("a" * 50_000_000, I8, (1,)), ("b" * 50_000_000, I8, (1,))])


@pytest.mark.parametrize("disk", BY_DISK_NAME)
def test_every_dtype_goes_round(tmp_path: Path, disk: str) -> None:
    dtype = BY_DISK_NAME[disk]
    raw = encode_header([("a", dtype, (3, 5))]) + bytes(15 * dtype.itemsize)
    assert _read(tmp_path, raw).tensors["a"].dtype is dtype
