"""Routed experts that a checkpoint stores in one tensor, as one tensor each: from headers and config.json alone.

transformers 5 computes with all experts of a layer together, and can save them that way: `gate_up_proj` [E, 2F, D],
with an expert's rows of gate before those of up, and `down_proj` [E, D, F], both below `mlp.experts`, in Mixtral too.
In both the bytes of one expert's projection are contiguous: it is a tensor within the tensor, and gets the name it has
where experts are stored one by one. Knows nothing of what they are used for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from podquant.checkpoint.check import MISFIT_ADVICE
from podquant.checkpoint.header import TensorInfo
from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.config import MOST_EXPERTS
from podquant.families.experts import ExpertNames, count_key
from podquant.families.registry import expert_names
from podquant.foreign import shown

_FUSED_BLOCK = "mlp"
"""The block that fused experts of a layer are in, whatever the family calls it otherwise."""


def name_experts(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> dict[str, TensorInfo]:
    """All tensors in order, experts one by one; for families whose fused form is not known, the tensors as they are.

    Args:
        tensors: of the headers, by name.
        config: config.json.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: experts are missing or stored twice, or their number or width is not the one in config.json.
        UnsupportedModelError: they are fused in a form that podquant does not read.
    """
    names = expert_names(config)
    if names is None:
        return dict(tensors)
    inside = re.compile(rf"((?:.+\.)?layers\.\d+)\.(?:{_FUSED_BLOCK}|{names.block})\.(.+)")
    named: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = inside.fullmatch(name)
        parts = _parts(info, f"{match[1]}.{names.block}", match[2], names, config, where) if match else [info]
        for part in parts:
            if part.name in named:
                raise CheckpointError(
                    f"{where}: {part.name} is stored twice: in {named[part.name].file}, and in {info.file} as {name}. "
                    "The files are of two saves: remove the one that does not belong to the checkpoint"
                )
            named[part.name] = part
    _check_complete(named, names, config, where)
    return named


def _parts(
    info: TensorInfo, block: str, leaf: str, names: ExpertNames, config: Mapping[str, Any], where: str
) -> Sequence[TensorInfo]:
    """The tensors in one below a layer's `block`: itself, under the family's name, or those of the experts it fuses."""
    fused = leaf.removeprefix("experts.")
    if fused == leaf or fused[:1].isdigit():
        return [replace(info, name=f"{block}.{leaf}")]
    projections = {"gate_up_proj": (names.gate, names.up), "down_proj": (names.down,)}.get(fused)
    if projections is None:
        raise UnsupportedModelError(
            f"{where}/{info.file}: {info.name} {info.dtype.disk} {list(info.shape)}: of fused experts "
            "podquant reads only gate_up_proj and down_proj, not quantized, without bias: save each expert separately"
        )
    count, width = config.get(count_key(config)), config.get("hidden_size")
    axis = len(projections)  # of D: [E, 2F, D] or [E, D, F]
    fits = len(info.shape) == 3 and info.shape[0] == count and info.shape[axis] == width
    fits = fits and info.nbytes > 0 and info.shape[0] <= MOST_EXPERTS
    rows, odd = divmod(info.shape[1], len(projections)) if fits else (0, 0)
    if not fits or odd:
        form = f"[{shown(count)}, 2F, {shown(width)}]" if axis == 2 else f"[{shown(count)}, {shown(width)}, F]"
        raise CheckpointError(
            f"{where}/{info.file}: {info.name}: expected shape {form}, as {count_key(config)} and hidden_size of "
            f"config.json say, got {list(info.shape)}. {MISFIT_ADVICE}"
        )
    shape = (rows, info.shape[2])
    nbytes = info.nbytes // max(1, info.shape[0] * len(projections))
    modules = [
        f"{block}.experts.{number}.{projection}" for number in range(info.shape[0]) for projection in projections
    ]
    return [
        replace(info, name=f"{module}.weight", shape=shape, offset=info.offset + place * nbytes, nbytes=nbytes)
        for place, module in enumerate(modules)
    ]


def _check_complete(tensors: Iterable[str], names: ExpertNames, config: Mapping[str, Any], where: str) -> None:
    """Every layer that has a router or an expert must have exactly the experts that config.json counts."""
    pattern = re.compile(rf"((?:.+\.)?layers\.(\d+)\.{names.block})\.(?:gate|experts\.(\d+)\.(\w+))\..+")
    layers: dict[str, set[tuple[int, str]]] = {}
    depth, count = config.get("num_hidden_layers"), config.get(count_key(config))
    for name in tensors:
        match = pattern.fullmatch(name)
        # Layers beyond the count predict further tokens and are not run.
        if match is None or (isinstance(depth, int) and int(match[2]) >= depth):
            continue
        found = layers.setdefault(match[1], set())
        if match[3] is not None:
            found.add((int(match[3]), match[4]))
    if not isinstance(count, int):
        return  # the code that needs the number refuses this
    for block, found in layers.items():
        projections = (names.gate, names.up, names.down)
        num_missing = count * len(projections) - sum(number < count and name in projections for number, name in found)
        says = f"config.json says {count_key(config)}: {shown(count)}. {MISFIT_ADVICE}"
        if num_missing > 0:
            wanted = ((number, name) for number in range(count) for name in projections)
            tensor = "{}.experts.{}.{}.weight".format(block, *next(each for each in wanted if each not in found))
            more = f" and {num_missing - 1} more" if num_missing > 1 else ""
            raise CheckpointError(f"{where}: tensor {tensor} is missing{more}: {says}")
        if found and (most := max(found)[0]) >= count:
            raise CheckpointError(f"{where}: {block}.experts.{most} is there, but {says}")
