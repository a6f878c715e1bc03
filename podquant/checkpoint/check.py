"""Whether headers hold the model that config.json describes: every weight that is declared, with its shape and type,
and nothing that looks like a weight beside them.

The same for a checkpoint before it is planned or converted and for whatever is about to be loaded, so that all refuse
the same in the same words. Knows nothing of where tensors are, and reads none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from podquant.checkpoint.extras import further_note, sort_extras
from podquant.dtypes import SOURCE_DTYPES, DType
from podquant.errors import CheckpointError
from podquant.families.config import ModelConfig
from podquant.families.declaration import Declaration, declare
from podquant.families.layout import plan_layout
from podquant.families.registry import read_model_config

MISFIT_ADVICE = "The files do not hold the model that config.json describes: correct config.json, or use its own files"
"""What to do where config.json and the headers differ, and the bytes are as they were written."""


class Held(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def dtype(self) -> DType:
        """On disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""


def check_headers(
    declaration: Declaration,
    tensors: Mapping[str, Held],
    where: str,
    is_quantized: Callable[[str], bool] = lambda module: False,
) -> tuple[str, ...]:
    """Check that every weight of a model is there, with the shape that config.json implies, in floats or as codes.

    Args:
        declaration: of the model.
        tensors: by name; the codes of a quantized matrix [out, in] as `{module}.weight`, however they are stored.
        where: the checkpoint or artifact, for messages.
        is_quantized: whether a module, by its name on disk, holds codes and scales that belong together.

    Returns:
        Names of the tensors that hold neither a weight nor scales of one, in the order of `tensors`.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or type; names the first, and counts the others.
    """
    needed = declaration.tensors
    missing = [name for name in needed if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor {missing[0]} is missing{more}: expected shape {list(needed[missing[0]].shape)} of a "
            f"{declaration.architecture}. {MISFIT_ADVICE}"
        )
    for name, (module, shape, _, _) in needed.items():
        found = tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name}: expected shape {list(shape)} from config.json, got {list(found.shape)}. "
                f"{MISFIT_ADVICE}"
            )
        codes = name.endswith(".weight") and is_quantized(module)
        if not codes and found.dtype.name not in SOURCE_DTYPES:
            raise CheckpointError(
                f"{where}: tensor {name}: expected {', '.join(SOURCE_DTYPES)}, got {found.dtype.name}; config.json "
                "does not say how it is quantized. Use the original checkpoint, or the config.json that says so"
            )
    scales = {f"{tensor.module}.weight_scale" for tensor in needed.values() if is_quantized(tensor.module)}
    return tuple(name for name in tensors if name not in needed and name not in scales)


@dataclass(frozen=True)
class CheckedModel:
    """A model that its files hold whole.

    Attributes:
        config: what it is.
        declaration: its weights.
        notes: what of the files it does not use, a sentence each.
    """

    config: ModelConfig
    declaration: Declaration
    notes: tuple[str, ...]


def declare_held(config: Mapping[str, Any], names: Collection[str], where: str) -> tuple[ModelConfig, Declaration]:
    """Read config.json and declare its model, unless it counts more weights than there are tensors.

    Args:
        config: config.json.
        names: of all tensors.
        where: the checkpoint, for messages.

    Raises:
        UnsupportedModelError, CheckpointError: as `check_model`.
    """
    model = read_model_config(config, names, f"{where}/config.json")
    experts = model.moe.num_experts * sum(model.moe.layers) if model.moe else 0
    counted = f"{model.num_layers:,} layers" + (f" with {experts:,} experts together" if experts else "")
    if model.num_layers > len(names) or experts > len(names):
        raise CheckpointError(
            f"{where}: config.json counts {counted}, but the files hold only {len(names):,} tensors. {MISFIT_ADVICE}"
        )
    return model, declare(model)


def check_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, Held],
    where: str,
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    is_quantized: Callable[[str], bool] = lambda module: False,
    allow_extra: bool = False,
) -> CheckedModel:
    """Read config.json, declare its model, and check that it can be run and that the files hold it.

    Args:
        config: config.json.
        tensors, where, is_quantized: as for `check_headers`.
        tp_size, ep_size: how it is to be laid out.
        allow_extra: go on where tensors are there that no weight of the model explains.

    Raises:
        UnsupportedModelError: podquant does not run the architecture, or an option of it.
        CheckpointError: config.json or the tensors are wrong.
        MeshError: it cannot be laid out so.
    """
    model, declaration = declare_held(config, tensors, where)
    plan_layout(model, tp_size, ep_size)
    head = f"{model.names.lm_head}."
    unused = check_headers(declaration, tensors, where, is_quantized)
    extras = sort_extras((name for name in unused if not name.startswith(head)), model.num_layers)
    notes = [further_note(layer) for layer in extras.further]
    notes += [f"{part} is not used: the model is served as text" for part in extras.other_senses]
    if extras.adapter and not allow_extra:
        raise CheckpointError(
            f"{where}: holds tensors of an adapter that is not merged: {_listed(extras.adapter, tensors)}. Merge it "
            "first (peft: model.merge_and_unload().save_pretrained(DIR)), or pass --allow-extra-tensors to do without"
        )
    unknown = (*extras.adapter, *extras.unknown)
    if unknown and not allow_extra:
        raise CheckpointError(
            f"{where}: holds tensors that no weight of a {model.architecture} with {model.num_layers} layers is in: "
            f"{_listed(unknown, tensors)}. Is config.json that of these files? Pass --allow-extra-tensors to go on "
            "without them"
        )
    notes += [f"{name} is not used: no weight of the model is in it" for name in unknown]
    return CheckedModel(model, declaration, tuple(notes))


def _listed(names: tuple[str, ...], tensors: Mapping[str, Held]) -> str:
    """The first three with their shapes, and how many more."""
    text = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more"
