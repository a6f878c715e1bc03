"""JSON files beside the weights that say how text is treated: read as other software reads them, within bounds.

Knows nothing of what the keys mean.
"""

from __future__ import annotations

from typing import Any

from podquant.errors import CheckpointError
from podquant.foreign import parse_json

GENERATION = "generation_config.json"
"""End tokens, and how tokens are chosen where a request does not say."""


def decode_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, naming `where`, for anything else."""
    value = decode(data, where)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: expected a JSON object, got {type(value).__name__}. Correct it, or take the file that the model "
            "came with."
        )
    return value


def decode(data: bytes, where: str) -> Any:
    """The JSON value in a file. Raises CheckpointError, naming `where`, if it holds none."""
    try:
        return parse_json(data, lenient=True)
    except ValueError as error:
        raise CheckpointError(
            f"{where} is not valid JSON: {error}. Correct it, or take the file that the model came with."
        ) from error
