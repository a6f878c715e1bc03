"""Opens an artifact, validates everything it says about itself, and reads rows of its tensors.

Opening reads the manifest, config.json and the header of every file of tensors, but no tensor: `artifact.verify` checks
checksums and values. Knows nothing of how an artifact is made, or of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from podquant.artifact.fields import Fields, decode_json
from podquant.artifact.manifest import Manifest, Piece, TensorEntry, parse_manifest
from podquant.artifact.naming import CONFIG, MANIFEST, QUALITY
from podquant.checkpoint.header import Header, TensorInfo, read_header
from podquant.checkpoint.reader import read_rows, read_whole
from podquant.errors import ArtifactError
from podquant.foreign import MOST_JSON_BYTES
from podquant.storage.publication import refuse_half_replaced
from podquant.storage.runs import Run, Whole
from podquant.storage.store import Store, open_store

_MOST_MANIFEST = 2 << 30
"""With 160 bytes for each slice of a tensor: 88,000 tensors in 128 slices have some 1.8 GB."""

_FIGURES = ("sqnr_db", "max_error_ratio", "zeros_share", "scale_min", "scale_max")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Artifact:
    """An opened artifact; `close()` it when done.

    Attributes:
        store: where its bytes are.
        manifest: what it says about itself.
        config: config.json, quantization_config included.
    """

    store: Store
    manifest: Manifest
    config: dict[str, Any]
    _headers: Mapping[str, Header]

    @classmethod
    def open(cls, uri: str) -> Artifact:
        """Open the artifact in a directory.

        Raises:
            ArtifactError: it is not an artifact, is of another version, or breaks FORMAT.md.
            StorageError: a file cannot be read.
            CheckpointError: a file of tensors is not valid safetensors.
        """
        store = open_store(uri)
        try:
            manifest = read_manifest(store)
            sizes = store.list()
            for name, file in manifest.files.items():
                check_size(store, name, file.size, sizes)
            if CONFIG not in manifest.files:
                raise ArtifactError(f"{store.uri}: {CONFIG} is not listed in the manifest")
            config = decode_json(store.read(CONFIG, MOST_JSON_BYTES), f"{store.uri}: {CONFIG}")
            expected = pieces_by_file(manifest)
            headers = {file: read_header(store, file) for file in expected}
            for place, pieces in expected.items():
                for problem in compare_header(headers[place], pieces):
                    raise ArtifactError(f"{store.uri}: {place}: {problem}")
        except BaseException:
            store.close()
            raise
        return cls(store, manifest, config, headers)

    @property
    def uri(self) -> str:
        """The place, in full."""
        return self.store.uri

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor: global shape, dtype, and for codes their scheme and the name of their scales."""
        return self.manifest.tensors

    def read_rows(
        self, name: str, start: int, stop: int, out: Array | None = None, columns: tuple[int, int] | None = None
    ) -> Array:
        """Rows `start` to `stop` (along axis 0) of a tensor, assembled from its pieces if it is cut.

        Args:
            out: filled and returned when given: C-contiguous, of the rows' shape and the tensor's NumPy dtype. Bytes
                of a tensor that is not cut, or is cut along axis 0, go straight into it. Several threads may read.
            columns: only these along axis 1, where the tensor is cut along it; no other piece is read.

        Raises:
            ArtifactError: no such tensor or rows, or a piece holds only some of the columns.
            StorageError: the bytes cannot be read.
        """
        tensor = self._tensor(name)
        if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
            raise ArtifactError(f"{self.uri}: {name}: no rows [{start}, {stop}) in shape {list(tensor.shape)}")
        pieces, shift, inner = tensor.pieces, 0, tensor.shape[1:]
        if columns is not None:
            bounds = self.column_bounds(name)
            if not set(columns) <= set(bounds):
                raise ArtifactError(
                    f"{self.uri}: {name}: columns {list(columns)} are not whole pieces of {list(bounds)}"
                )
            shift, inner = columns[0], (columns[1] - columns[0],)
            pieces = tuple(piece for piece in pieces if columns[0] <= piece.start[1] < columns[1])
        if len(pieces) == 1:
            return read_rows(self.store, self._info(name, pieces[0]), start, stop, out)
        if out is None:
            out = np.empty((stop - start, *inner), tensor.dtype.numpy)
        for piece in pieces:
            first, last = max(start, piece.start[0]), min(stop, piece.start[0] + piece.shape[0])
            if first >= last:
                continue
            info, rows = self._info(name, piece), (first - piece.start[0], last - piece.start[0])
            window = out[first - start : last - start]
            if piece.shape[1:] == inner:
                read_rows(self.store, info, *rows, out=window)
            else:
                box = tuple(slice(s, s + n) for s, n in zip(piece.start[1:], piece.shape[1:], strict=True))
                box = (slice(box[0].start - shift, box[0].stop - shift), *box[1:])
                window[(slice(None), *box)] = read_rows(self.store, info, *rows)
        return out

    def column_bounds(self, name: str) -> tuple[int, ...]:
        """Where the pieces of a matrix begin and end along axis 1."""
        tensor = self._tensor(name)
        ends = {piece.start[1] + piece.shape[1] for piece in tensor.pieces}
        return tuple(sorted({0} | ends))

    def read_tensor(self, name: str) -> Array:
        """A whole tensor; for small ones."""
        tensor = self._tensor(name)
        if tensor.shape:
            return self.read_rows(name, 0, tensor.shape[0])
        info = self._info(name, tensor.pieces[0])
        return read_whole(self.store, info)

    def read_quality(self) -> dict[str, dict[str, float | None]]:
        """What quantization did to each weight: the figures of `quality.json`, by tensor.

        Raises:
            ArtifactError: there is no such file, or it holds something else.
        """
        where = f"{self.uri}: {QUALITY}"
        if QUALITY not in self.manifest.files:
            raise ArtifactError(f"{where}: is not listed in the manifest")
        top = Fields(decode_json(self.store.read(QUALITY, MOST_JSON_BYTES), where), where)
        return {name: {key: fields.number(key) for key in _FIGURES} for name, fields in top.objects("tensors")}

    @property
    def wholes(self) -> dict[str, Whole]:
        """Every file of the manifest as it should be, with the header read of it."""
        return {
            name: Whole(file.size, file.crc32c, self._head(name)) for name, file in sorted(self.manifest.files.items())
        }

    def data_offset(self, file: str) -> int:
        """Where the first tensor begins in a file of tensors."""
        return self._headers[file].data_offset

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _tensor(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise ArtifactError(f"{self.uri}: no tensor {name!r}")
        return self.tensors[name]

    def _head(self, file: str) -> Run | None:
        header = self._headers.get(file)
        return None if header is None else Run(file, 0, header.data_offset, header.crc32c)

    def _info(self, name: str, piece: Piece) -> TensorInfo:
        return self._headers[piece.file].tensors[name]


def read_manifest(store: Store) -> Manifest:
    """The manifest of the artifact in `store`, validated.

    Raises:
        ArtifactError: there is none, or it breaks FORMAT.md.
    """
    if MANIFEST not in store.list():
        refuse_half_replaced(store.uri)
        raise ArtifactError(
            f"{store.uri}: no {MANIFEST}, so no artifact (an unfinished conversion leaves none). "
            "Give a directory that podquant convert wrote"
        )
    return parse_manifest(store.read(MANIFEST, _MOST_MANIFEST), store.uri)


def check_size(store: Store, name: str, size: int, sizes: Mapping[str, int]) -> None:
    """Refuse a file that is absent or has another size than the manifest says."""
    if name not in sizes:
        raise ArtifactError(f"{store.uri}: {name} is missing. Copy the artifact again")
    if sizes[name] != size:
        raise ArtifactError(
            f"{store.uri}: {name}: expected {size:,} bytes, as the manifest says, got {sizes[name]:,}. "
            "Copy the artifact again"
        )


def pieces_by_file(manifest: Manifest) -> dict[str, dict[str, tuple[TensorEntry, Piece]]]:
    """For each file of tensors, the pieces that the manifest places in it, by tensor."""
    files: dict[str, dict[str, tuple[TensorEntry, Piece]]] = {}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            files.setdefault(piece.file, {})[name] = (tensor, piece)
    return files


def compare_header(header: Header, pieces: Mapping[str, tuple[TensorEntry, Piece]]) -> list[str]:
    """Where a file's header and the manifest disagree, each as a sentence; empty when they agree."""
    problems = []
    for name, (tensor, piece) in pieces.items():
        found = header.tensors.get(name)
        if found is None:
            problems.append(f"the tensor {name} is missing, which the manifest places here")
        elif (found.dtype, found.shape) != (tensor.dtype, piece.shape):
            problems.append(
                f"{name}: expected {tensor.dtype.disk} {list(piece.shape)}, as the manifest says, "
                f"got {found.dtype.disk} {list(found.shape)}"
            )
    problems += [
        f"holds {name}, which the manifest does not place here" for name in header.tensors if name not in pieces
    ]
    if not problems and (late := [a for a, b in zip(header.tensors, pieces, strict=True) if a != b]):
        problems.append(f"{late[0]} is not where the order of the manifest places it")
    return problems
