"""What the processes that load a model tell each other: whether one failed, and what each has read.

Every function here is called by all of them, in the same order.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any

import jax
import numpy as np

from podquant import errors
from podquant.checkpoint.fingerprint import Fingerprint, differs
from podquant.model.mesh import Exchange
from podquant.storage.runs import Run, adds_up, gaps, joined
from podquant.weights.source import WeightSource

_READ_BYTES = 16 << 20


def agree(exchange: Exchange, failure: Exception | None) -> None:
    """End together: raise this process's failure, or that of the first of the others.

    Raises:
        Exception: `failure` itself; or an error of its class, if it is one of podquant's, with its text.
    """
    told = b""
    if failure is not None:
        known = isinstance(failure, errors.PodquantError)
        kind = type(failure).__name__ if known else "StorageError"
        told = json.dumps([kind, str(failure) if known else repr(failure)]).encode()
    heard = exchange(told)
    if failure is not None:
        raise failure
    for rank, text in enumerate(heard):
        if text:
            kind, message = json.loads(text)
            raise (errors.error_named(kind) or errors.StorageError)(f"process {rank} of {len(heard)}: {message}")


def check_same_weights(source: WeightSource, exchange: Exchange) -> None:
    """Find out, before any weight is read, whether all processes are about to load the same ones.

    Raises:
        CheckpointError: a process has other weights than process 0, in every process; names it.
        StorageError: a process cannot read its own, in every process.
    """
    if len(exchange(b"")) == 1:
        return
    mine, failure = Fingerprint("", ""), None
    try:
        mine = source.fingerprint
    except errors.PodquantError as error:
        failure = error
    agree(exchange, failure)
    first, *others = (Fingerprint(*json.loads(told)) for told in exchange(json.dumps(astuple(mine)).encode()))
    for rank, other in enumerate(others, start=1):
        if difference := differs(other, first):
            raise errors.CheckpointError(
                f"process {rank} of {len(others) + 1}: its weights {difference}. Give all of them the same model"
            )


def check_files(source: WeightSource, exchange: Exchange) -> None:
    """Compare what all processes have read with the checksums of the files; what none has read is read now.

    Raises:
        ArtifactError, StorageError: `source.corrupted` of the first file whose checksum differs, in every process.
    """
    wholes = source.wholes
    names = list(wholes)
    runs = _gather(source, names, exchange)
    left = [(file, offset, nbytes) for file in names for offset, nbytes in gaps(file, wholes[file], runs)]
    if left:
        rank, count = jax.process_index(), len(exchange(b""))
        failure = None
        try:
            for file, offset, nbytes in left[rank::count]:
                for start in range(offset, offset + nbytes, _READ_BYTES):
                    source.store.read_into(file, start, bytearray(min(_READ_BYTES, offset + nbytes - start)))
        except errors.PodquantError as error:
            failure = error
        agree(exchange, failure)
        runs = _gather(source, names, exchange)
    by_file: dict[str, list[Run]] = {name: [] for name in names}
    for run in runs:
        by_file[run.file].append(run)
    for file in names:
        if not adds_up(file, wholes[file], by_file[file]):
            raise source.corrupted(file)


def check_unchanged(source: WeightSource, exchange: Exchange) -> None:
    """Find out, once all is read, whether the files were the same from the first byte to the last.

    Raises:
        StorageError: a process's files have changed, in every process.
    """
    failure = None
    try:
        source.refuse_changed()
    except errors.PodquantError as error:
        failure = error
    agree(exchange, failure)


def _gather(source: WeightSource, names: list[str], exchange: Exchange) -> list[Run]:
    """The runs of all processes, joined; each sends five numbers a run."""
    number = {name: index for index, name in enumerate(names)}
    mine = [
        (number[run.file], run.offset, run.nbytes, run.crc32c, run.apart)
        for run in source.store.runs
        if run.file in number
    ]
    runs: list[Run] = []
    for data in exchange(np.array(mine, np.uint64).tobytes()):
        rows: Any = np.frombuffer(data, np.uint64).reshape(-1, 5).tolist()
        runs += [
            Run(names[index], offset, nbytes, crc32c, bool(apart)) for index, offset, nbytes, crc32c, apart in rows
        ]
    return joined(runs)
