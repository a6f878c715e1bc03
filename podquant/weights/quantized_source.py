"""A checkpoint that other software quantized, as a source of weights: served as it is, nothing is quantized again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from podquant.artifact.naming import scales_of, weight_of
from podquant.checkpoint.check import Held
from podquant.checkpoint.fingerprint import Fingerprint, fingerprint
from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.quantization import Quantization
from podquant.checkpoint.quantized import (
    QuantizedWeight,
    check_scales,
    find_quantized,
    parts_of,
    read_codes,
    read_scales,
)
from podquant.checkpoint.versions import refuse_changed_since
from podquant.config.rules import QuantizationConfig
from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME, DType
from podquant.errors import ConfigError, PodquantError, StorageError
from podquant.families.modules import kind_of
from podquant.families.registry import is_tied
from podquant.quantize.qarray import QArray
from podquant.storage.runs import RecordingStore, Whole
from podquant.weights.hostmemory import empty
from podquant.weights.plain import read_plain

Array = np.ndarray[Any, np.dtype[Any]]

CHANGED = "while it was loaded. Let nothing write to the checkpoint, and start again"
"""What is said of a file that is not what it was."""


class _Quantized(NamedTuple):
    """Codes, or their scales, as a `Held`."""

    dtype: DType
    shape: tuple[int, ...]


class QuantizedSource:
    """Codes and scales under the names an artifact gives them, `X.weight` and `X.weight_scale`, whatever the form.

    Args:
        checkpoint: the opened checkpoint.
        quantization: what its config.json says.
        rules: with `is_static_checkpoint`: must mean the same weights, and then decides what becomes of activations.
            None for what the checkpoint says of them.
        allow_nonfinite: read NaN and infinities where it is not quantized, instead of refusing them.

    Raises:
        CheckpointError: its tensors contradict its config.json.
        ConfigError: the rules do not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        rules: QuantizationConfig | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._allow_nonfinite = allow_nonfinite
        self.store = RecordingStore(checkpoint.store, lambda file: checkpoint.store.known_crc32c(file) is not None)
        self._quantization = quantization
        self._weights = find_quantized(checkpoint.tensors, quantization, checkpoint.store.uri)
        self._codes = {weight_of(module): weight for module, weight in self._weights.items()}
        self._scales = {scales_of(module): weight for module, weight in self._weights.items()}
        self._single: dict[str, Array] = {}
        self._lock = Lock()
        self._schemes = {module: self._scheme(module, weight) for module, weight in self._weights.items()}
        if rules is not None:
            self._schemes = self._ruled(rules)

    def _scheme(self, module: str, weight: QuantizedWeight) -> Scheme:
        """A tied embedding is a head as well, whose group says what becomes of its activations."""
        scheme = weight.stored.scheme
        head = self._quantization.stored("lm_head") if self._tied and kind_of(module) == "embedding" else None
        if head is not None and replace(head.scheme, activation_dtype=None) == replace(scheme, activation_dtype=None):
            return head.scheme
        return scheme

    def _ruled(self, rules: QuantizationConfig) -> dict[str, Scheme]:
        where = self.store.uri
        if not rules.is_static_checkpoint:
            raise ConfigError(
                f"{where} is already quantized ({self._quantization.method}) and is served as it is: leave "
                f"{rules.name} out, or give a file with is_static_checkpoint: true that says the same"
            )
        modules = [name.removesuffix(".weight") for name in self._checkpoint.tensors if name.endswith(".weight")]
        modules = list(dict.fromkeys([*self._weights, *modules]))
        decisions = rules.resolve(modules, tied_embeddings=self._tied).decisions
        for module, weight in self._weights.items():
            wanted, stored = decisions[module].scheme, weight.stored.scheme
            if wanted is None or replace(wanted, activation_dtype=None) != replace(stored, activation_dtype=None):
                label = wanted.label if wanted else "not quantized"
                raise ConfigError(
                    f"{where}: {module} is {stored.label} there and {label} by {decisions[module].rule}: "
                    "correct the rule, or leave the quantization config out to serve the checkpoint as it is"
                )
        return {module: scheme for module in self._weights if (scheme := decisions[module].scheme) is not None}

    @property
    def _tied(self) -> bool:
        return is_tied(self.config, self._checkpoint.tensors, f"{self.store.uri}/config.json")

    @property
    def config(self) -> Mapping[str, Any]:
        return self._checkpoint.config

    @cached_property
    def tensors(self) -> Mapping[str, Held]:
        stored = {part for module in self._weights for part in parts_of(module)}
        plain = {name: info for name, info in self._checkpoint.tensors.items() if name not in stored}
        codes = {
            name: _Quantized(BY_NAME[weight.stored.scheme.weight_dtype], weight.shape)
            for name, weight in self._codes.items()
        }
        scales = {name: _Quantized(weight.scales.dtype, weight.scales_shape) for name, weight in self._scales.items()}
        return {**plain, **codes, **scales}

    @property
    def notes(self) -> tuple[str, ...]:
        return self._checkpoint.notes

    @property
    def num_bytes(self) -> int:
        return sum(info.nbytes for info in self._checkpoint.tensors.values())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self._checkpoint, self._schemes)

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
        return self._schemes.get(module)

    def itemsize_of(self, tensor: str) -> int:
        """As on disk; a scale that all rows share takes nothing there for each of them."""
        if weight := self._codes.get(tensor):
            return BY_NAME[weight.stored.scheme.weight_dtype].itemsize
        if weight := self._scales.get(tensor):
            return 0 if weight.has_one_scale else weight.scales.dtype.itemsize
        return self._checkpoint.tensors[tensor].dtype.itemsize

    def quantizes(self, module: str) -> bool:
        return False

    def column_bounds(self, tensor: str) -> tuple[int, ...]:
        return (0, self.tensors[tensor].shape[1])

    def read_rows(self, tensor: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Array:
        if weight := self._codes.get(tensor):
            out = empty((stop - start, weight.shape[1]), BY_NAME[weight.stored.scheme.weight_dtype].numpy)
            return read_codes(self.store, weight, start, stop, out)
        if weight := self._scales.get(tensor):
            if weight.has_one_scale:
                return np.broadcast_to(self._one_scale(tensor, weight), (stop - start, 1))
            scales = read_scales(self.store, weight, start, stop)
            check_scales(self._checkpoint.store, weight, start, scales)
            return scales
        info = self._checkpoint.tensors[tensor]
        return read_plain(self.store, info, start, stop, allow_nonfinite=self._allow_nonfinite)

    def _one_scale(self, tensor: str, weight: QuantizedWeight) -> Array:
        """[1, 1], read once and past the record: the record is of bytes that one process reads, this is for all."""
        with self._lock:
            if tensor not in self._single:
                self._single[tensor] = read_scales(self._checkpoint.store, weight, 0, 1)
                check_scales(self._checkpoint.store, weight, 0, self._single[tensor])
            return self._single[tensor]

    def read_quantized(self, module: str, start: int, stop: int) -> QArray:
        raise AssertionError(f"{module} is quantized already")

    def close(self) -> None:
        self._checkpoint.close()
