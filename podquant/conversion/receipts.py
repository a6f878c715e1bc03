"""What is left of a unit that is done: what it wrote, what it read, how good the codes are; as values and as JSON.

Knows nothing of where receipts are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from podquant.artifact.documents import encode_json
from podquant.artifact.fields import Fields, decode_json
from podquant.artifact.manifest import OutputFile
from podquant.errors import ArtifactError
from podquant.quantize.quality import Quality
from podquant.storage.runs import Run


@dataclass(frozen=True)
class Seconds:
    """Where the time of a unit went: `read` and `quantize` in all its threads together; `write`, and `wait` for those
    threads, in the one that writes."""

    read: float = 0.0
    quantize: float = 0.0
    write: float = 0.0
    wait: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Seconds)))


@dataclass(frozen=True)
class Receipt:
    """A unit done: its files as written, what quantization did to each of its weights, the bytes it read, its time.

    `source` is empty where the storage of the source has no checksums to compare with.
    """

    unit: str
    files: Mapping[str, OutputFile]
    quality: Mapping[str, Quality]
    source: tuple[Run, ...] = ()
    seconds: Seconds = Seconds()

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
                "seconds": asdict(self.seconds),
            }
        )


def decode_receipt(data: bytes, where: str) -> Receipt:
    """The receipt that a document holds. Raises ArtifactError, naming `where`, if it holds none."""
    document = Fields(decode_json(data, where), where)
    document.only("unit", "files", "quality", "source", "seconds")
    return Receipt(
        document.string("unit"),
        {name: OutputFile(file.integer("size"), _crc32c(file)) for name, file in document.objects("files")},
        {name: _quality(figures) for name, figures in document.objects("quality")},
        tuple(
            Run(run.string("file"), run.integer("offset"), run.integer("nbytes"), _crc32c(run))
            for run in document.list_of_objects("source")
        ),
        Seconds(**_numbers(document.object("seconds"), Seconds)),
    )


def _crc32c(found: Fields) -> int:
    return int(found.hexadecimal("crc32c", digits=8), 16)


def _quality(figures: Fields) -> Quality:
    return Quality(**_numbers(figures, Quality, may_be_null=("sqnr_db",)))


def _numbers(found: Fields, kind: type[Quality | Seconds], may_be_null: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass of numbers."""
    values = {field.name: found.number(field.name) for field in fields(kind)}
    missing = [name for name, value in values.items() if value is None and name not in may_be_null]
    if missing:
        raise ArtifactError(f"{found.where}: {missing[0]}: expected a number, got null")
    return values
