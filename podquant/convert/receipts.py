"""What is left of a unit that is done: what it wrote, what it read, how good the codes are; as values and as JSON.

Knows nothing of where receipts are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from podquant.artifact.documents import encode_json
from podquant.artifact.fields import Fields, decode_json
from podquant.artifact.manifest import OutputFile
from podquant.errors import ArtifactError
from podquant.quantize.quality import Quality


@dataclass(frozen=True)
class SourceRun:
    """Bytes `[offset, offset + nbytes)` of a source file, as they arrived: their CRC32C."""

    file: str
    offset: int
    nbytes: int
    crc32c: int


@dataclass(frozen=True)
class Receipt:
    """A unit done: its files as written, what quantization did to each of its weights, and the bytes it read.

    `source` is empty where the storage of the source has no checksums to compare with.
    """

    unit: str
    files: Mapping[str, OutputFile]
    quality: Mapping[str, Quality]
    source: tuple[SourceRun, ...] = ()

    def encode(self) -> bytes:
        """The bytes of its document; a function of its values only."""
        return encode_json(
            {
                "unit": self.unit,
                "files": {
                    name: {"size": file.size, "crc32c": f"{file.crc32c:08x}"} for name, file in self.files.items()
                },
                "quality": {name: asdict(figures) for name, figures in self.quality.items()},
                "source": [{**asdict(run), "crc32c": f"{run.crc32c:08x}"} for run in self.source],
            }
        )


def decode_receipt(data: bytes, where: str) -> Receipt:
    """The receipt that a document holds. Raises ArtifactError, naming `where`, if it holds none."""
    document = Fields(decode_json(data, where), where)
    document.only("unit", "files", "quality", "source")
    return Receipt(
        document.string("unit"),
        {name: OutputFile(file.integer("size"), _crc32c(file)) for name, file in document.objects("files")},
        {name: _quality(figures) for name, figures in document.objects("quality")},
        tuple(
            SourceRun(run.string("file"), run.integer("offset"), run.integer("nbytes"), _crc32c(run))
            for run in document.list_of_objects("source")
        ),
    )


def _crc32c(found: Fields) -> int:
    return int(found.hexadecimal("crc32c", digits=8), 16)


def _quality(figures: Fields) -> Quality:
    values = {field.name: figures.number(field.name) for field in fields(Quality)}
    missing = [name for name, value in values.items() if value is None and name != "sqnr_db"]
    if missing:
        raise ArtifactError(f"{figures.where}: {missing[0]}: expected a number, got null")
    return Quality(**values)  # type: ignore[arg-type]
