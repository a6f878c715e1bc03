"""What a conversion will do, decided from config.json, the index and the headers: pure, deterministic, no weight read.

The plan knows every output file with its header before a byte is written, so any unit can be done by anyone, alone, and
gives the same bytes. Knows nothing of how a unit is done or where its files go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podquant.artifact.manifest import ModuleRule, Source, SourceFile
from podquant.artifact.naming import HEADER_METADATA, scales_of, weights_file
from podquant.checkpoint.header import TensorInfo, encode_header
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import QuantizationConfig, UnmatchedRule
from podquant.config.scheme import Scheme
from podquant.convert.compressed_tensors import quantization_config
from podquant.convert.source import Contents, read_contents
from podquant.dtypes import BY_NAME, SOURCE_DTYPES, DType
from podquant.errors import ConfigError, UnsupportedModelError
from podquant.quantize.qarray import scales_shape

UNIT_BYTES = 1 << 30
"""Source bytes a unit holds at most, save for a tensor that is larger by itself."""

WINDOW_BYTES = 2 << 20
"""Source bytes a window of rows holds at most, save for a row (or a row of blocks) that is larger by itself.

Small enough that a window stays in the processor's cache from its read to its write: on two cores of an AMD EPYC with
32 MiB of L3, 3.08 GB of bfloat16 take 0.70 s in windows of 2 MiB, 0.77 s of 1 MiB, 1.1 s of 4 MiB, 1.5 s of 16 MiB."""

Entry = tuple[str, DType, tuple[int, ...]]


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor and what becomes of it: quantized by `scheme`, or copied (None).

    `entries` are the tensors written: codes and scales, or the tensor itself.
    """

    source: TensorInfo
    scheme: Scheme | None
    entries: tuple[Entry, ...]

    def windows(self, window_bytes: int) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the tensor in order; whole rows of blocks, at least one each."""
        if not self.source.shape:
            yield 0, 1
            return
        rows = self.source.shape[0]
        step = self._window_rows(window_bytes)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def window_nbytes(self, window_bytes: int) -> int:
        """Bytes of the largest window."""
        if not self.source.shape or self.source.nbytes == 0:
            return self.source.nbytes
        return min(self._window_rows(window_bytes), self.source.shape[0]) * (self.source.nbytes // self.source.shape[0])

    def _window_rows(self, window_bytes: int) -> int:
        row_bytes = max(1, self.source.nbytes // max(1, self.source.shape[0]))
        block = 1
        if self.scheme is not None and self.scheme.weight_block_size is not None:
            block = self.scheme.weight_block_size[0]
        return max(block, window_bytes // row_bytes // block * block)


@dataclass(frozen=True)
class Unit:
    """Some whole tensors, in source order, and the one output file that they fill."""

    file: str
    tensors: tuple[TensorPlan, ...]

    @property
    def entries(self) -> list[Entry]:
        """The tensors of the output file, in order."""
        return [entry for tensor in self.tensors for entry in tensor.entries]

    @property
    def bytes_in(self) -> int:
        """Source bytes the unit reads."""
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Size of the output file, header and all."""
        return len(encode_header(self.entries, HEADER_METADATA)) + sum(map(entry_nbytes, self.entries))


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        source: name and fingerprint of what is converted.
        config: config.json of the output.
        modules: for every weight matrix, how it is quantized and which rule says so.
        units: in the order of their files.
        unmatched: rules that decide nothing in this model.
        redundant: a tied lm_head stored beside its embedding: left out, after checking that the two are equal.
        copied: files copied unchanged → size.
    """

    source: Source
    config: Mapping[str, Any]
    modules: Mapping[str, ModuleRule]
    units: tuple[Unit, ...]
    unmatched: tuple[UnmatchedRule, ...]
    redundant: tuple[TensorInfo, TensorInfo] | None
    copied: Mapping[str, int]

    @property
    def bytes_in(self) -> int:
        """Source bytes read to be converted."""
        return sum(unit.bytes_in for unit in self.units)

    @property
    def bytes_out(self) -> int:
        """Bytes written, less the few of the manifest and the reports."""
        return sum(unit.bytes_out for unit in self.units) + sum(self.copied.values())

    def refuse_unmatched(self) -> None:
        """Raise ConfigError, naming them all, if a rule decides nothing in this model."""
        if self.unmatched:
            raise ConfigError(
                "; ".join(map(str, self.unmatched)) + ". Correct the rules, or run without --strict-rules"
            )

    def peak_memory(self, workers: int, window_bytes: int = WINDOW_BYTES) -> int:
        """Bytes a worker process holds at most, over what the interpreter and its libraries take.

        Each window in flight holds its source bytes and its codes; scales and row statistics wait for the tensor's end.
        """
        tensors = [tensor for unit in self.units for tensor in unit.tensors]
        window = max((tensor.window_nbytes(window_bytes) for tensor in tensors), default=0)
        held = max((_held_nbytes(tensor) for tensor in tensors), default=0)
        return windows_in_flight(workers) * window * 3 // 2 + held


def windows_in_flight(workers: int) -> int:
    """Windows being read, quantized or written at a time: one for each worker, one ready and one being written."""
    return workers + 2


def entry_nbytes(entry: Entry) -> int:
    """Bytes of a tensor to be written."""
    return math.prod(entry[2]) * entry[1].itemsize


def plan_conversion(
    checkpoint: Checkpoint, rules: QuantizationConfig, *, source_name: str, unit_bytes: int = UNIT_BYTES
) -> Plan:
    """Decide a whole conversion; the same checkpoint and rules give the same plan.

    Args:
        source_name: what the manifest calls the source; nothing that depends on the machine.

    Raises:
        CheckpointError: the checkpoint lacks tensors, or contradicts its config.json.
        UnsupportedModelError: it is already quantized, or a rule asks for what podquant cannot quantize.
        ConfigError: the rules are for a checkpoint that is already quantized.
    """
    contents = read_contents(checkpoint)
    if rules.is_static_checkpoint:
        raise ConfigError(
            f"{rules.name}: is_static_checkpoint says that the checkpoint is already quantized, but "
            f"{checkpoint.store.uri} is not. Use a file without it"
        )
    resolution = rules.resolve([*contents.modules, *contents.fused], tied_embeddings=contents.tied)
    decisions = {name: ModuleRule(each.scheme, each.rule) for name, each in resolution.decisions.items()}
    for name, info in contents.fused.items():
        if decisions[name].scheme is not None:
            _check_quantizable(checkpoint, info, decisions[name])
    modules = {name: decisions[name] for name in contents.modules}
    tensors = _plan_tensors(checkpoint, contents, modules)
    runs = list(_runs(tensors, unit_bytes))
    config = dict(checkpoint.config)
    section = quantization_config(modules, tied=contents.tied)
    if section is not None:
        config["quantization_config"] = section
    return Plan(
        source=Source(
            source_name,
            {name: SourceFile(file.size, file.header_sha256) for name, file in checkpoint.files.items()},
        ),
        config=config,
        modules=modules,
        units=tuple(Unit(weights_file(number, len(runs)), run) for number, run in enumerate(runs, start=1)),
        unmatched=resolution.unmatched,
        redundant=contents.redundant,
        copied={name: checkpoint.store.size(name) for name in checkpoint.other_files},
    )


def encode_json(document: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file of the artifact: a function of the values and their order only."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plan_tensors(
    checkpoint: Checkpoint, contents: Contents, modules: Mapping[str, ModuleRule]
) -> Sequence[TensorPlan]:
    module_by_name = {info.name: module for module, info in contents.modules.items()}
    tensors = []
    for name, info in contents.tensors.items():
        module = module_by_name.get(name)
        scheme = None if module is None else modules[module].scheme
        entries: tuple[Entry, ...] = ((name, info.dtype, info.shape),)
        if module is not None and scheme is not None:
            _check_quantizable(checkpoint, info, modules[module])
            scales = scales_shape((info.shape[0], info.shape[1]), scheme.weight_block_size)
            entries = (
                (name, BY_NAME[scheme.weight_dtype], info.shape),
                (scales_of(module), BY_NAME["float32"], scales),
            )
        tensors.append(TensorPlan(info, scheme, entries))
    return tensors


def _check_quantizable(checkpoint: Checkpoint, info: TensorInfo, decided: ModuleRule) -> None:
    where = f"{checkpoint.store.uri}/{info.file}: {info.name}"
    if info.dtype.name not in SOURCE_DTYPES:
        raise UnsupportedModelError(
            f"{where}: is {info.dtype.name}; only {', '.join(SOURCE_DTYPES)} can be quantized. "
            f"It was chosen by {decided.rule}: keep it with weight_dtype: null"
        )
    if len(info.shape) != 2 or 0 in info.shape:
        raise UnsupportedModelError(
            f"{where}: has the shape {list(info.shape)}; only matrices [out, in] can be quantized yet. "
            f"It was chosen by {decided.rule}: keep it with weight_dtype: null"
        )


def _runs(tensors: Sequence[TensorPlan], unit_bytes: int) -> Iterator[tuple[TensorPlan, ...]]:
    run: list[TensorPlan] = []
    filled = 0
    for tensor in tensors:
        if run and filled + tensor.source.nbytes > unit_bytes:
            yield tuple(run)
            run, filled = [], 0
        run.append(tensor)
        filled += tensor.source.nbytes
    if run:
        yield tuple(run)


def _held_nbytes(tensor: TensorPlan) -> int:
    """Scales, and seven float64 statistics a row."""
    return sum(map(entry_nbytes, tensor.entries[1:])) + (tensor.source.shape[0] * 56 if tensor.scheme else 0)
