"""Files of a model on the Hugging Face hub, at one commit: a `Store`. Reads go straight into the caller's memory.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Buffer

from huggingface_hub.constants import DEFAULT_REVISION

from podquant.errors import StorageError, TransientStorageError
from podquant.storage.failures import refuse_larger
from podquant.storage.http_reading import gathered
from podquant.storage.hub.client import HubClient, HubFile, shared_client
from podquant.storage.hub.ids import check_id
from podquant.storage.names import checked_name
from podquant.storage.places import SCHEME_HUB

_RANGE_BYTES = 8 << 20
"""Of one request; a larger read is several concurrent ones."""


class HubStore:
    """The files of a model that matter to podquant; a `Store`.

    The revision is resolved to a commit once, when the store is opened, and `uri` names it: it is the same anywhere.

    The hub keeps a SHA-256 of each large file and a SHA-1 of each small one. `read`, of a whole file, checks it. Ranges
    cannot be checked against either: for `read_into` only offset, length and the size of the file are checked, beyond
    what TLS checks in transit.
    """

    def __init__(self, uri: str, client: HubClient | None = None) -> None:
        """`uri`: `hf://org/name`, or `hf://org/name@revision` for another branch, tag or commit than the main branch.

        Raises:
            StorageError: not an id, no such model or revision, no access, or no connection.
        """
        model, _, revision = uri.removeprefix(SCHEME_HUB).partition("@")
        check_id(model)
        client = client or shared_client()
        self._commit = client.run(client.commit(model, revision or DEFAULT_REVISION))
        self._client: HubClient | None = client

    @property
    def uri(self) -> str:
        return self._commit.uri

    def list(self) -> dict[str, int]:
        """As `Store.list`, of the files that a download would fetch. No request."""
        return {name: file.size for name, file in self._commit.files.items()}

    @property
    def window_bytes(self) -> int:
        return 2 * _RANGE_BYTES

    def size(self, name: str) -> int:
        return self._file(name).size

    def version(self, name: str) -> str:
        return self._file(name).content

    def content_id(self, name: str) -> str | None:
        """The SHA-256 of a large file, the id of its git blob of a small one."""
        return self._file(name).content

    def known_crc32c(self, name: str) -> int | None:
        return None

    def read(self, name: str, most: int) -> bytes:
        file = self._file(name)
        refuse_larger(f"{self.uri}/{name}", file.size, most)
        data = bytearray(file.size)
        self.read_into(name, 0, data)
        kind, _, expected = file.content.partition(":")
        if kind == "sha256":
            found = hashlib.sha256(data).hexdigest()
        else:
            found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != expected:
            raise TransientStorageError(
                f"{self.uri}/{name}: expected content with {kind} {expected}, got {found}. "
                "It was corrupted in transit: run again."
            )
        return bytes(data)

    def read_into(self, name: str, offset: int, buffer: Buffer) -> None:
        file = self._file(name)
        view = memoryview(buffer)
        if self._client is None:
            raise StorageError(f"{self.uri}: read after its store was closed.")
        if view.nbytes == 0:
            return
        view = view.cast("B")
        if offset + len(view) > file.size:
            raise StorageError(
                f"{self.uri}/{name}: the file ends early: wanted {len(view):,} bytes at offset {offset:,}, "
                f"got {max(0, file.size - offset):,}. It is truncated: it must be uploaded again."
            )
        self._client.run(self._read_ranges(self._client, file, offset, view))

    def close(self) -> None:
        self._client = None

    async def _read_ranges(self, client: HubClient, file: HubFile, offset: int, view: memoryview) -> None:
        starts = range(0, len(view), _RANGE_BYTES)
        await gathered(client.read_into(self._commit, file, offset + at, view[at : at + _RANGE_BYTES]) for at in starts)

    def _file(self, name: str) -> HubFile:
        if checked_name(name, self.uri) not in self._commit.files:
            raise StorageError(f"{self.uri}/{name}: cannot read: there is no such file that podquant reads.")
        return self._commit.files[name]
