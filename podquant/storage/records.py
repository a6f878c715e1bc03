"""Small documents beside a place that is being written, which tell a later run what is done. Knows nothing of content.

They are in a directory of their own, so that they come and go without touching what they describe.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from podquant.foreign import MOST_JSON_BYTES
from podquant.storage.failures import storage_error
from podquant.storage.local import ownership
from podquant.storage.local.inside import read_inside
from podquant.storage.local.store import local_path
from podquant.storage.names import checked_name
from podquant.storage.places import SCHEME_GCS

_UNFINISHED = ".unfinished-"


class Records(Protocol):
    """The documents of one directory, by name. Can be pickled: other hosts write through their copy.

    Every method raises `StorageError` naming the place.
    """

    @property
    def uri(self) -> str:
        """The directory, in full. It exists while it is not empty."""

    def write(self, name: str, data: bytes) -> None:
        """Write a document atomically; it replaces an earlier one of that name."""

    def read(self) -> dict[str, bytes]:
        """Every document."""

    def remove(self, names: list[str]) -> None:
        """Remove some; names that do not exist are ignored."""

    def clear(self) -> None:
        """Remove all, and the directory."""


def open_records(uri: str) -> Records:
    """The documents at `uri`: a local directory (a path or `file://`), or `gs://bucket/path`."""
    if uri.startswith(SCHEME_GCS):
        from podquant.storage.gcs.records import GcsRecords  # noqa: PLC0415  gcsfs takes a second to import

        return GcsRecords(uri.rstrip("/"))
    return LocalRecords(os.path.abspath(local_path(uri)))


@dataclass(frozen=True)
class LocalRecords:
    """`Records` in a local directory; hosts must share its file system."""

    uri: str

    def write(self, name: str, data: bytes) -> None:
        """As `Records.write`: under another name first, so that a killed writer leaves no half."""
        final = Path(self.uri) / checked_name(name, self.uri)
        unfinished = final.with_name(_UNFINISHED + uuid.uuid4().hex)
        ownership.claim(Path(self.uri))
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, final)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise storage_error("write", final, error, wanted=len(data)) from error

    def read(self) -> dict[str, bytes]:
        """As `Records.read`."""
        root, real = Path(self.uri), Path(os.path.realpath(self.uri))
        try:
            ownership.refuse_foreign(root)
            names = sorted(os.listdir(root)) if root.is_dir() else []
            hidden = (_UNFINISHED, ownership.MARKER)
            return {
                name: read_inside(root / name, real, MOST_JSON_BYTES) for name in names if not name.startswith(hidden)
            }
        except OSError as error:
            raise storage_error("read", root, error) from error

    def remove(self, names: list[str]) -> None:
        """As `Records.remove`."""
        for path in [Path(self.uri) / checked_name(name, self.uri) for name in names]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error("remove", path, error) from error

    def clear(self) -> None:
        """As `Records.clear`."""
        root = Path(self.uri)
        try:
            ownership.remove(root)
        except OSError as error:
            raise storage_error("remove", root, error) from error
