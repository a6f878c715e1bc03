"""Where weights come from: an artifact, a checkpoint as it is, or a checkpoint quantized while it is read.

All look alike to the loader, and the last gives bit for bit what converting first would have given. A checkpoint that
other software quantized is `runtime.quantized_source`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from podquant.artifact.naming import MANIFEST, module_of, weight_of
from podquant.artifact.reader import Artifact
from podquant.checkpoint.check import CheckedModel, Held, check_headers, check_model
from podquant.checkpoint.fingerprint import Fingerprint, fingerprint
from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.quantization import read_quantization
from podquant.checkpoint.scales import refuse_wrong_scales
from podquant.checkpoint.versions import refuse_changed_since
from podquant.config.rules import QuantizationConfig, Resolution
from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME
from podquant.errors import (
    ArtifactError,
    ConfigError,
    NonFiniteWeightError,
    PodquantError,
    StorageError,
)
from podquant.families.declaration import Declaration
from podquant.families.registry import is_tied
from podquant.quantize.qarray import QArray, scales_shape
from podquant.quantize.weights import quantize_window
from podquant.storage.runs import RecordingStore, Whole
from podquant.storage.store import open_store
from podquant.weights.hostmemory import empty
from podquant.weights.plain import read_plain
from podquant.weights.quantized_source import CHANGED, QuantizedSource

Array = np.ndarray[Any, np.dtype[Any]]


class WeightSource(Protocol):
    """Weights by name, in the shapes they have on disk. Several threads may read."""

    @property
    def store(self) -> RecordingStore:
        """Where the bytes are, and what was read of them: tensors only, and what is asked of it directly."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""

    @property
    def tensors(self) -> Mapping[str, Held]:
        """All of them by name; quantized ones as an artifact has them: codes `X.weight` and scales `X.weight_scale`."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it was opened, a sentence each."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors on disk."""

    @property
    def wholes(self) -> Mapping[str, Whole]:
        """The files whose checksums are known, by name."""

    def corrupted(self, file: str) -> PodquantError:
        """The error to raise when the bytes read of one of these files do not have its checksum."""

    def refuse_changed(self) -> None:
        """Raise StorageError if files of which no checksum is known have changed since the source was opened."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Of what will be loaded: tells it from other weights of the same names, shapes and types.

        Raises:
            StorageError: bytes cannot be read, of a checkpoint whose storage keeps no checksums.
        """

    def scheme_of(self, module: str) -> Scheme | None:
        """How a module's weight comes: quantized under a scheme, or plain."""

    def itemsize_of(self, tensor: str) -> int:
        """Bytes of an element on disk."""

    def quantizes(self, module: str) -> bool:
        """Whether a module is quantized while it is read: `read_quantized` gives codes and scales together."""

    def column_bounds(self, tensor: str) -> tuple[int, ...]:
        """Where along axis 1 a matrix is cut on disk: from 0 to its width."""

    def read_rows(self, tensor: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Array:
        """Rows of a tensor as it is on disk; only some columns, where it is cut at both bounds."""

    def read_quantized(self, module: str, start: int, stop: int) -> QArray:
        """Rows of a module that is quantized while it is read; from a multiple of a block's rows to one, or the end."""

    def close(self) -> None:
        """Release the files."""


class CheckpointSource:
    """A Hugging Face checkpoint, quantized window by window as it is read if there are rules.

    Args:
        checkpoint: the opened checkpoint, not quantized yet.
        rules: how to quantize, None to leave everything as it is.
        allow_nonfinite: see `open_source`.

    Attributes:
        resolution: what the rules decided, None without rules.
    """

    def __init__(
        self, checkpoint: Checkpoint, rules: QuantizationConfig | None, *, allow_nonfinite: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._allow_nonfinite = allow_nonfinite
        self.store = RecordingStore(checkpoint.store, lambda file: checkpoint.store.known_crc32c(file) is not None)
        self.resolution: Resolution | None = None
        if rules is not None:
            modules = [
                module
                for name, info in checkpoint.tensors.items()
                if (module := module_of(name)) is not None and len(info.shape) >= 2
            ]
            tied = is_tied(checkpoint.config, self.tensors, f"{checkpoint.store.uri}/config.json")
            self.resolution = rules.resolve(modules, tied_embeddings=tied)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._checkpoint.config

    @property
    def tensors(self) -> Mapping[str, Held]:
        return self._checkpoint.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        return self._checkpoint.notes

    @property
    def num_bytes(self) -> int:
        return sum(info.nbytes for info in self._checkpoint.tensors.values())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        decisions = self.resolution.decisions if self.resolution else {}
        return fingerprint(self._checkpoint, {module: decided.scheme for module, decided in decisions.items()})

    @property
    def wholes(self) -> Mapping[str, Whole]:
        """Those of which the storage keeps a checksum."""
        return self._checkpoint.wholes

    def corrupted(self, file: str) -> PodquantError:
        return StorageError(
            f"{self.store.uri}/{file}: the bytes read do not have the CRC32C that the store keeps: they were "
            "corrupted in transit. Start again"
        )

    def refuse_changed(self) -> None:
        refuse_changed_since(self.store.uri, self._checkpoint.versions, CHANGED)

    def scheme_of(self, module: str) -> Scheme | None:
        decision = self.resolution.decisions.get(module) if self.resolution else None
        return decision.scheme if decision else None

    def itemsize_of(self, tensor: str) -> int:
        return self._checkpoint.tensors[tensor].dtype.itemsize

    def quantizes(self, module: str) -> bool:
        return self.scheme_of(module) is not None

    def column_bounds(self, tensor: str) -> tuple[int, ...]:
        return (0, self._checkpoint.tensors[tensor].shape[1])

    def read_rows(self, tensor: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Array:
        info = self._checkpoint.tensors[tensor]
        return read_plain(self.store, info, start, stop, allow_nonfinite=self._allow_nonfinite)

    def read_quantized(self, module: str, start: int, stop: int) -> QArray:
        info = self._checkpoint.tensors[weight_of(module)]
        scheme = self.scheme_of(module)
        assert scheme is not None  # else there is nothing to quantize
        rows = read_plain(self.store, info, start, stop, allow_nonfinite=True)  # quantizing refuses them itself
        block = scheme.weight_block_size
        scales = np.empty(scales_shape((len(rows), info.shape[1]), block), np.float32)
        out = QArray(empty((len(rows), info.shape[1]), BY_NAME[scheme.weight_dtype].numpy), scales, block)
        try:
            return quantize_window(rows, scheme, first_row=start, total_rows=info.shape[0], out=out)[0]
        except NonFiniteWeightError as error:
            raise NonFiniteWeightError(f"{self.store.uri}/{info.file}: {info.name}: {error}") from None

    def close(self) -> None:
        self._checkpoint.close()


class ArtifactSource:
    """An artifact: every tensor as conversion left it."""

    def __init__(self, artifact: Artifact) -> None:
        self.store = RecordingStore(artifact.store, lambda file: True)
        self._artifact = replace(artifact, store=self.store)
        self._unrecorded = artifact
        self._codes = {entry.scales: name for name, entry in artifact.tensors.items() if entry.scales is not None}

    @property
    def config(self) -> Mapping[str, Any]:
        return self._artifact.config

    @property
    def tensors(self) -> Mapping[str, Held]:
        return self._artifact.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._artifact.tensors.values())

    @property
    def wholes(self) -> Mapping[str, Whole]:
        """All files of the manifest."""
        return self._artifact.wholes

    def corrupted(self, file: str) -> PodquantError:
        return ArtifactError(
            f"{self.store.uri}: {file}: the bytes read do not have the CRC32C "
            f"{self._artifact.manifest.files[file].crc32c:08x} of the manifest. Copy the artifact again"
        )

    def refuse_changed(self) -> None:
        """The manifest holds the checksums of all files."""

    @property
    def fingerprint(self) -> Fingerprint:
        """The manifest holds the checksums of all files, wherever they are; loading checks that they have them."""
        return Fingerprint(hashlib.sha256(self._artifact.manifest.encode()).hexdigest(), "manifest")

    def scheme_of(self, module: str) -> Scheme | None:
        tensor = self._artifact.tensors.get(weight_of(module))
        return tensor.scheme if tensor else None

    def itemsize_of(self, tensor: str) -> int:
        return self._artifact.tensors[tensor].dtype.itemsize

    def quantizes(self, module: str) -> bool:
        return False

    def column_bounds(self, tensor: str) -> tuple[int, ...]:
        return self._artifact.column_bounds(tensor)

    def read_rows(self, tensor: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Array:
        entry = self._artifact.tensors[tensor]
        inner = entry.shape[1:] if columns is None else (columns[1] - columns[0],)
        out = empty((stop - start, *inner), entry.dtype.numpy)
        rows = self._artifact.read_rows(tensor, start, stop, out, columns)
        if (codes := self._codes.get(tensor)) is not None:
            self._check_scales(tensor, codes, start, rows)
        return rows

    def _check_scales(self, tensor: str, codes: str, start: int, scales: Array) -> None:
        entry = self._artifact.tensors[codes]
        block = entry.scheme.weight_block_size if entry.scheme else None

        def read_codes(first: int, last: int) -> Array:
            return self._unrecorded.read_rows(codes, first, min(last, entry.shape[0]))

        refuse_wrong_scales(scales, start, f"{self._artifact.uri}: {tensor}", read_codes, block, ArtifactError)

    def read_quantized(self, module: str, start: int, stop: int) -> QArray:
        raise AssertionError(f"{module} is quantized already")

    def close(self) -> None:
        self._artifact.close()


def open_source(uri: str, rules: QuantizationConfig | None = None, *, allow_nonfinite: bool = False) -> WeightSource:
    """Open an artifact or a checkpoint, which may be quantized already.

    Args:
        uri: a directory; one with a manifest is an artifact.
        rules: quantize a checkpoint by these while reading it.
        allow_nonfinite: read NaN and infinities of a checkpoint where it is not quantized, instead of refusing them.

    Raises:
        ConfigError: rules that contradict an artifact or a checkpoint that is quantized already.
        UnsupportedModelError: the checkpoint is quantized in a way that podquant does not serve.
        ArtifactError, CheckpointError, StorageError: it cannot be opened.
    """
    store = open_store(uri)
    try:
        is_artifact = MANIFEST in store.list()
    finally:
        store.close()
    uri = store.uri  # a branch of the hub is a commit now, and stays that
    if not is_artifact:
        return _open_checkpoint(uri, rules, allow_nonfinite)
    artifact = Artifact.open(uri)
    if rules is not None and (difference := _contradiction(artifact, rules)):
        artifact.close()
        raise ConfigError(
            f"{uri} is an artifact, quantized already, and {rules.name} contradicts its manifest: {difference}; leave "
            "the quantization config out to serve the artifact as it is, or convert the original checkpoint again"
        )
    return ArtifactSource(artifact)


def _open_checkpoint(uri: str, rules: QuantizationConfig | None, allow_nonfinite: bool) -> WeightSource:
    checkpoint = Checkpoint.open(uri)
    try:
        quantization = read_quantization(checkpoint.config, f"{checkpoint.store.uri}/config.json")
        if quantization is None:
            return CheckpointSource(checkpoint, rules, allow_nonfinite=allow_nonfinite)
        return QuantizedSource(checkpoint, quantization, rules, allow_nonfinite=allow_nonfinite)
    except BaseException:
        checkpoint.close()
        raise


def _contradiction(artifact: Artifact, rules: QuantizationConfig) -> str | None:
    """The first module that rules and manifest decide differently, in words."""
    modules = artifact.manifest.modules
    tied = is_tied(artifact.config, artifact.tensors, f"{artifact.uri}/config.json")
    decisions = rules.resolve(list(modules), tied_embeddings=tied).decisions
    for module, decided in modules.items():
        wanted = decisions[module].scheme
        if wanted != decided.scheme:
            return f"{module} is {_label(decided.scheme)} there and {_label(wanted)} by the rules"
    return None


def _label(scheme: Scheme | None) -> str:
    return scheme.label if scheme else "not quantized"


def check_source(
    source: WeightSource, tp_size: int = 1, ep_size: int = 1, *, allow_extra: bool = False
) -> CheckedModel:
    """Check that a source holds a model that can be run, and that it can be laid out so. Nothing is read.

    An artifact may hold what its model does not use: whoever converted it has allowed that.

    Raises:
        PodquantError: see `check_model`.
    """
    return check_model(
        source.config,
        source.tensors,
        source.store.uri,
        tp_size=tp_size,
        ep_size=ep_size,
        is_quantized=partial(_is_stored_quantized, source),
        allow_extra=allow_extra or isinstance(source, ArtifactSource),
    )


def require_weights(declaration: Declaration, source: WeightSource) -> None:
    """Check that a source has every weight of a model.

    Raises:
        CheckpointError: see `check_headers`.
    """
    check_headers(declaration, source.tensors, source.store.uri, partial(_is_stored_quantized, source))


def _is_stored_quantized(source: WeightSource, module: str) -> bool:
    return source.scheme_of(module) is not None and not source.quantizes(module)
