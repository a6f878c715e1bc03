"""JSON files of checkpoints: one object without duplicate keys. Knows nothing of what the keys mean."""

from __future__ import annotations

import json
from typing import Any

from podquant.errors import CheckpointError


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; `CheckpointError` beginning with `where` for anything else, duplicate keys included."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where}: not UTF-8 at byte {error.start}. The file is damaged: copy it again."
        ) from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}. The file is damaged: copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # an unpaired surrogate is not text: better refused here than when the name is printed
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
