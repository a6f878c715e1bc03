"""Which names of files are accepted. Knows nothing of the kinds of storage."""

from __future__ import annotations

from podquant.errors import StorageError


def checked_name(name: str, root: object) -> str:
    """`name` itself; `StorageError` unless it is a plain relative name that cannot lead out of `root`."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(
            f"{root}: {name!r} is not a name inside this directory: expected a relative path without '..'."
        )
    return name
