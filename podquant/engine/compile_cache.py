"""Programs that were compiled before: JAX's persistent compilation cache, on by default, in a bucket if asked.

A directory in a bucket is mirrored: what it holds is fetched before anything compiles, what is new is sent afterwards.
So every host of a pod finds what any of them compiled, although JAX writes on the first one only. Without a place to
write there is a warning, and no cache. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from podquant.errors import StorageError
from podquant.foreign import MOST_JSON_BYTES
from podquant.storage.places import SCHEME_GCS
from podquant.storage.records import Records, open_records

_log = logging.getLogger(__name__)

NOWHERE = "none"

_found = threading.local()


@dataclass
class CompileCache:
    """Where compiled programs are kept.

    Attributes:
        directory: JAX's; None: there is no cache, or it is somebody else's.
        remote: the bucket that it mirrors.
        fetched: what came from there.
    """

    directory: Path | None = None
    remote: Records | None = None
    fetched: set[str] = field(default_factory=set)

    def publish(self) -> None:
        """Send the bucket what it lacks; a warning if that fails."""
        if self.remote is None or self.directory is None:
            return
        try:
            for path in sorted(self.directory.glob("*-cache")):
                if path.name not in self.fetched and path.stat().st_size <= MOST_JSON_BYTES:
                    self.remote.write(path.name, path.read_bytes())
                    self.fetched.add(path.name)
        except (OSError, StorageError) as error:
            _log.warning("compiled programs are not kept in %s: %s", self.remote.uri, error)


def open_cache(place: str | None) -> CompileCache:
    """Let JAX keep what it compiles from now on, and find what was compiled before.

    Args:
        place: a directory, `gs://bucket/path`, or `NOWHERE`; None: what JAX was configured with, else
            `podquant/programs` in the user's cache.
    """
    if place == NOWHERE:
        _use(None)
        return CompileCache()
    if place is None and jax.config.jax_compilation_cache_dir:
        return CompileCache()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "podquant")
    remote = open_records(place) if place is not None and place.startswith(SCHEME_GCS) else None
    if remote is not None:
        directory = base / f"programs-{hashlib.sha256(remote.uri.encode()).hexdigest()[:16]}"
    else:
        directory = base / "programs" if place is None else Path(place).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
    except OSError as error:
        _log.warning("compiled programs are not kept, so the next start compiles again: %s", error)
        return CompileCache()
    _use(directory)
    cache = CompileCache(directory, remote)
    _fetch(cache)
    return cache


def was_found() -> bool:
    """Whether the program that this thread compiled last had been compiled before; asked once for each."""
    found: bool = getattr(_found, "value", False)
    _found.value = False
    return found


def _use(directory: Path | None) -> None:
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None if directory is None else str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _fetch(cache: CompileCache) -> None:
    if cache.remote is None or cache.directory is None:
        return
    try:
        for name, data in cache.remote.read().items():
            path = cache.directory / name
            if not path.exists():
                unfinished = path.with_name(f".{name}.{os.getpid()}")
                unfinished.write_bytes(data)
                unfinished.replace(path)
            cache.fetched.add(name)
    except (OSError, StorageError) as error:
        _log.warning("no compiled programs from %s: %s", cache.remote.uri, error)


def _note(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _found.value = True


jax.monitoring.register_event_listener(_note)
