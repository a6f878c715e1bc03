"""A whole conversion on this machine: what must hold before it starts, the units one after another, the commit.

Knows nothing of how a unit is done, or of terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from podquant.artifact.manifest import Manifest, OutputFile
from podquant.artifact.naming import MANIFEST
from podquant.checkpoint.index import Checkpoint
from podquant.convert.commit import commit
from podquant.convert.plan import WINDOW_BYTES, Plan
from podquant.convert.work import Receipt, Workbench, check_equal, convert_unit
from podquant.errors import ArtifactExistsError, StorageError
from podquant.quantize.quality import Quality
from podquant.storage.publication import Publication, open_publication
from podquant.storage.store import open_store
from podquant.storage.target import bytes_free, replace_directory

_COPY_BYTES = 4 << 20
_SLACK_BYTES = 1 << 20  # manifest, index and reports, generously


@dataclass(frozen=True)
class Result:
    """An artifact made: its manifest, and what quantization did to each weight."""

    manifest: Manifest
    quality: dict[str, Quality]


def convert(
    checkpoint: Checkpoint,
    plan: Plan,
    target: str,
    *,
    workers: int,
    window_bytes: int = WINDOW_BYTES,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Result:
    """Carry out a plan of this checkpoint. The artifact appears at `target` whole, or nothing does.

    Args:
        workers: threads that read and quantize.
        window_bytes: source bytes in a window; changes memory and speed, never the result.
        overwrite: put the result in the place of an artifact that is at `target`; it stays until the end.
        on_progress: told the source bytes done since it was last called.

    Raises:
        ArtifactExistsError: `target` is taken (or, to overwrite, holds something that is no artifact).
        StorageError: the disk is too small or fills up, another run writes there, or bytes cannot be read or written.
        CheckpointError: tied tensors that are both stored differ.
        NonFiniteWeightError: names the tensor, the row and the file.
    """
    replaces = check_target(target, overwrite=overwrite)
    place = open_publication(target).uri
    with open_publication(f"{place}.new" if replaces else place) as publication:
        _check_space(publication.uri, plan)
        with Workbench(plan.tensors, workers=workers, window_bytes=window_bytes) as bench:
            if plan.redundant is not None:
                check_equal(checkpoint, *plan.redundant, bench)
            receipts = [convert_unit(checkpoint, unit, publication.writer, bench, on_progress) for unit in plan.units]
        copied = {name: _copy(checkpoint, name, size, publication) for name, size in plan.copied.items()}
        manifest = commit(plan, receipts, copied, publication)
    if replaces:
        replace_directory(publication.uri, place)
    return Result(manifest, _quality(receipts))


def check_target(target: str, *, overwrite: bool) -> bool:
    """Whether something at `target` is to be replaced; refuses one that is taken. `convert` does this itself."""
    publication = open_publication(target)
    if not publication.exists():
        return False
    if not overwrite:
        raise ArtifactExistsError(
            f"{publication.uri}: already exists. Choose another place, remove it, or pass --overwrite"
        )
    if MANIFEST not in open_store(target).list():
        raise ArtifactExistsError(
            f"{publication.uri}: exists and holds no {MANIFEST}, so it is no artifact: --overwrite does not touch it"
        )
    return True


def _check_space(uri: str, plan: Plan) -> None:
    free, needed = bytes_free(uri), plan.bytes_out + _SLACK_BYTES
    if free is not None and free < needed:
        raise StorageError(
            f"{uri}: the disk is too small: the artifact takes {plan.bytes_out:,} bytes and some for its manifest, "
            f"{free:,} are free. Free space there, or choose a place with more"
        )


def _copy(checkpoint: Checkpoint, name: str, size: int, publication: Publication) -> OutputFile:
    writer = publication.writer(name)
    buffer = np.empty(min(size, _COPY_BYTES), np.uint8)
    for offset in range(0, size, _COPY_BYTES):
        chunk = buffer[: min(_COPY_BYTES, size - offset)]
        checkpoint.store.read_into(name, offset, chunk)
        writer.write(chunk)
    writer.close()
    return OutputFile(writer.nbytes, writer.crc32c)


def _quality(receipts: list[Receipt]) -> dict[str, Quality]:
    return {name: figures for receipt in receipts for name, figures in receipt.quality.items()}
