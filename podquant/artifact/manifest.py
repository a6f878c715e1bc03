"""`podquant.json` as frozen values, and back. FORMAT.md beside this file specifies it.

Knows nothing of storage: bytes in, bytes out. `artifact.reader` (headers) and `artifact.verify` (checksums, values)
check the tensor files themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podquant.artifact.fields import Fields, decode_json
from podquant.artifact.naming import MANIFEST, folder_of, is_safe, scales_of, weight_of
from podquant.config.scheme import Scheme
from podquant.dtypes import BY_DISK_NAME, QUANTIZED_DTYPES, DType
from podquant.errors import ArtifactError
from podquant.foreign import cut, shown
from podquant.quantize.qarray import scales_shape

FORMAT = "podquant-artifact"
VERSION = 1


@dataclass(frozen=True)
class SourceFile:
    """Fingerprint of a source file: its size in bytes and the SHA-256 of its safetensors header (hex)."""

    size: int
    header_sha256: str


@dataclass(frozen=True)
class Source:
    """What was converted: a name that is valid on any machine, and the fingerprint of every file of weights."""

    name: str
    files: Mapping[str, SourceFile]


@dataclass(frozen=True)
class ModuleRule:
    """How one module was quantized (None: kept in its own dtype), and the rule that decided."""

    scheme: Scheme | None
    rule: str


@dataclass(frozen=True)
class OutputFile:
    """Size in bytes and CRC32C of one file of the artifact."""

    size: int
    crc32c: int


@dataclass(frozen=True)
class Piece:
    """The window `[start, start + shape)` of a tensor that one file holds, under the tensor's own name.

    `rank` is the tensor-parallel rank the piece belongs to; None when the tensor is not cut.
    """

    file: str
    rank: int | None
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: global shape, type on disk, and where it is.

    `scheme`, and `scales` (the name of the tensor that holds the scales), are set for the codes of a quantized weight
    and only there.
    """

    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    scheme: Scheme | None = None
    scales: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """Everything an artifact says about itself."""

    written_by: str
    source: Source
    tp_size: int
    modules: Mapping[str, ModuleRule]
    files: Mapping[str, OutputFile]
    tensors: Mapping[str, TensorEntry]

    def encode(self) -> bytes:
        """The bytes of `podquant.json`; depends only on the values and the order of the mappings."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": self.written_by,
            "tp_size": self.tp_size,
            "source": {
                "name": self.source.name,
                "files": {
                    name: {"size": file.size, "header_sha256": file.header_sha256}
                    for name, file in self.source.files.items()
                },
            },
            "modules": {
                name: {"scheme": _encode_scheme(module.scheme), "rule": module.rule}
                for name, module in self.modules.items()
            },
            "files": {name: {"size": file.size, "crc32c": f"{file.crc32c:08x}"} for name, file in self.files.items()},
            "tensors": {name: _encode_tensor(tensor) for name, tensor in self.tensors.items()},
        }
        return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse and validate `podquant.json`.

    Args:
        data: the content of the file.
        where: the artifact's location, for messages.

    Raises:
        ArtifactError: anything FORMAT.md forbids; names the field, what was expected and what was found.
    """
    top = Fields(decode_json(data, f"{where}: {MANIFEST}"), f"{where}: {MANIFEST}")
    _check_version(top)
    top.only("format", "version", "written_by", "tp_size", "source", "modules", "files", "tensors")
    source = top.object("source")
    source.only("name", "files")
    manifest = Manifest(
        written_by=top.string("written_by"),
        tp_size=top.integer("tp_size", at_least=1),
        source=Source(source.string("name"), {name: _source_file(f) for name, f in source.objects("files")}),
        modules={name: _module(fields) for name, fields in top.objects("modules")},
        files={name: _output_file(name, fields) for name, fields in top.objects("files")},
        tensors={name: _tensor(fields) for name, fields in top.objects("tensors")},
    )
    for name, tensor in manifest.tensors.items():
        at = f'{where}: {MANIFEST}: tensors["{name}"]'
        _check_pieces(tensor, manifest, at)
        _check_scheme(name, tensor, manifest, at)
    _check_modules(manifest, f"{where}: {MANIFEST}")
    return manifest


