"""What stands at a place to write to: its free space, and putting a published directory in the place of an older one.

Knows nothing of what the directories hold.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from podquant.storage.failures import storage_error
from podquant.storage.local.store import local_path
from podquant.storage.places import SCHEME_GCS


def bytes_free(uri: str) -> int | None:
    """Bytes an ordinary user may still write at `uri`, which need not exist yet; None where there is no limit."""
    if uri.startswith(SCHEME_GCS):
        return None
    path = Path(os.path.realpath(local_path(uri)))
    while not path.is_dir() and path != path.parent:
        path = path.parent
    try:
        usage = os.statvfs(path)
    except OSError as error:
        raise storage_error("read the free space", path, error) from error
    return usage.f_bavail * usage.f_frsize


def replace_directory(new_uri: str, old_uri: str) -> None:
    """Put the directory `new_uri` in the place of `old_uri` and remove what was there.

    Two renames: killed between them, the old directory is left as `<old>.replaced`, the new one under its own name.
    In a bucket copies, inside the store: killed meanwhile, the new one is whole under its own name.
    """
    if old_uri.startswith(SCHEME_GCS):
        from podquant.storage.gcs.target import replace_objects  # noqa: PLC0415  gcsfs takes a second to import

        return replace_objects(new_uri, old_uri)
    new, old = (Path(os.path.realpath(local_path(uri))) for uri in (new_uri, old_uri))
    aside = Path(f"{old}.replaced")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(old, aside)
        os.rename(new, old)
        shutil.rmtree(aside)
    except OSError as error:
        raise storage_error(f"replace by {new.name}", old, error) from error
