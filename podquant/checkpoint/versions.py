"""Whether the files of a checkpoint are still those that it was opened with.

What is read at several times belongs together only if nothing wrote to the files in between. Knows nothing of what they
hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from podquant.errors import StorageError
from podquant.storage.store import Store, open_store

Versions = Mapping[str, str]
"""By name, `Store.version` of files."""


def refuse_changed(store: Store, versions: Versions, saying: str) -> None:
    """Compare files with what they were.

    Args:
        store: where they are; one that was just opened, if its kind is listed only then.
        versions: of the files, as they were.
        saying: when that was, and what to do: what follows "changed" in the message.

    Raises:
        StorageError: one has changed or is gone; names it.
    """
    found = store.list()
    for name, version in versions.items():
        if name not in found:
            raise StorageError(f"{store.uri}/{name}: removed {saying}")
        if store.version(name) != version:
            raise StorageError(f"{store.uri}/{name}: changed {saying}")


def refuse_changed_since(uri: str, versions: Versions, saying: str) -> None:
    """As `refuse_changed`, of the files at `uri` as they are now."""
    with closing(open_store(uri)) as store:
        refuse_changed(store, versions, saying)
