"""A whole conversion: what must hold before it starts, the units on whatever hosts there are, the commit.

Knows nothing of how a unit is done, of what hosts are, or of terminals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from podquant.artifact.manifest import Manifest, OutputFile
from podquant.artifact.naming import MANIFEST
from podquant.artifact.reader import read_manifest
from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.versions import Versions, refuse_changed_since
from podquant.cluster.hosts import Done, Failed, HostLost, Hosts, Progress, Task
from podquant.cluster.local import LocalHosts
from podquant.conversion.commit import commit
from podquant.conversion.integrity import corrupted_files
from podquant.conversion.memory import files_at_a_time, worker_nbytes
from podquant.conversion.plan import Plan
from podquant.conversion.receipts import Receipt, Seconds
from podquant.conversion.resume import check_staged, describe, resume
from podquant.conversion.task import CHANGED, Setting, check_tied, do_unit, receipt_name
from podquant.conversion.units import Unit
from podquant.errors import ArtifactExistsError, ClusterError, StorageError
from podquant.quantize.quality import Quality
from podquant.storage.publication import Publication, finish_replacement, open_publication
from podquant.storage.records import Records, open_records
from podquant.storage.runs import Run
from podquant.storage.space import require_space
from podquant.storage.store import open_store

_COPY_BYTES = 4 << 20
_SLACK_BYTES = 1 << 20  # manifest, index and reports, generously

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """An artifact made.

    Attributes:
        manifest: what it says about itself.
        quality: what quantization did to each weight.
        num_units_resumed: units that an earlier run had done.
        seconds: where the time of all workers went, for the units of this run.
    """

    manifest: Manifest
    quality: Mapping[str, Quality]
    num_units_resumed: int
    seconds: Seconds


def convert(
    checkpoint: Checkpoint,
    plan: Plan,
    target: str,
    *,
    threads: int,
    hosts: Hosts | None = None,
    window_bytes: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Conversion:
    """Carry out a plan of this checkpoint. The artifact appears at `target` whole, or nothing does.

    Whatever ends it early, the units that are done stay beside `target` (`<target>.partial` or, in a bucket, its own
    prefix; and `<target>.receipts`), and the next run goes on from there. If none is done, nothing stays.

    Args:
        threads: how many read and quantize, in each worker of the hosts.
        hosts: where units are done; None for this process, one after another.
        window_bytes: source bytes in a window, None for what suits the source's storage; never changes the result.
        overwrite: put the result in the place of an artifact that is at `target`, which stays until the end; and give
            up what an earlier run began there, if that was another conversion.
        allow_nonfinite: keep NaN and infinities in what is not quantized, instead of refusing them.
        on_progress: told the source bytes done since it was last called; what it raises ends the conversion.

    Raises:
        ArtifactExistsError: `target` is taken, or holds no artifact to overwrite, or what another conversion began.
        StorageError: the disk fills up, another run writes there, bytes cannot be read or written, the source is not
            what it was when it was opened, or what was read is not what its storage has.
        CheckpointError: tied tensors that are both stored differ.
        NonFiniteWeightError: names the tensor, the row and the file.
        ClusterError: there are no hosts, or they die one after another.
    """
    replaces = check_target(target, overwrite=overwrite)
    publication = open_publication(target, keep=True, replaces=replaces, files_at_a_time=files_at_a_time(plan.tp_size))
    records = open_records(f"{publication.uri}.receipts")
    window_bytes = window_bytes or checkpoint.store.window_bytes
    setting = Setting(checkpoint.store.uri, publication.staging, records, threads, window_bytes, allow_nonfinite)
    versions = {**checkpoint.versions, **{name: checkpoint.store.version(name) for name in plan.copied}}
    described = describe(checkpoint, plan)
    with publication:
        receipts = resume(described, plan, publication, records, overwrite=overwrite)
        resumed = set(receipts)
        try:
            _check_space(publication.uri, plan, receipts)
            with _saying_what_is_kept(plan, receipts):
                tied = _do_units(checkpoint, plan, setting, hosts or LocalHosts(), receipts, on_progress)
            _refuse_corrupted(checkpoint, plan, receipts, tied, records)
            copied = _copy_all(checkpoint, plan, versions, publication)
            check_staged({**copied, **{n: f for r in receipts.values() for n, f in r.files.items()}}, publication)
            manifest = commit(plan, list(receipts.values()), copied, publication)
        except BaseException:
            if not receipts:
                publication.keep = False
                with suppress(StorageError):
                    records.clear()
            raise
    records.clear()
    return _conversion(manifest, receipts, resumed)


def _conversion(manifest: Manifest, receipts: Mapping[str, Receipt], resumed: set[str]) -> Conversion:
    quality = {name: figures for receipt in receipts.values() for name, figures in receipt.quality.items()}
    seconds = sum((receipt.seconds for unit, receipt in receipts.items() if unit not in resumed), Seconds())
    return Conversion(manifest, quality, len(resumed), seconds)


def check_target(target: str, *, overwrite: bool) -> frozenset[str] | None:
    """The files at `target` that are to be replaced, None if it is free; `convert` does this itself.

    Raises:
        ArtifactExistsError: it is taken; or, to overwrite, it holds anything but one whole artifact.
    """
    if overwrite:
        finish_replacement(target)
    publication = open_publication(target)
    if not publication.exists():
        return None
    if not overwrite:
        raise ArtifactExistsError(
            f"{publication.uri}: already exists. Choose another place, remove it, or pass --overwrite"
        )
    with closing(open_store(target)) as store:
        found = store.list()
        if MANIFEST not in found:
            raise ArtifactExistsError(
                f"{publication.uri}: exists and holds no {MANIFEST}: it is no artifact, and is left as it is"
            )
        own = frozenset({MANIFEST, *read_manifest(store).files})
    if more := sorted(found.keys() - own):
        raise ArtifactExistsError(
            f"{publication.uri}: holds files that are no part of the artifact: {', '.join(more[:5])}"
            f"{' and more' if len(more) > 5 else ''}. --overwrite would lose them: move them away first"
        )
    return own


def _do_units(
    checkpoint: Checkpoint,
    plan: Plan,
    setting: Setting,
    hosts: Hosts,
    receipts: dict[str, Receipt],
    on_progress: Progress,
) -> Sequence[Run]:
    """Do what has no receipt yet, and add theirs; returns what was read of a tied tensor that is left out."""
    tied: Sequence[Run] = ()
    if plan.redundant is not None:
        key = f"{plan.redundant[0].name} = {plan.redundant[1].name}"
        versions = _versions(checkpoint, {info.file for info in plan.redundant})
        check = Task(key, check_tied, (setting, plan.redundant, versions), bytes_in=plan.redundant[0].nbytes)
        tied = next(iter(_run(hosts, [check], lambda count: on_progress(0))))
    todo = []
    for unit in plan.queue:
        if unit.file in receipts:
            on_progress(unit.bytes_in)
        else:
            todo.append(_task(checkpoint, setting, unit))
    for receipt in _run(hosts, todo, on_progress):
        receipts[receipt.unit] = receipt
    return tied


@contextmanager
def _saying_what_is_kept(plan: Plan, receipts: Mapping[str, Receipt]) -> Iterator[None]:
    """Where hosts fail, say what another run need not do again."""
    try:
        yield
    except ClusterError as error:
        kept = f"{len(receipts)} of {len(plan.units)} units are done and kept" if receipts else "No unit was done"
        raise ClusterError(f"{error}. {kept}: run the same again, and it goes on from there") from error


def _run[T](hosts: Hosts, tasks: Sequence[Task[T]], on_progress: Progress) -> Iterator[T]:
    """The values of all tasks, as they come; raises the error of the one that fails."""
    with closing(hosts.run(tasks, on_progress)) as outcomes:
        for outcome in outcomes:
            match outcome:
                case Done(value=value):
                    yield value
                case HostLost(key, reason):
                    _log.warning("%s: given to another worker: %s", key, reason)
                case Failed(error=error):
                    raise error


def _task(checkpoint: Checkpoint, setting: Setting, unit: Unit) -> Task[Receipt]:
    versions = _versions(checkpoint, {tensor.source.file for tensor in unit.tensors})
    first, last = unit.tensors[0].source.name, unit.tensors[-1].source.name
    contents = first if len(unit.tensors) == 1 else f"{len(unit.tensors)} tensors, {first} to {last}"
    memory = worker_nbytes([unit], threads=setting.threads, window_bytes=setting.window_bytes)
    arguments = setting, unit, versions
    return Task(unit.file, do_unit, arguments, unit.bytes_in, unit.bytes_out, contents, memory)


def _versions(checkpoint: Checkpoint, files: set[str]) -> dict[str, str]:
    return {name: checkpoint.versions[name] for name in sorted(files)}


def _refuse_corrupted(
    checkpoint: Checkpoint, plan: Plan, receipts: dict[str, Receipt], tied: Sequence[Run], records: Records
) -> None:
    """Compare all that was read with the source's checksums; units that read wrong files have to be done again."""
    wrong = corrupted_files(checkpoint, [*tied, *(run for receipt in receipts.values() for run in receipt.source)])
    if not wrong:
        return
    units = [unit.file for unit in plan.units if any(tensor.source.file in wrong for tensor in unit.tensors)]
    records.remove([receipt_name(unit) for unit in units])
    for unit in units:
        del receipts[unit]
    raise StorageError(
        f"{checkpoint.store.uri}/{wrong[0]}: the bytes read do not have the CRC32C that the store keeps: they were "
        f"corrupted in transit. {len(units)} units that read {', '.join(wrong)} are not kept: run again"
    )


def _check_space(uri: str, plan: Plan, receipts: Mapping[str, Receipt]) -> None:
    there = sum(file.size for receipt in receipts.values() for file in receipt.files.values())
    require_space(uri, plan.bytes_out - there + _SLACK_BYTES, "the artifact")


def _copy_all(
    checkpoint: Checkpoint, plan: Plan, versions: Versions, publication: Publication
) -> dict[str, OutputFile]:
    """Copy the files beside the weights, the last to be read, and compare all of the source with what it was."""
    copied = {name: _copy(checkpoint, name, size, publication) for name, size in plan.copied.items()}
    refuse_changed_since(checkpoint.store.uri, versions, CHANGED)
    return copied


def _copy(checkpoint: Checkpoint, name: str, size: int, publication: Publication) -> OutputFile:
    writer = publication.writer(name)
    buffer = np.empty(min(size, _COPY_BYTES), np.uint8)
    for offset in range(0, size, _COPY_BYTES):
        chunk = buffer[: min(_COPY_BYTES, size - offset)]
        checkpoint.store.read_into(name, offset, chunk)
        writer.write(chunk)
    writer.close()
    return OutputFile(writer.nbytes, writer.crc32c)
