"""Writes the weights of an artifact in a form for other software: the same codes and scales in another layout.

The result is a Hugging Face checkpoint, not an artifact; `podquant serve` accepts it as a quantized checkpoint. Rows
are read in windows, each byte once, and compared with the checksums of the manifest before anything appears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from podquant.artifact.compressed_tensors import quantization_config
from podquant.artifact.documents import encode_json
from podquant.artifact.manifest import ModuleRule, TensorEntry
from podquant.artifact.naming import CONFIG, HEADER_METADATA, INDEX, QUALITY, module_of, weight_of
from podquant.artifact.reader import Artifact
from podquant.checkpoint.writer import SafetensorsWriter
from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME, DType
from podquant.errors import ArtifactError, UnsupportedModelError
from podquant.families.modules import kind_of
from podquant.families.registry import is_tied
from podquant.quantize.qarray import QArray
from podquant.storage.publication import Publication, open_publication
from podquant.storage.runs import RecordingStore, adds_up
from podquant.storage.space import require_space

ExportFormat = Literal["pack-quantized", "fp8-block"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = ("pack-quantized", "fp8-block")

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int], None]

_PACKED = Scheme("int8")
_CODES_A_WORD = 4
_SIGN = np.uint8(0x80)


@dataclass(frozen=True)
class _Part:
    """A tensor to write: what it is made from, and how."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    source: str
    how: Literal["copied", "packed", "dequantized", "shape"] = "copied"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_files: of tensors.
        nbytes: of all tensors.
        section: `quantization_config` as written; None if nothing is quantized any more.
    """

    num_files: int
    nbytes: int
    section: Mapping[str, Any] | None


def export_artifact(
    uri: str,
    target: str,
    *,
    form: ExportFormat | None = None,
    portable: bool = False,
    on_bytes: Progress = lambda count: None,
) -> Exported:
    """Write at `target` a checkpoint with the weights of the artifact at `uri`.

    Args:
        form: `pack-quantized`: int8 weight-only packed four to an int32. `fp8-block`: float8 in blocks as DeepSeek
            publishes it; embedding and lm_head in bfloat16, as that form has them. None: as in the artifact.
        portable: write a quantized embedding and lm_head back in bfloat16.
        on_bytes: called with the bytes read since the last call.

    Raises:
        ArtifactError: `uri` holds no artifact, or one whose content differs from its manifest.
        UnsupportedModelError: that form cannot hold the artifact's schemes; names a module.
        StorageError: `target` is taken, or bytes cannot be read or written.
    """
    with closing(Artifact.open(uri)) as opened:
        artifact = replace(opened, store=RecordingStore(opened.store, lambda file: True))
        modules = _decide(artifact, form, portable or form == "fp8-block")
        config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
        tied = is_tied(config, artifact.tensors, f"{artifact.uri}/config.json")
        section = _section(artifact, modules, form, tied)
        if section is not None:
            config["quantization_config"] = section
        files = _files(artifact, modules, form)
        nbytes = sum(_nbytes(part) for parts in files.values() for part in parts)
        with open_publication(target) as publication:
            others = [file.size for name, file in artifact.manifest.files.items() if not name.endswith(".safetensors")]
            require_space(publication.uri, nbytes + sum(others), "the export")
            for file, parts in files.items():
                _write_file(artifact, file, parts, publication, on_bytes)
            _copy_others(artifact, publication, on_bytes)
            _refuse_corrupt(artifact)
            weight_map = {part.name: file for file, parts in files.items() for part in parts}
            index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            publication.write_small(INDEX, encode_json(index))
            publication.write_small(CONFIG, encode_json(config))
            publication.publish()
    return Exported(len(files), nbytes, section)


def _decide(artifact: Artifact, form: ExportFormat | None, portable: bool) -> dict[str, ModuleRule]:
    """The modules as they will be: without a scheme where they are dequantized."""
    modules = {
        name: replace(module, scheme=None) if portable and kind_of(name) in ("embedding", "lm_head") else module
        for name, module in artifact.manifest.modules.items()
    }
    schemes = {name: module.scheme for name, module in modules.items() if module.scheme is not None}
    if form == "pack-quantized":
        fitting = [name for name, scheme in schemes.items() if scheme == _PACKED]
        if not fitting:
            found = ", ".join(sorted({scheme.label for scheme in schemes.values()})) or "nothing quantized"
            raise UnsupportedModelError(
                f"{artifact.uri}: pack-quantized is for int8 weight-only with a scale for each output channel, and the "
                f"artifact holds {found}: other software loads that as it is, see --portable"
            )
        for name in fitting:
            width = artifact.tensors[weight_of(name)].shape[1]
            if width % _CODES_A_WORD:
                raise UnsupportedModelError(
                    f"{artifact.uri}: {name}: {width} columns cannot be packed by fours. Export without --format"
                )
    if form == "fp8-block":
        blocks = {scheme.weight_block_size for scheme in schemes.values()}
        for name, scheme in schemes.items():
            if scheme.weight_dtype != "float8_e4m3fn" or scheme.weight_block_size is None or len(blocks) > 1:
                raise UnsupportedModelError(
                    f"{artifact.uri}: fp8-block is for float8_e4m3fn in blocks of one size, and {name} is "
                    f"{scheme.label}: convert the original with weight_block_size: [128, 128] for all modules"
                )
        if not schemes:
            raise UnsupportedModelError(
                f"{artifact.uri}: fp8-block is for float8 in blocks, and nothing in the artifact is. Leave --format out"
            )
    return modules


def _section(
    artifact: Artifact, modules: Mapping[str, ModuleRule], form: ExportFormat | None, tied: bool
) -> dict[str, Any] | None:
    if form == "fp8-block":
        block = next(module.scheme.weight_block_size for module in modules.values() if module.scheme is not None)
        assert block is not None  # `_decide` has checked
        left = [name for name, module in modules.items() if module.scheme is None and kind_of(name) != "embedding"]
        routers = [name for name in map(module_of, artifact.tensors) if name and kind_of(name) == "router"]
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(block),
            "modules_to_not_convert": list(dict.fromkeys([*left, *routers, *(["lm_head"] if tied else [])])),
        }
    section = quantization_config(modules, tied=tied)
    if form == "pack-quantized" and section is not None:
        for group in section["config_groups"].values():
            weights = group["weights"]
            if (weights["type"], weights["strategy"], group["input_activations"]) == ("int", "channel", None):
                group["format"] = form
        formats = {group["format"] for group in section["config_groups"].values()}
        section["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
    return section


def _files(artifact: Artifact, modules: Mapping[str, ModuleRule], form: ExportFormat | None) -> dict[str, list[_Part]]:
    """The tensors of each file, largest elements first, so that all stay aligned."""
    scales = {tensor.scales for tensor in artifact.tensors.values() if tensor.scales is not None}
    files: dict[str, list[_Part]] = {}
    for name, tensor in artifact.tensors.items():
        if name not in scales:
            file = tensor.pieces[0].file.rpartition("/")[2]
            files.setdefault(file, []).extend(_parts(artifact, name, tensor, modules, form))
    return {
        file: sorted(parts, key=lambda part: -part.dtype.itemsize) for file, parts in sorted(files.items()) if parts
    }


def _parts(
    artifact: Artifact, name: str, tensor: TensorEntry, modules: Mapping[str, ModuleRule], form: ExportFormat | None
) -> Sequence[_Part]:
    copied = _Part(name, tensor.dtype, tensor.shape, name)
    if tensor.scheme is None or tensor.scales is None:
        return [copied]
    module = name.removesuffix(".weight")
    if modules[module].scheme is None:
        return [_Part(name, BY_NAME["bfloat16"], tensor.shape, name, "dequantized")]
    entry = artifact.tensors[tensor.scales]
    scales = _Part(tensor.scales, entry.dtype, entry.shape, tensor.scales)
    if form == "fp8-block":
        return [copied, replace(scales, name=f"{module}.weight_scale_inv")]
    if form == "pack-quantized" and tensor.scheme == _PACKED:
        out, width = tensor.shape
        return [
            _Part(f"{module}.weight_packed", BY_NAME["int32"], (out, width // _CODES_A_WORD), name, "packed"),
            scales,
            _Part(f"{module}.weight_shape", BY_NAME["int64"], (2,), name, "shape"),
        ]
    return [copied, scales]


def _write_file(
    artifact: Artifact, file: str, parts: Sequence[_Part], publication: Publication, on_bytes: Progress
) -> None:
    writer = SafetensorsWriter(
        publication.writer(file), [(part.name, part.dtype, part.shape) for part in parts], HEADER_METADATA
    )
    for part in parts:
        for rows in _rows(artifact, part, on_bytes):
            writer.append(part.name, rows)
    writer.close()


def _rows(artifact: Artifact, part: _Part, on_bytes: Progress) -> Iterator[Array]:
    """A tensor in windows of rows, as it will be written."""
    tensor = artifact.tensors[part.source]
    if part.how == "shape":
        yield np.array(tensor.shape, np.int64)
        return
    if not tensor.shape:
        on_bytes(tensor.nbytes)
        yield artifact.read_tensor(part.source)
        return
    scheme = tensor.scheme if part.how == "dequantized" else None
    block = scheme.weight_block_size if scheme else None
    step = block[0] if block else 1
    scales = artifact.read_tensor(tensor.scales) if scheme and tensor.scales else None
    # Dequantized rows pass through float32.
    row_bytes = max(1, tensor.nbytes // max(1, tensor.shape[0])) * (4 if scheme else 1)
    rows = max(step, artifact.store.window_bytes // row_bytes // step * step)
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        values = artifact.read_rows(part.source, start, stop)
        on_bytes(values.nbytes)
        if scales is not None:
            window = QArray(values, scales[start // step : -(-stop // step)], block)
            values = window.dequantize().astype(part.dtype.numpy)
        elif part.how == "packed":
            # An int32 holds four codes q + 128, the first in its lowest byte: one byte each, in file order.
            values = (values.view(np.uint8) ^ _SIGN).view(part.dtype.numpy)
        yield values


def _copy_others(artifact: Artifact, publication: Publication, on_bytes: Progress) -> None:
    """Tokenizer, chat template and the like, as they are."""
    tensors = {piece.file for tensor in artifact.tensors.values() for piece in tensor.pieces}
    for name, file in artifact.manifest.files.items():
        if name in tensors or name in (CONFIG, INDEX, QUALITY):
            continue
        writer = publication.writer(name)
        for offset in range(0, file.size, artifact.store.window_bytes):
            buffer = np.empty(min(artifact.store.window_bytes, file.size - offset), np.uint8)
            artifact.store.read_into(name, offset, buffer)
            writer.write(buffer)
            on_bytes(buffer.nbytes)
        writer.close()


def _refuse_corrupt(artifact: Artifact) -> None:
    """Refuse files whose bytes, as read, do not have the manifest's checksums."""
    assert isinstance(artifact.store, RecordingStore)
    runs = artifact.store.runs
    for file, whole in artifact.wholes.items():
        if file not in (CONFIG, INDEX, QUALITY) and not adds_up(file, whole, runs):
            raise ArtifactError(
                f"{artifact.uri}: {file}: expected CRC32C {whole.crc32c:08x}, as the manifest says: the content has "
                "changed. Copy the artifact again"
            )


def _nbytes(part: _Part) -> int:
    return int(np.prod(part.shape, dtype=int)) * part.dtype.itemsize
