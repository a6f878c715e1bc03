"""Whether headers hold the model that config.json describes: every weight that is declared, with its shape and type.

The same for a checkpoint before it is converted and for whatever is about to be loaded. Knows nothing of where tensors
are, and reads none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from podquant.dtypes import SOURCE_DTYPES, DType
from podquant.errors import CheckpointError
from podquant.families.declaration import Declaration

_FLOATS = (*SOURCE_DTYPES, "float64")

_ADVICE = "The files do not hold the model that config.json describes: correct config.json, or use its own files"


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
            f"{declaration.architecture}. {_ADVICE}"
        )
    for name, (module, shape, _, _) in needed.items():
        found = tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name}: expected shape {list(shape)} from config.json, got {list(found.shape)}. "
                f"{_ADVICE}"
            )
        codes = name.endswith(".weight") and is_quantized(module)
        if not codes and found.dtype.name not in _FLOATS:
            raise CheckpointError(
                f"{where}: tensor {name}: expected {', '.join(_FLOATS)}, got {found.dtype.name}; config.json does not "
                "say how it is quantized. Use the original checkpoint, or the config.json that says so"
            )
    scales = {f"{tensor.module}.weight_scale" for tensor in needed.values() if is_quantized(tensor.module)}
    return tuple(name for name in tensors if name not in needed and name not in scales)
