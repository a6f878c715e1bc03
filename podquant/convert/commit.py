"""Turns the receipts of all units into an artifact: checks them against the plan, describes them, publishes.

The manifest is written last. Knows nothing of how the units were done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version

from podquant.artifact.manifest import Manifest, OutputFile, Piece, TensorEntry
from podquant.artifact.naming import CONFIG, INDEX, MANIFEST, QUALITY
from podquant.convert.plan import Plan, encode_json, entry_nbytes
from podquant.convert.work import Receipt
from podquant.errors import ArtifactError
from podquant.storage.publication import Publication


def commit(
    plan: Plan, receipts: Sequence[Receipt], copied: Mapping[str, OutputFile], publication: Publication
) -> Manifest:
    """Write index, config, quality and manifest, and publish the whole.

    Args:
        receipts: one for each unit, in any order.
        copied: the files copied from the source, as written.

    Raises:
        ArtifactError: receipts and plan disagree.
        StorageError: bytes could not be written.
    """
    by_file = {receipt.file: receipt for receipt in receipts}
    for unit in plan.units:
        receipt = by_file.get(unit.file)
        if receipt is None or receipt.size != unit.bytes_out:
            got = "no receipt" if receipt is None else f"{receipt.size:,} bytes"
            raise ArtifactError(f"{publication.uri}: {unit.file}: planned {unit.bytes_out:,} bytes, got {got}")
    files = {unit.file: OutputFile(unit.bytes_out, by_file[unit.file].crc32c) for unit in plan.units}
    files |= copied
    quality = {name: asdict(figures) for unit in plan.units for name, figures in by_file[unit.file].quality.items()}
    for name, document in (
        (CONFIG, dict(plan.config)),
        (INDEX, _index(plan)),
        (QUALITY, {"tensors": quality}),
    ):
        written = publication.write_small(name, encode_json(document))
        files[name] = OutputFile(written.nbytes, written.crc32c)
    manifest = Manifest(
        written_by=f"podquant {version('podquant')}",
        source=plan.source,
        tp_size=1,
        modules=plan.modules,
        files=files,
        tensors=_tensors(plan),
    )
    publication.write_small(MANIFEST, manifest.encode())
    publication.publish()
    return manifest


def _index(plan: Plan) -> dict[str, object]:
    return {
        "metadata": {"total_size": sum(entry_nbytes(entry) for unit in plan.units for entry in unit.entries)},
        "weight_map": {entry[0]: unit.file for unit in plan.units for entry in unit.entries},
    }


def _tensors(plan: Plan) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for unit in plan.units:
        for tensor in unit.tensors:
            for number, (name, dtype, shape) in enumerate(tensor.entries):
                piece = Piece(unit.file, None, (0,) * len(shape), shape)
                is_codes = tensor.scheme is not None and number == 0
                tensors[name] = TensorEntry(
                    dtype,
                    shape,
                    (piece,),
                    scheme=tensor.scheme if is_codes else None,
                    scales=tensor.entries[1][0] if is_codes else None,
                )
    return tensors
