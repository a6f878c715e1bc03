"""Receipts that are not what was planned make no artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podquant.artifact.manifest import OutputFile
from podquant.conversion.commit import commit
from podquant.conversion.receipts import Receipt
from podquant.errors import ArtifactError
from podquant.storage.publication import open_publication


@pytest.mark.parametrize(
    ("receipts", "message"),
    [
        (lambda file, size: [], r"model-00001-of-00001.safetensors: planned [\d,]+ bytes, got no receipt"),
        (
            lambda file, size: [Receipt(file, {file: OutputFile(size - 1, 0)}, {})],
            r"planned [\d,]+ bytes, got [\d,]+ bytes",
        ),
    ],
)
def test_receipts_are_checked_against_the_plan(
    source: Any, tmp_path: Path, receipts: Callable[[str, int], list[Receipt]], message: str
) -> None:
    _, plan = source.plan("int8.yaml")
    unit = plan.units[0]
    with open_publication(str(tmp_path / "out")) as publication, pytest.raises(ArtifactError, match=message):
        commit(plan, receipts(unit.file, unit.bytes_out), {}, publication)
    assert not (tmp_path / "out").exists()
