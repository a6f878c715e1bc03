"""What tells the weights of a checkpoint from others of the same names, sizes and headers, without reading them all.

Each file is known by the checksum of all its bytes where its storage keeps one (Cloud Storage's CRC32C, the hub's
SHA-256), else by a digest of samples of every tensor in it: its first, middle and last bytes. Content decides, never a
time or a path: equal copies are equal. Ids of one kind compare; of ids of two kinds nothing can be said, so those who
compare a checkpoint must all have it in the same kind of storage. Knows nothing of what the weights are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.index import Checkpoint
from podquant.storage.store import Store

SAMPLED_BYTES = 64 << 20
"""Of a checkpoint, shared out evenly among its tensors: one that is no larger is read whole."""

_PLACES = 3
"""First, middle and last."""

_LEAST_SAMPLE = 1 << 10
"""At each place: from 21,846 tensors on, 3 KiB of each are read, and more than `SAMPLED_BYTES` in all."""

_THREADS = 16
_BATCH = 32
"""Samples that a thread reads and digests at a time."""

_BUFFER_BYTES = 256 << 10
"""That a thread holds of them: together less than what a worker holds of windows."""

type _Range = tuple[int, int]
"""Offset in a file, and length."""


@dataclass(frozen=True)
class Fingerprint:
    """What weights are known by.

    Attributes:
        digest: equal where the weights are equal, and how they are to be quantized.
        basis: what it was made of; digests of different bases do not compare.
    """

    digest: str
    basis: str


def fingerprint(checkpoint: Checkpoint, decisions: Mapping[str, Any]) -> Fingerprint:
    """Of a checkpoint, and of what is decided of its modules (by its `repr`).

    Raises:
        StorageError: bytes cannot be read.
    """
    ids = content_ids(checkpoint)
    files = sorted((name, info.size, info.header_sha256, ids[name]) for name, info in checkpoint.files.items())
    decided = sorted((module, repr(decision)) for module, decision in decisions.items())
    digest = hashlib.sha256(json.dumps([files, decided]).encode()).hexdigest()
    return Fingerprint(digest, ", ".join(sorted({_kind(content_id) for content_id in ids.values()})))


def differs(there: Fingerprint, here: Fingerprint, whose: str = "process 0's") -> str | None:
    """What is to be said of the weights `there`, compared with those `here`; None if they are the same.

    Args:
        whose: the weights `here`, for people.
    """
    if there.basis != here.basis:
        return (
            f"cannot be compared with {whose}: they are known there by {there.basis}, here by {here.basis}, because "
            "they lie in different kinds of storage"
        )
    if there.digest != here.digest:
        return f"differ from {whose} (there {there.digest[:12]}, here {here.digest[:12]})"
    return None


def content_ids(checkpoint: Checkpoint) -> dict[str, str]:
    """By safetensors file, `kind:digits` of its content.

    Raises:
        StorageError: bytes cannot be read.
    """
    store = checkpoint.store
    kept = {name: store.content_id(name) for name in checkpoint.files}
    unknown = {name for name, content_id in kept.items() if content_id is None}
    samples = _sample_ids(store, [info for info in checkpoint.tensors.values() if info.file in unknown])
    return {name: content_id or samples.get(name, "samples:") for name, content_id in kept.items()}


def _kind(content_id: str) -> str:
    return content_id.partition(":")[0]


def _sample_ids(store: Store, tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """Of the files of these tensors."""
    batches = list(_batches(tensors))
    digests: dict[str, Any] = {}
    with ThreadPoolExecutor(_THREADS, "fingerprint") as threads:
        found = threads.map(lambda batch: _digest(store, *batch), batches)
        for (file, _), digest in zip(batches, found, strict=True):
            digests.setdefault(file, hashlib.sha256()).update(digest)
    return {file: f"samples:{digest.hexdigest()}" for file, digest in digests.items()}


def _digest(store: Store, file: str, ranges: Sequence[_Range]) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(length for _, length in ranges))))
    for offset, length in ranges:
        for start in range(0, length, _BUFFER_BYTES):
            part = buffer[: min(_BUFFER_BYTES, length - start)]
            store.read_into(file, offset + start, part)
            digest.update(part)
    return digest.digest()


def _batches(tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, list[_Range]]]:
    """Ranges to read together, by file, in the order of the file."""
    by_place = sorted(tensors, key=lambda info: (info.file, info.offset))
    for file, ranges in sampled_ranges(by_place):
        rest = iter(ranges)
        while batch := list(islice(rest, _BATCH)):
            yield file, batch


def sampled_ranges(tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, list[_Range]]]:
    """What is read of each file for these tensors, which are in the order of their files and of the bytes there.

    The end of one tensor and the beginning of the next are read at once.
    """
    is_small = sum(info.nbytes for info in tensors) <= SAMPLED_BYTES
    share = max(_LEAST_SAMPLE, SAMPLED_BYTES // (_PLACES * max(1, len(tensors))))
    for file, infos in groupby(tensors, key=lambda info: info.file):
        joined: list[_Range] = []
        for offset, length in (part for info in infos for part in _samples(info, is_small, share)):
            last, last_length = joined[-1] if joined else (0, 0)
            if joined and last + last_length == offset and last_length < share * 2:
                joined[-1] = last, last_length + length
            else:
                joined.append((offset, length))
        yield file, joined


def _samples(info: TensorInfo, is_small: bool, share: int) -> list[_Range]:
    if info.nbytes == 0:
        return []
    if info.nbytes <= _PLACES * share:
        return [(info.offset, info.nbytes)]
    starts = range(0, info.nbytes, share)
    if is_small:
        return [(info.offset + start, min(share, info.nbytes - start)) for start in starts]
    return [(info.offset + start, share) for start in (0, (info.nbytes - share) // 2, info.nbytes - share)]
