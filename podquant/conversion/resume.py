"""What an earlier run that did not end has left of a conversion: whether it was the same one, and which units are done.

A run first records what it converts (`begun.json`), then each unit its receipt. Another run goes on only with the very
same conversion, and takes a unit for done only if its files are as the receipt says, to the CRC32C.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import google_crc32c
import numpy as np

from podquant.artifact.documents import encode_json
from podquant.artifact.manifest import OutputFile
from podquant.checkpoint.fingerprint import content_ids
from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.versions import refuse_changed
from podquant.conversion.plan import Plan
from podquant.conversion.receipts import Receipt, decode_receipt
from podquant.conversion.task import CHANGED, receipt_name
from podquant.errors import ArtifactError, ArtifactExistsError
from podquant.storage.publication import Publication
from podquant.storage.records import Records
from podquant.storage.store import Store

BEGUN = "begun.json"
_READ_BYTES = 4 << 20


def describe(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """All that the bytes of units depend on, as JSON's values.

    The version of a file counts beside its content: samples are not all of it.

    Raises:
        StorageError: the source has changed since it was opened, or cannot be read.
    """
    refuse_changed(checkpoint.store, checkpoint.versions, CHANGED)
    ids = content_ids(checkpoint)
    schemes = {name: None if each.scheme is None else asdict(each.scheme) for name, each in plan.modules.items()}
    return {
        "podquant": version("podquant"),
        "source": plan.source.name,
        "tp_size": plan.tp_size,
        "files": {
            name: {"header": info.header_sha256, "content": ids[name], "version": checkpoint.versions[name]}
            for name, info in checkpoint.files.items()
        },
        "rules": schemes,
        "units": {unit.file: unit.bytes_out for unit in plan.units},
    }


def resume(
    now: Mapping[str, Any], plan: Plan, publication: Publication, records: Records, *, overwrite: bool
) -> dict[str, Receipt]:
    """The units that need not be done again, by name; removes all else that was left, and records what is converted.

    Args:
        now: what `describe` says of the plan.

    Raises:
        ArtifactExistsError: what was begun there is another conversion (with `overwrite`, that is given up).
    """
    documents = records.read()
    begun = documents.pop(BEGUN, None)
    differences = _differences(begun, now)
    if differences and documents and not overwrite:
        raise ArtifactExistsError(
            f"{publication.uri}: an unfinished conversion is there, {len(documents)} units done, and this is another: "
            f"{'; '.join(differences)}. Finish that one, pass --overwrite to start over, or choose another place"
        )
    staged = publication.staged()
    done = {} if differences or staged is None else dict(_done(plan, documents, staged, records.uri))
    if begun is not None or documents:
        wanted = {receipt_name(unit) for unit in done}
        records.remove([name for name in documents if name not in wanted])
    kept = {name for receipt in done.values() for name in receipt.files}
    if staged is not None:
        publication.discard([name for name in staged.list() if name not in kept])
        staged.close()
    if differences:
        records.write(BEGUN, encode_json(now))
    return done


def _differences(begun: bytes | None, now: Mapping[str, Any]) -> list[str]:
    """How the unfinished conversion differs from this one; empty if it does not."""
    if begun is None:
        return [f"{BEGUN} is missing"]
    try:
        before = json.loads(begun)
    except ValueError:
        before = None
    if not isinstance(before, dict) or before.keys() != now.keys():
        return [f"{BEGUN} is not one that this version of podquant writes"]
    same = json.loads(encode_json(now))
    return [_difference(key, before[key], same[key]) for key in same if before[key] != same[key]]


def _difference(what: str, before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{what} was {before}, is {now}"
    changed = [name for name in {**before, **now} if before.get(name, ...) != now.get(name, ...)]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    if what == "files":
        was, is_ = before.get(changed[0]), now.get(changed[0])
        if not isinstance(was, dict) or not isinstance(is_, dict) or was.get("header") != is_["header"]:
            return f"the source has changed in {changed[0]}{more}"
        if was.get("content") != is_["content"]:
            return f"the source has other weights in {changed[0]}{more}, with the same names and shapes"
        return f"the source was written again since: {changed[0]}{more}"
    was, is_ = (_shown(each.get(changed[0])) for each in (before, now))
    return f"{what} differ: {changed[0]}{more} was {was}, is {is_}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(str(each) for each in value.values() if each is not None)
    return "absent or kept" if value is None else str(value)


def _done(plan: Plan, documents: Mapping[str, bytes], staged: Store, where: str) -> Iterator[tuple[str, Receipt]]:
    found = staged.list()
    for unit in plan.units:
        name = receipt_name(unit.file)
        if name not in documents:
            continue
        try:
            receipt = decode_receipt(documents[name], f"{where}/{name}")
        except ArtifactError:
            continue  # half of one: the unit is done again
        files = receipt.files
        if receipt.unit != unit.file or {file: each.size for file, each in files.items()} != unit.sizes:
            continue
        if all(found.get(file) == each.size and _crc32c(staged, file) == each.crc32c for file, each in files.items()):
            yield unit.file, receipt


def _crc32c(staged: Store, name: str) -> int:
    """Of a whole file: as the storage knows it, else by reading it."""
    known = staged.known_crc32c(name)
    if known is not None:
        return known
    size, crc32c = staged.size(name), 0
    buffer = np.empty(min(size, _READ_BYTES), np.uint8)
    for offset in range(0, size, _READ_BYTES):
        chunk = buffer[: min(_READ_BYTES, size - offset)]
        staged.read_into(name, offset, chunk)
        crc32c = google_crc32c.extend(crc32c, chunk)
    return crc32c


def check_staged(files: Mapping[str, OutputFile], publication: Publication) -> None:
    """Refuse to publish if a file is not there as it was written: others may have meddled since.

    Raises:
        ArtifactError: names the file.
    """
    staged = publication.staged()
    found = {} if staged is None else staged.list()
    for name, file in files.items():
        known = None if staged is None or name not in found else staged.known_crc32c(name)
        if found.get(name) != file.size or known not in (None, file.crc32c):
            raise ArtifactError(
                f"{publication.uri}/{name}: expected {file.size:,} bytes with CRC32C {file.crc32c:08x}, as written, "
                f"got {found.get(name, 0):,}. Another has changed it: run again"
            )
    if staged is not None:
        staged.close()