def _check_version(top: Fields) -> None:
    if (found := top.string("format")) != FORMAT:
        raise top.error("format", f'"{FORMAT}"', found)
    if (version := top.integer("version", at_least=1)) != VERSION:
        raise ArtifactError(
            f"{top.where}: format version {version}, written by {cut(top.string('written_by'))}; this podquant reads "
            f"version {VERSION}. Use the podquant that wrote it, or convert the source again"
        )


def _source_file(fields: Fields) -> SourceFile:
    fields.only("size", "header_sha256")
    return SourceFile(fields.integer("size"), fields.hexadecimal("header_sha256", digits=64))


def _module(fields: Fields) -> ModuleRule:
    fields.only("scheme", "rule")
    return ModuleRule(_scheme(fields), fields.string("rule"))


def _output_file(name: str, fields: Fields) -> OutputFile:
    fields.only("size", "crc32c")
    if not is_safe(name):
        raise ArtifactError(f"{fields.where}: expected a name inside the artifact, got {shown(name)}")
    return OutputFile(fields.integer("size"), int(fields.hexadecimal("crc32c", digits=8), 16))


def _tensor(fields: Fields) -> TensorEntry:
    fields.only("dtype", "shape", "scheme", "scales", "pieces")
    if (disk := fields.string("dtype")) not in BY_DISK_NAME:
        raise fields.error("dtype", f"one of {', '.join(BY_DISK_NAME)}", disk)
    return TensorEntry(
        dtype=BY_DISK_NAME[disk],
        shape=fields.integers("shape"),
        scheme=_scheme(fields),
        scales=fields.optional_string("scales"),
        pieces=tuple(_piece(piece) for piece in fields.list_of_objects("pieces")),
    )


def _piece(fields: Fields) -> Piece:
    fields.only("file", "rank", "start", "shape")
    rank = None if fields.is_null("rank") else fields.integer("rank")
    return Piece(fields.string("file"), rank, fields.integers("start"), fields.integers("shape"))


def _scheme(fields: Fields) -> Scheme | None:
    if fields.is_null("scheme"):
        return None
    scheme = fields.object("scheme")
    scheme.only("weight_dtype", "activation_dtype", "weight_block_size")
    weight, activation = scheme.string("weight_dtype"), scheme.optional_string("activation_dtype")
    for key, dtype in (("weight_dtype", weight), ("activation_dtype", activation)):
        if dtype is not None and dtype not in QUANTIZED_DTYPES:
            raise scheme.error(key, f"one of {', '.join(QUANTIZED_DTYPES)}", dtype)
    block: tuple[int, int] | None = None
    if not scheme.is_null("weight_block_size"):
        sizes = scheme.integers("weight_block_size")
        if len(sizes) != 2 or min(sizes) < 1:
            raise scheme.error("weight_block_size", "two positive integers", list(sizes))
        block = (sizes[0], sizes[1])
    return Scheme(weight, activation, block)


def _check_pieces(tensor: TensorEntry, manifest: Manifest, at: str) -> None:
    """The pieces must cut the tensor along at most one axis, in order of ranks, without gap or overlap."""
    pieces, shape = tensor.pieces, tensor.shape
    ranks, tp_size = [piece.rank for piece in pieces], manifest.tp_size
    in_turn = 1 < tp_size == len(ranks) and all(rank == number for number, rank in enumerate(ranks))
    if ranks != [None] and not in_turn:
        expected = "one piece of rank null" + (f", or ranks 0..{manifest.tp_size - 1}" if manifest.tp_size > 1 else "")
        raise ArtifactError(f"{at}: expected {expected} at tp_size {manifest.tp_size}, got ranks {shown(ranks)}")
    axes = {axis for piece in pieces for axis, size in enumerate(piece.shape) if shape[axis : axis + 1] != (size,)}
    if any(len(piece.start) != len(shape) or len(piece.shape) != len(shape) for piece in pieces) or len(axes) > 1:
        raise ArtifactError(f"{at}: expected pieces that cut {list(shape)} along one axis, got {_windows(pieces)}")
    _check_folders(tensor, manifest, at)
    axis = axes.pop() if axes else 0
    end = 0
    for piece in pieces:
        if piece.file not in manifest.files:
            raise ArtifactError(f'{at}: its file "{cut(piece.file)}" is not listed in the manifest')
        if any(start != (end if index == axis else 0) for index, start in enumerate(piece.start)):
            raise ArtifactError(f"{at}: pieces overlap or leave a gap: {_windows(pieces)} of {list(shape)}")
        end += piece.shape[axis] if shape else 0
    if shape and end != shape[axis]:
        raise ArtifactError(f"{at}: pieces cover {end} of {shape[axis]} along axis {axis}: {_windows(pieces)}")


