"""Typed access to the fields of a JSON object that nobody vouches for. Knows nothing of what they mean."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

from podquant.errors import ArtifactError
from podquant.foreign import parse_json, shown

_LARGEST = 2**63 - 1
_MOST_AXES = 64  # NumPy's


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """Decode UTF-8 JSON whose top is an object; duplicate keys and NaN are refused.

    Raises:
        ArtifactError: names `where` and what is wrong.
    """

    try:
        value = parse_json(data)
    except ValueError as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}. Copy the artifact again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: expected a JSON object at the top, got {type(value).__name__}")
    return value


class Fields:
    """One JSON object and the place it was found, for messages."""

    def __init__(self, value: dict[str, Any], where: str) -> None:
        self._value = value
        self.where = where

    def error(self, key: str, expected: str, found: object) -> ArtifactError:
        """The error for a field that holds something else than expected."""
        return ArtifactError(f"{self.where}: {key}: expected {expected}, got {shown(found)}")

    def only(self, *keys: str) -> None:
        """Refuse keys that are not listed."""
        if unknown := sorted(set(self._value) - set(keys)):
            raise ArtifactError(f"{self.where}: unknown key {shown(unknown[0])}; expected {', '.join(keys)}")

    def is_null(self, key: str) -> bool:
        """Whether the field, which must be there, is null."""
        return self._get(key) is None

    def string(self, key: str) -> str:
        """A string."""
        if not isinstance(value := self._get(key), str):
            raise self.error(key, "a string", value)
        return value

    def optional_string(self, key: str) -> str | None:
        """A string or null."""
        return None if self.is_null(key) else self.string(key)

    def hexadecimal(self, key: str, *, digits: int) -> str:
        """Exactly `digits` lower-case hexadecimal digits."""
        value = self.string(key)
        if len(value) != digits or not set(value) <= set(string.hexdigits.lower()):
            raise self.error(key, f"{digits} lower-case hexadecimal digits", value)
        return value

    def integer(self, key: str, *, at_least: int = 0) -> int:
        """An integer that fits in 63 bits."""
        value = self._get(key)
        if type(value) is not int or not at_least <= value <= _LARGEST:
            raise self.error(key, f"an integer from {at_least}", value)
        return value

    def number(self, key: str) -> float | None:
        """A number or null."""
        value = self._get(key)
        if value is not None and type(value) not in (int, float):
            raise self.error(key, "a number or null", value)
        return value  # type: ignore[no-any-return]

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of non-negative integers, one for each axis of an array."""
        value = self._get(key)
        if not isinstance(value, list) or any(type(item) is not int or not 0 <= item <= _LARGEST for item in value):
            raise self.error(key, "a list of non-negative integers", value)
        if len(value) > _MOST_AXES:
            raise self.error(key, f"at most {_MOST_AXES} integers", value)
        return tuple(value)

    def object(self, key: str) -> Fields:
        """An object."""
        return self._object(self._get(key), key)

    def objects(self, key: str) -> Iterator[tuple[str, Fields]]:
        """The items of an object of objects, in the order of the file."""
        for name, item in self.object(key)._value.items():
            yield name, self._object(item, f'{key}["{name}"]')

    def list_of_objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        if not isinstance(value := self._get(key), list):
            raise self.error(key, "a list", value)
        return [self._object(item, f"{key}[{index}]") for index, item in enumerate(value)]

    def _get(self, key: str) -> Any:
        if key not in self._value:
            raise ArtifactError(f"{self.where}: the key {key!r} is missing")
        return self._value[key]

    def _object(self, value: Any, label: str) -> Fields:
        if not isinstance(value, dict):
            raise self.error(label, "an object", value)
        return Fields(value, f"{self.where}: {label}")
