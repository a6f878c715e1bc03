"""A unit of work as any host can do it: told by values alone, it opens the source, converts, and leaves a receipt.

Functions here are run by `cluster`, maybe twice, maybe by two hosts at once: they give the same bytes each time. Knows
nothing of clusters, or of what other units there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.versions import Versions, refuse_changed, refuse_changed_since
from podquant.conversion.receipts import Receipt
from podquant.conversion.units import Unit
from podquant.conversion.work import Progress, Workbench, check_equal, convert_unit
from podquant.errors import StorageError
from podquant.storage.publication import Staging
from podquant.storage.records import Records
from podquant.storage.runs import Run
from podquant.storage.store import Store, open_store

CHANGED = (
    "while it was converted: what was read of it does not belong together, and is not published. Let nothing write to "
    "the source, and run again with --overwrite to start over"
)
"""What is said of a source that is not what it was."""


@dataclass(frozen=True)
class Setting:
    """What all units of a conversion have in common. Can be pickled.

    Attributes:
        source: URI of the checkpoint.
        staging: where output files are made.
        receipts: where receipts are left.
        threads: how many read and quantize.
        window_bytes: source bytes of a window.
        allow_nonfinite: keep NaN and infinities in what is not quantized.
    """

    source: str
    staging: Staging
    receipts: Records
    threads: int
    window_bytes: int
    allow_nonfinite: bool = False


def do_unit(setting: Setting, unit: Unit, versions: Versions, on_progress: Progress) -> Receipt:
    """Convert one unit and leave its receipt.

    Args:
        versions: of the source files that it reads, as they were when the conversion was planned.

    Raises:
        StorageError: the source has changed by the end, or bytes could not be read or written.
        NonFiniteWeightError: names the tensor, the row and the file.
    """
    with (
        _open_unchanged(setting.source, versions) as store,
        Workbench(unit.tensors, threads=setting.threads, window_bytes=setting.window_bytes) as bench,
    ):
        receipt = convert_unit(
            store, unit, setting.staging.writer, bench, on_progress, allow_nonfinite=setting.allow_nonfinite
        )
    setting.receipts.write(receipt_name(unit.file), receipt.encode())
    return receipt


def check_tied(
    setting: Setting, tied: tuple[TensorInfo, TensorInfo], versions: Versions, on_progress: Progress
) -> tuple[Run, ...]:
    """Check that the first of two tied tensors, which is left out, equals the second. Returns what was read of it."""
    with _open_unchanged(setting.source, versions) as store:
        runs = check_equal(store, *tied, setting.window_bytes)
    on_progress(tied[0].nbytes)
    return runs


@contextmanager
def _open_unchanged(source: str, versions: Versions) -> Iterator[Store]:
    """The store of a source whose files have these versions, from the first read to the last.

    A file that was replaced meanwhile can also be met as one that is missing: then it is said that it has changed.
    """
    try:
        with closing(open_store(source)) as store:
            refuse_changed(store, versions, CHANGED)
            yield store
    except StorageError:
        refuse_changed_since(source, versions, CHANGED)
        raise
    refuse_changed_since(source, versions, CHANGED)


def receipt_name(unit: str) -> str:
    """Name of the document that holds a unit's receipt."""
    return f"{unit}.json"
