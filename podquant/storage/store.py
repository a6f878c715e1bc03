"""Where bytes are read from and written to: the two interfaces, and the one function that picks an implementation.

Callers name a place by URI and hold a `Store` or a `Writer`; they never learn which kind of storage is behind it.
Knows nothing of tensors, checkpoints or artifacts.
"""

from __future__ import annotations

from collections.abc import Buffer
from typing import Protocol

from podquant.storage.local.store import LocalStore
from podquant.storage.places import SCHEME_GCS, SCHEME_HUB


class Store(Protocol):
    """A tree of files to read. Names are relative, with `/` between the parts. Every method may be called from threads.

    Every method raises `StorageError` naming the file.
    """

    @property
    def uri(self) -> str:
        """The place, in full."""

    def list(self) -> dict[str, int]:
        """Every file below the place: name → size in bytes, sorted by name."""

    @property
    def window_bytes(self) -> int:
        """Bytes to ask for at a time: enough for the storage's full speed, and no more."""

    def size(self, name: str) -> int:
        """Bytes in one file."""

    def version(self, name: str) -> str:
        """Tells a file from a changed one of that name, without reading it; compared, never interpreted."""

    def content_id(self, name: str) -> str | None:
        """`kind:digits`, a checksum that the storage keeps of a file's bytes: equal wherever they are, whatever their
        name and age; None where it keeps none."""

    def known_crc32c(self, name: str) -> int | None:
        """CRC32C of a whole file if the storage keeps one, else None."""

    def read(self, name: str, most: int) -> bytes:
        """A whole file, of at most `most` bytes."""

    def read_into(self, name: str, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` (writable, C-contiguous) with the bytes from `offset` on; an error if there are fewer."""

    def close(self) -> None:
        """Release what reading holds open. Reading afterwards is an error."""


class Writer(Protocol):
    """One new file, written from front to back by one thread at a time."""

    @property
    def name(self) -> str:
        """The file's name inside its publication."""

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""

    @property
    def crc32c(self) -> int:
        """CRC32C (Castagnoli) of the bytes written so far, as an unsigned 32-bit number."""

    def write(self, buffer: Buffer) -> None:
        """Append the bytes of `buffer` (C-contiguous). Blocks until the storage has taken them."""

    def close(self) -> None:
        """End the file; a second call does nothing."""

    def abandon(self) -> None:
        """Discard a file that is not closed: it never appears. Raises nothing; after `close()` it does nothing."""


def open_store(uri: str) -> Store:
    """The files at `uri`: a local directory (a path or `file://`), `gs://bucket/path`, or `hf://org/name@revision`."""
    if uri.startswith(SCHEME_GCS):
        from podquant.storage.gcs.store import GcsStore  # noqa: PLC0415  gcsfs takes a second to import

        return GcsStore(uri)
    if uri.startswith(SCHEME_HUB):
        from podquant.storage.hub.store import HubStore  # noqa: PLC0415  huggingface_hub and aiohttp take as long

        return HubStore(uri)
    return LocalStore(uri)
