"""Turns an artifact cut for any number of ranks into the one at tp_size 1, byte for byte as conversion writes it.

Reads each file once, front to back, in windows of rows, and checks it while reading. Knows nothing of sources or rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import google_crc32c
import numpy as np

from podquant.artifact.documents import encode_index
from podquant.artifact.manifest import Manifest, OutputFile, Piece, TensorEntry
from podquant.artifact.naming import CONFIG, HEADER_METADATA, INDEX, MANIFEST
from podquant.artifact.reader import Artifact
from podquant.checkpoint.writer import SafetensorsWriter
from podquant.errors import ArtifactError
from podquant.storage.publication import open_publication
from podquant.storage.space import require_space
from podquant.storage.store import Writer

WINDOW_BYTES = 4 << 20
"""Bytes of rows held at a time, unless a single row is larger."""


@dataclass
class _Checked:
    """Reads the files of an artifact front to back and keeps their checksums."""

    artifact: Artifact
    on_bytes: Callable[[int], None]
    crcs: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)

    def read(self, file: str, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The next `count` bytes of a file."""
        buffer = np.empty(count, np.uint8)
        self.artifact.store.read_into(file, self.ends.setdefault(file, 0), buffer)
        self.ends[file] += count
        self.crcs[file] = google_crc32c.extend(self.crcs.get(file, 0), buffer)
        self.on_bytes(count)
        return buffer

    def finish(self, file: str) -> None:
        """Refuse a file that does not have the manifest's checksum."""
        expected, found = self.artifact.manifest.files[file].crc32c, self.crcs.pop(file, 0)
        if found != expected:
            raise ArtifactError(
                f"{self.artifact.uri}: {file}: expected CRC32C {expected:08x}, as the manifest says, got {found:08x}: "
                "the content has changed. Copy the artifact again"
            )


def merge_artifact(uri: str, target: str, on_bytes: Callable[[int], None] = lambda count: None) -> Manifest:
    """Write at `target` the artifact at tp_size 1 that the one at `uri` was cut from.

    Args:
        on_bytes: called with the bytes read since the last call.

    Raises:
        ArtifactError: `uri` holds no artifact, or one whose content differs from its manifest.
        StorageError: `target` is taken, or bytes cannot be read or written.
    """
    with closing(Artifact.open(uri)) as artifact, open_publication(target) as publication:
        nbytes = sum(file.size for file in artifact.manifest.files.values())
        require_space(publication.uri, nbytes, "the merged artifact")
        checked = _Checked(artifact, on_bytes)
        whole = {name: replace(tensor, pieces=(_uncut(tensor),)) for name, tensor in artifact.tensors.items()}
        names: dict[str, list[str]] = {}
        for name, tensor in whole.items():
            names.setdefault(tensor.pieces[0].file, []).append(name)
        files = {}
        for file in sorted(names):
            files[file] = _merge_file(checked, {name: whole[name] for name in names[file]}, publication.writer(file))
        cut = {piece.file for tensor in artifact.tensors.values() for piece in tensor.pieces}
        for name, file_ in artifact.manifest.files.items():
            if name not in cut and name != INDEX:
                files[name] = _copy(checked, name, file_.size, publication.writer(name))
            if name == CONFIG:
                index = publication.write_small(INDEX, encode_index(whole))
                files[INDEX] = OutputFile(index.nbytes, index.crc32c)
        manifest = replace(artifact.manifest, tp_size=1, files=files, tensors=whole)
        publication.write_small(MANIFEST, manifest.encode())
        publication.publish()
    return manifest


def _uncut(tensor: TensorEntry) -> Piece:
    return Piece(tensor.pieces[0].file.rpartition("/")[2], None, (0,) * len(tensor.shape), tensor.shape)


def _merge_file(checked: _Checked, tensors: Mapping[str, TensorEntry], writer: Writer) -> OutputFile:
    """Write one file of tensors from the pieces that have its name in other folders."""
    pieces = {name: checked.artifact.tensors[name].pieces for name in tensors}
    files = sorted({piece.file for several in pieces.values() for piece in several})
    for file in files:
        checked.read(file, checked.artifact.data_offset(file))
    merged = SafetensorsWriter(
        writer, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], HEADER_METADATA
    )
    for name, tensor in tensors.items():
        for rows in _rows(checked, tensor, pieces[name]):
            merged.append(name, rows)
    merged.close()
    for file in files:
        checked.finish(file)
    return OutputFile(writer.nbytes, writer.crc32c)


def _rows(checked: _Checked, tensor: TensorEntry, pieces: tuple[Piece, ...]) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor in windows of rows, along whichever axis its pieces cut it."""
    if not tensor.shape:
        yield checked.read(pieces[0].file, tensor.nbytes).view(tensor.dtype.numpy).reshape(())
        return
    # Pieces cut along axis 0 are read one after another, those along axis 1 row by row together.
    columns = len(pieces) > 1 and all(piece.shape[0] == tensor.shape[0] for piece in pieces)
    for group in [pieces] if columns else [(piece,) for piece in pieces]:
        rows = group[0].shape[0]
        row_bytes = sum(np.prod(piece.shape[1:], dtype=int) for piece in group) * tensor.dtype.itemsize
        step = max(1, WINDOW_BYTES // max(1, int(row_bytes)))
        for start in range(0, rows, step):
            parts = [_piece_rows(checked, tensor, piece, min(step, rows - start)) for piece in group]
            yield parts[0] if len(parts) == 1 else np.concatenate(parts, axis=_axis(tensor, pieces))


def _piece_rows(checked: _Checked, tensor: TensorEntry, piece: Piece, count: int) -> np.ndarray[Any, Any]:
    shape = (count, *piece.shape[1:])
    nbytes = int(np.prod(shape, dtype=int)) * tensor.dtype.itemsize
    return checked.read(piece.file, nbytes).view(tensor.dtype.numpy).reshape(shape)


def _axis(tensor: TensorEntry, pieces: tuple[Piece, ...]) -> int:
    """The axis along which the pieces cut the tensor."""
    return next(axis for axis, size in enumerate(tensor.shape) if any(piece.shape[axis] != size for piece in pieces))


def _copy(checked: _Checked, name: str, size: int, writer: Writer) -> OutputFile:
    for offset in range(0, size, WINDOW_BYTES):
        writer.write(checked.read(name, min(WINDOW_BYTES, size - offset)))
    writer.close()
    checked.finish(name)
    return OutputFile(writer.nbytes, writer.crc32c)