def _check_folders(tensor: TensorEntry, manifest: Manifest, at: str) -> None:
    """Each piece must be in the folder of its rank, in files that differ only in their folders."""
    name = tensor.pieces[0].file.rpartition("/")[2]
    for piece in tensor.pieces:
        if manifest.tp_size > 1 and piece.file != (expected := folder_of(piece.rank, manifest.tp_size) + name):
            raise ArtifactError(
                f'{at}: the piece of rank {piece.rank}: expected it in "{cut(expected)}", got "{cut(piece.file)}"'
            )


def _check_scheme(name: str, tensor: TensorEntry, manifest: Manifest, at: str) -> None:
    """Codes must have the dtype of their scheme, and scales the shape it implies."""
    scheme = tensor.scheme
    if (scheme is None) != (tensor.scales is None):
        raise ArtifactError(f"{at}: expected scheme and scales both set or both null")
    if scheme is None:
        return
    if tensor.dtype.name != scheme.weight_dtype or len(tensor.shape) != 2:
        raise ArtifactError(
            f"{at}: expected a matrix of {scheme.weight_dtype}, as its scheme says, "
            f"got {tensor.dtype.name} {list(tensor.shape)}"
        )
    module = name.removesuffix(".weight")
    scales = manifest.tensors.get(tensor.scales or "")
    if name != weight_of(module) or tensor.scales != scales_of(module) or scales is None:
        raise ArtifactError(
            f'{at}: expected codes "X.weight" with scales "X.weight_scale" in the manifest, got '
            f'"{cut(str(tensor.scales))}"'
        )
    expected = scales_shape((tensor.shape[0], tensor.shape[1]), scheme.weight_block_size)
    if scales.dtype.disk != "F32" or scales.shape != expected or scales.scheme is not None:
        raise ArtifactError(f"{at}: expected scales F32 {list(expected)}, got {scales.dtype.disk} {list(scales.shape)}")
    if module not in manifest.modules:
        raise ArtifactError(f'{at}: its module "{module}" is not a module of the manifest')


def _check_modules(manifest: Manifest, at: str) -> None:
    for module, decided in manifest.modules.items():
        tensor = manifest.tensors.get(weight_of(module))
        if tensor is None:
            raise ArtifactError(f'{at}: modules["{module}"] has no tensor "{weight_of(module)}"')
        if tensor.scheme != decided.scheme:
            raise ArtifactError(
                f'{at}: modules["{module}"] and its tensor disagree: {decided.scheme} and {tensor.scheme}'
            )


def _windows(pieces: tuple[Piece, ...]) -> str:
    return shown([(list(piece.start), list(piece.shape)) for piece in pieces])


def _encode_scheme(scheme: Scheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    block = scheme.weight_block_size
    return {
        "weight_dtype": scheme.weight_dtype,
        "activation_dtype": scheme.activation_dtype,
        "weight_block_size": None if block is None else list(block),
    }


def _encode_tensor(tensor: TensorEntry) -> dict[str, Any]:
    return {
        "dtype": tensor.dtype.disk,
        "shape": list(tensor.shape),
        "scheme": _encode_scheme(tensor.scheme),
        "scales": tensor.scales,
        "pieces": [
            {"file": piece.file, "rank": piece.rank, "start": list(piece.start), "shape": list(piece.shape)}
            for piece in tensor.pieces
        ],
    }
