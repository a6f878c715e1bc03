"""Which names of files are accepted. Knows nothing of the kinds of storage."""

from __future__ import annotations

from podquant.errors import StorageError
from podquant.foreign import shown


def is_plain(name: str) -> bool:
    """Whether a name is relative and cannot lead out of a directory."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def checked_name(name: str, root: object) -> str:
    """`name` itself; `StorageError` unless it is a plain relative name that cannot lead out of `root`."""
    if not is_plain(name):
        raise StorageError(
            f"{root}: {shown(name)} is not a name inside this directory: expected a relative path without '..'."
        )
    return name
