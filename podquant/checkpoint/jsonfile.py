"""JSON files of checkpoints: one object without duplicate keys. Knows nothing of what the keys mean."""

from __future__ import annotations

from typing import Any

from podquant.errors import CheckpointError
from podquant.foreign import MOST_JSON_BYTES, parse_json
from podquant.storage.store import Store


def read_object(store: Store, name: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: it holds something else.
        StorageError: it cannot be read, or is larger than `MOST_JSON_BYTES`.
    """
    return parse_object(store.read(name, MOST_JSON_BYTES), f"{store.uri}/{name}")


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; `CheckpointError` beginning with `where` for anything else, duplicate keys included."""
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: not valid JSON: {error}. Copy it again if it is damaged, or correct it."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value
