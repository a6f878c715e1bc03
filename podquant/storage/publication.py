"""A directory that appears whole or not at all: the interface, and the function that picks an implementation.

Knows nothing of what the files hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Protocol, Self

from podquant.errors import StorageError
from podquant.storage.gcs.chunks import chunk_bytes
from podquant.storage.local.publication import LocalPublication
from podquant.storage.places import SCHEME_GCS
from podquant.storage.store import Store, Writer


class Staging(Protocol):
    """Where the files of a publication are written. Can be pickled: workers on other hosts write through their copy."""

    def writer(self, name: str) -> Writer:
        """Start a file. It exists once closed, whole; a second attempt at the same name must write the same bytes."""


class Publication(Protocol):
    """A directory in the making: `with open_publication(uri) as publication: …; publication.publish()`.

    Leaving the block without `publish()` removes all that was written, unless `keep` is set. Files may be written by
    several threads at once, each file by one. Every method raises `StorageError` naming the file.
    """

    @property
    def uri(self) -> str:
        """The target, in full."""

    keep: bool
    """Whether what was staged outlives leaving the block without `publish()`. May be changed until then."""

    @property
    def staging(self) -> Staging:
        """For other processes, while this one holds the publication; they must have closed what they publish."""

    def exists(self) -> bool:
        """Whether the target is taken. An empty directory, or what a failed run left, does not count."""

    def staged(self) -> Store | None:
        """The complete files so far: of this run and, with `keep`, of earlier ones; None if there are none."""

    def discard(self, names: Iterable[str]) -> None:
        """Remove staged files, so that they are not published."""

    def __enter__(self) -> Self:
        """Take the lock and remove what a failed run left; an error if the target is taken."""

    def writer(self, name: str) -> Writer:
        """Start a new file; close it before publishing. `name` may hold directories (`shared/a.safetensors`)."""

    def write_small(self, name: str, data: bytes) -> Writer:
        """Write a whole small file; the result has its size and checksum.

        The last one written before `publish()` appears last where files appear one by one (`gs://`): its presence must
        tell readers that the rest is whole.
        """

    def publish(self) -> None:
        """Make the directory appear at the target."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock and, unless it was published, remove what was written."""


def open_publication(
    uri: str, *, keep: bool = False, replaces: Collection[str] | None = None, files_at_a_time: int = 1
) -> Publication:
    """A publication to `uri`: a local directory (a path or `file://`), or `gs://bucket/path`.

    Args:
        keep: what was staged stays when the run ends unpublished, and what earlier runs left counts as staged. The
            caller decides what of it fits; to start over, open without.
        replaces: names of the files that are at `uri` now and that publishing puts aside and removes; one that is there
            and is not among them is an error. None: `uri` must be free. Killed while it replaces, the old directory or
            the new one is whole at `uri`, or what opens `uri` says where it is.
        files_at_a_time: how many files a process writes at once; chunks are sized so that all of them fit in memory.
    """
    if uri.startswith(SCHEME_GCS):
        from podquant.storage.gcs.publication import GcsPublication  # noqa: PLC0415  gcsfs takes a second to import
        from podquant.storage.gcs.replacement import GcsReplacement  # noqa: PLC0415

        size = chunk_bytes(files_at_a_time)
        if replaces is None:
            return GcsPublication(uri, keep=keep, chunk_bytes=size)
        return GcsReplacement(uri, replaces, keep=keep, chunk_bytes=size)
    return LocalPublication(uri, keep=keep, replaces=replaces)


def refuse_half_replaced(uri: str) -> None:
    """Raise StorageError if a run that was replacing `uri` was killed half-way; says where the whole directory is.

    Call it once something is found missing: it costs a listing. A local directory is swapped in one step.
    """
    if new := _unfinished_replacement(uri):
        raise StorageError(
            f"{uri}: a run that was replacing it was killed half-way. The new directory is whole at {new}: use that, "
            "or run the command with --overwrite again"
        )


def finish_replacement(uri: str) -> None:
    """Finish replacing `uri` for a run that was killed; does nothing where there was none.

    Raises:
        StorageError: `uri` holds files that podquant did not write.
    """
    if new := _unfinished_replacement(uri):
        from podquant.storage.gcs.replacement import replace_objects  # noqa: PLC0415  gcsfs takes a second to import

        replace_objects(new, uri, ())


def _unfinished_replacement(uri: str) -> str | None:
    if not uri.startswith(SCHEME_GCS):
        return None
    from podquant.storage.gcs.replacement import unfinished_replacement  # noqa: PLC0415

    return unfinished_replacement(uri)
