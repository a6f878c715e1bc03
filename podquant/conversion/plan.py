"""What a conversion will do, decided from config.json, the index and the headers: pure, deterministic, no weight read.

The plan knows every output file with its header before a byte is written, so any unit can be done by anyone, alone, and
gives the same bytes. Knows nothing of how a unit is done or where its files go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podquant.artifact.compressed_tensors import quantization_config
from podquant.artifact.manifest import ModuleRule, Source, SourceFile
from podquant.artifact.naming import scales_of, weights_file
from podquant.artifact.slices import cut_of, cut_of_scales
from podquant.checkpoint.check import declare_held
from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import QuantizationConfig, UnmatchedRule
from podquant.conversion.contents import Contents, read_contents
from podquant.conversion.memory import worker_nbytes
from podquant.conversion.units import Output, TensorPlan, Unit
from podquant.dtypes import BY_NAME, SOURCE_DTYPES
from podquant.errors import CheckpointError, ConfigError, UnsupportedModelError
from podquant.families.declaration import DiskTensor
from podquant.quantize.qarray import scales_shape

LEAST_UNIT_BYTES, MOST_UNIT_BYTES, _UNITS_AT_LEAST = 64 << 20, 1 << 30, 32
"""Source bytes of a unit: large models in units of 1 GiB, smaller ones in 32, so that hosts can share them, but none in
crumbs. A function of the checkpoint alone, so that the files do not depend on who converts."""


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
        notes: what a user should know before it is carried out, a sentence each.
        tp_size: slices that a tensor is cut into.
    """

    source: Source
    config: Mapping[str, Any]
    modules: Mapping[str, ModuleRule]
    units: tuple[Unit, ...]
    unmatched: tuple[UnmatchedRule, ...]
    redundant: tuple[TensorInfo, TensorInfo] | None
    copied: Mapping[str, int]
    notes: tuple[str, ...] = ()
    tp_size: int = 1

    @property
    def tensors(self) -> list[TensorPlan]:
        """Every tensor, in source order."""
        return [tensor for unit in self.units for tensor in unit.tensors]

    @property
    def bytes_in(self) -> int:
        """Source bytes read to be converted."""
        return sum(unit.bytes_in for unit in self.units)

    @property
    def bytes_out(self) -> int:
        """Bytes written, less the few of the manifest and the reports."""
        return sum(unit.bytes_out for unit in self.units) + sum(self.copied.values())

    @property
    def queue(self) -> list[Unit]:
        """The units in the order to give them out: the largest first, so that none is begun when the others end."""
        return sorted(self.units, key=lambda unit: unit.bytes_in, reverse=True)

    def refuse_unmatched(self) -> None:
        """Raise ConfigError, naming them all, if a rule decides nothing in this model."""
        if self.unmatched:
            raise ConfigError(
                "; ".join(map(str, self.unmatched)) + ". Correct the rules, or run without --strict-rules"
            )

    def peak_memory(self, threads: int, window_bytes: int) -> int:
        """Bytes a worker process holds at most, over what the interpreter and its libraries take; see `memory`."""
        return worker_nbytes(self.units, threads=threads, window_bytes=window_bytes)


def plan_conversion(
    checkpoint: Checkpoint,
    rules: QuantizationConfig,
    *,
    source_name: str,
    tp_size: int = 1,
    unit_bytes: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Decide a whole conversion; the same checkpoint and rules give the same plan.

    Args:
        source_name: what the manifest calls the source; nothing that depends on the machine.
        tp_size: slices to cut every weight into.
        unit_bytes: source bytes a unit holds at most, save for a tensor that is larger by itself; decides which tensors
            share a file. None for what suits the size of the checkpoint.

        notes: what a user should know of the checkpoint, beside what the checkpoint itself says.

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
    tensors = _plan_tensors(checkpoint, contents, modules, tp_size)
    runs = list(_runs(tensors, unit_bytes or _unit_bytes(tensors)))
    config, lost = _without_lost_code(checkpoint)
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
        units=tuple(Unit(weights_file(number, len(runs)), run, tp_size) for number, run in enumerate(runs, start=1)),
        unmatched=resolution.unmatched,
        redundant=contents.redundant,
        copied={name: checkpoint.store.size(name) for name in checkpoint.other_files},
        notes=(*checkpoint.notes, *notes, *lost, *_split_notes(modules)),
        tp_size=tp_size,
    )


_FUSED_ELSEWHERE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that other software loads as one."""


def _split_notes(modules: Mapping[str, ModuleRule]) -> tuple[str, ...]:
    """Modules that the rules quantize differently, and that other software fuses: a note for each group, not layer."""
    found: dict[tuple[str, ...], str] = {}
    for name in modules:
        block, _, last = name.rpartition(".")
        for group in _FUSED_ELSEWHERE:
            schemes = {modules[each].scheme for part in group if (each := f"{block}.{part}") in modules}
            if last == group[0] and len(schemes) > 1:
                found.setdefault(group, block)
    return tuple(
        f"{', '.join(group)} of {block} (and perhaps others) are quantized differently: podquant serves that, other "
        "software fuses them and cannot load it"
        for group, block in found.items()
    )


def _without_lost_code(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json for the artifact, without an `auto_map` whose code is not there to be copied; and what to say of it.

    Code of another repository (`org/name--module.Class`) needs no file here.
    """
    config = dict(checkpoint.config)
    classes = config.get("auto_map")
    if not isinstance(classes, dict):
        return config, ()
    local = [name.partition(".")[0] + ".py" for name in classes.values() if isinstance(name, str) and "--" not in name]
    lost = sorted({file for file in local if file not in checkpoint.other_files})
    if not lost:
        return config, ()
    del config["auto_map"]
    return config, (f"auto_map of config.json is left out: its code, {', '.join(lost)}, is not in the checkpoint",)


def _plan_tensors(
    checkpoint: Checkpoint, contents: Contents, modules: Mapping[str, ModuleRule], tp_size: int
) -> Sequence[TensorPlan]:
    declared = _declared(checkpoint) if tp_size > 1 else {}
    module_by_name = {info.name: module for module, info in contents.modules.items()}
    tensors = []
    for name, info in contents.tensors.items():
        module = module_by_name.get(name)
        scheme = None if module is None else modules[module].scheme
        cut = cut_of(name, info.shape, tp_size, declared.get(name))
        kept = BY_NAME["float32"] if info.dtype.name == "float64" else info.dtype
        outputs: tuple[Output, ...] = (Output(name, kept, info.shape, cut),)
        if module is not None and scheme is not None:
            _check_quantizable(checkpoint, info, modules[module])
            block = scheme.weight_block_size
            scales = scales_shape((info.shape[0], info.shape[1]), block)
            outputs = (
                Output(name, BY_NAME[scheme.weight_dtype], info.shape, cut),
                Output(scales_of(module), BY_NAME["float32"], scales, cut_of_scales(cut, scales, block)),
            )
        tensors.append(TensorPlan(info, scheme, outputs))
    return tensors


def _declared(checkpoint: Checkpoint) -> Mapping[str, DiskTensor]:
    """The tensors that config.json declares; none of a model that podquant cannot run: it is planned, too."""
    try:
        return declare_held(checkpoint.config, checkpoint.tensors, checkpoint.store.uri)[1].tensors
    except CheckpointError:
        return {}


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


def _unit_bytes(tensors: Sequence[TensorPlan]) -> int:
    total = sum(tensor.source.nbytes for tensor in tensors)
    return min(MOST_UNIT_BYTES, max(LEAST_UNIT_BYTES, -(-total // _UNITS_AT_LEAST)))


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
