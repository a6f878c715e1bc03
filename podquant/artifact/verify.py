"""Checks every byte of an artifact and reports everything that is wrong, not only the first problem.

Knows nothing of the source: only a new conversion can tell whether the codes are the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import google_crc32c
import numpy as np

from podquant.artifact.fields import decode_json
from podquant.artifact.manifest import Manifest, TensorEntry
from podquant.artifact.naming import CONFIG, INDEX, QUALITY
from podquant.artifact.reader import Artifact, check_size, compare_header, pieces_by_file, read_manifest
from podquant.checkpoint.header import read_header
from podquant.errors import PodquantError
from podquant.foreign import MOST_JSON_BYTES
from podquant.storage.store import Store, open_store

_CHUNK_BYTES = 2 << 20  # stays in the cache between read and check


def verify_artifact(uri: str, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
    """Every problem of an artifact, each a sentence with its location; empty when there are none.

    Checks the manifest, that its files are there with their sizes and CRC32C, every header against the manifest, the
    index, and that scales are finite and positive and codes within range. Reads everything once, and the codes twice.

    Args:
        on_bytes: called with the bytes checked since the last call, for a progress bar.

    Raises:
        StorageError: there is no such place.
    """
    with closing(open_store(uri)) as store:
        try:
            manifest = read_manifest(store)
        except PodquantError as error:
            return [str(error)]
        problems = [*_check_files(store, manifest, on_bytes), *_check_headers(store, manifest)]
        problems += _check_index(store, manifest)
    if not problems:
        problems = list(_check_values(uri))
    return problems


def _check_files(store: Store, manifest: Manifest, on_bytes: Callable[[int], None]) -> Iterator[str]:
    sizes = store.list()
    for name in (CONFIG, QUALITY, *((INDEX,) if manifest.tp_size == 1 else ())):
        if name not in manifest.files:
            yield f"{store.uri}: {name} is not listed in the manifest"
    for name in sizes:
        if name not in manifest.files and name.endswith(".safetensors"):
            yield f"{store.uri}: {name} does not belong here: it is not listed in the manifest"
    for name, file in manifest.files.items():
        try:
            check_size(store, name, file.size, sizes)
            found = _crc32c(store, name, file.size, on_bytes)
        except PodquantError as error:
            yield str(error)
            continue
        if found != file.crc32c:
            yield (
                f"{store.uri}: {name}: expected CRC32C {file.crc32c:08x}, as the manifest says, got {found:08x}: "
                "the content has changed. Copy the artifact again"
            )


def _crc32c(store: Store, name: str, size: int, on_bytes: Callable[[int], None]) -> int:
    buffer = np.empty(min(size, _CHUNK_BYTES), np.uint8)
    crc = 0
    for offset in range(0, size, _CHUNK_BYTES):
        chunk = buffer[: min(_CHUNK_BYTES, size - offset)]
        store.read_into(name, offset, chunk)
        crc = google_crc32c.extend(crc, chunk)
        on_bytes(len(chunk))
    return crc


def _check_headers(store: Store, manifest: Manifest) -> Iterator[str]:
    for file, pieces in pieces_by_file(manifest).items():
        try:
            header = read_header(store, file)
        except PodquantError as error:
            yield str(error)
            continue
        for problem in compare_header(header, pieces):
            yield f"{store.uri}: {file}: {problem}"


def _check_index(store: Store, manifest: Manifest) -> Iterator[str]:
    """At tp_size 1 the Hugging Face index must place the tensors where the manifest does."""
    if manifest.tp_size != 1 or INDEX not in manifest.files:
        return
    where = f"{store.uri}: {INDEX}"
    try:
        found = decode_json(store.read(INDEX, MOST_JSON_BYTES), where).get("weight_map")
    except PodquantError as error:
        yield str(error)
        return
    expected = {name: tensor.pieces[0].file for name, tensor in manifest.tensors.items()}
    if found != expected:
        names = expected.keys() ^ found.keys() if isinstance(found, dict) else expected.keys()
        yield f"{where}: its weight_map differs from the manifest" + (f": see {min(names)}" if names else "")


def _check_values(uri: str) -> Iterator[str]:
    with closing(Artifact.open(uri)) as artifact:
        for name, tensor in artifact.tensors.items():
            if tensor.scheme is None or tensor.scales is None:
                continue
            yield from _check_scales(artifact, tensor.scales)
            yield from _check_codes(artifact, name, tensor)


def _check_scales(artifact: Artifact, name: str) -> Iterator[str]:
    scales = artifact.read_tensor(name)
    wrong = np.argwhere(~(np.isfinite(scales) & (scales > 0)))
    if len(wrong):
        at = [int(index) for index in wrong[0]]
        yield (
            f"{artifact.uri}: {name}: expected scales that are finite and greater than zero, got {scales[*at]} at {at}"
            + (f" and {len(wrong) - 1:,} more" if len(wrong) > 1 else "")
        )


def _check_codes(artifact: Artifact, name: str, tensor: TensorEntry) -> Iterator[str]:
    """int8 codes are never -128, whose byte is 0x80; e4m3fn codes are never NaN, 0x7f or 0xff."""
    is_int = tensor.dtype.name == "int8"
    rows = max(1, _CHUNK_BYTES // max(1, tensor.nbytes // tensor.shape[0]))
    for start in range(0, tensor.shape[0], rows):
        codes = artifact.read_rows(name, start, min(start + rows, tensor.shape[0])).view(np.uint8)
        wrong = codes == 0x80 if is_int else codes & 0x7F == 0x7F
        if wrong.any():
            row = start + int(np.argmax(wrong.any(axis=1)))
            what = "the code -128" if is_int else "NaN"
            yield f"{artifact.uri}: {name}: row {row} holds {what}, which no code may be"
            return
