"""The tiny checkpoints of the conversion's and of the server's tests, and one as users of the library have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import podquant
from tests.conversion.conftest import make_source, source
from tests.server.conftest import checkpoint

__all__ = ["checkpoint", "make_source", "source"]


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("library") / "artifact"
    podquant.convert(checkpoint, place, "int8.yaml")
    return place


@pytest.fixture(scope="session")
def engine(artifact: Path) -> Iterator[podquant.Engine]:
    """One that takes three requests at a time: one runs, two wait."""
    with podquant.load(
        artifact, device="cpu", max_running_requests=1, max_queued_requests=2, skip_server_warmup=True
    ) as engine:
        yield engine
