"""Turns the receipts of all units into an artifact: checks them against the plan, describes them, publishes.

The manifest is written last. Knows nothing of how the units were done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version

from podquant.artifact.documents import encode_index, encode_json
from podquant.artifact.manifest import Manifest, OutputFile, TensorEntry
from podquant.artifact.naming import CONFIG, INDEX, MANIFEST, QUALITY
from podquant.conversion.plan import Plan
from podquant.conversion.receipts import Receipt
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
    by_unit = {receipt.unit: receipt for receipt in receipts}
    files: dict[str, OutputFile] = {}
    for unit in plan.units:
        receipt = by_unit.get(unit.file)
        for name, size in unit.sizes.items():
            found = None if receipt is None else receipt.files.get(name)
            if found is None or found.size != size:
                got = "no receipt" if found is None else f"{found.size:,} bytes"
                raise ArtifactError(f"{publication.uri}: {name}: planned {size:,} bytes, got {got}")
            files[name] = found
    files |= copied
    tensors = _tensors(plan)
    quality = {name: asdict(figures) for unit in plan.units for name, figures in by_unit[unit.file].quality.items()}
    documents = {CONFIG: encode_json(plan.config), QUALITY: encode_json({"tensors": quality})}
    if plan.tp_size == 1:
        documents[INDEX] = encode_index(tensors)
    for name in sorted(documents):
        written = publication.write_small(name, documents[name])
        files[name] = OutputFile(written.nbytes, written.crc32c)
    manifest = Manifest(
        written_by=f"podquant {version('podquant')}",
        source=plan.source,
        tp_size=plan.tp_size,
        modules=plan.modules,
        files=files,
        tensors=tensors,
    )
    publication.write_small(MANIFEST, manifest.encode())
    publication.publish()
    return manifest


def _tensors(plan: Plan) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for unit in plan.units:
        for tensor in unit.tensors:
            for output in tensor.outputs:
                is_codes = tensor.scheme is not None and output is tensor.outputs[0]
                tensors[output.name] = TensorEntry(
                    output.dtype,
                    output.shape,
                    unit.pieces(output),
                    scheme=tensor.scheme if is_codes else None,
                    scales=tensor.outputs[1].name if is_codes else None,
                )
    return tensors
