"""A conversion that was begun goes on with the very same source only, whatever kind of storage it is in."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from podquant.artifact.verify import verify_artifact
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import Conversion, convert
from podquant.errors import ArtifactExistsError
from tests.storage.kinds import KINDS, fine_tune, storage


class StoppedError(Exception):
    """The first run ends here."""


def run(uri: str, target: Path, *, stop_after: int | None = None, **options: Any) -> Conversion:
    """Convert in units of some kilobytes; `stop_after` so many bytes, raise StoppedError."""
    left = stop_after or 1 << 40

    def count(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if left <= 0:
            raise StoppedError

    with closing(Checkpoint.open(uri)) as checkpoint:
        rules = load_quantization_config("int8.yaml")
        plan = plan_conversion(checkpoint, rules, source_name="model", unit_bytes=15_000)
        return convert(checkpoint, plan, str(target), threads=1, on_progress=count, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_another_fine_tune_with_equal_headers_is_never_mixed_in(
    source: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fine_tune(source.path, tmp_path / "other")
    out = tmp_path / "out"
    with storage(kind, tmp_path / "stored", monkeypatch) as put:
        run(put(other, "reference"), tmp_path / "expected")
        with pytest.raises(StoppedError):
            run(put(source.path, "model"), out, stop_after=40_000)
        uri = put(other, "model")
        message = (
            rf"{out}: an unfinished conversion is there, \d units done, and this is another: the source has other "
            r"weights in model-00001-of-00002.safetensors and 1 more, with the same names and shapes. Finish that one"
        )
        with pytest.raises(ArtifactExistsError, match=message):
            run(uri, out)
        assert run(uri, out, overwrite=True).num_units_resumed == 0
    assert contents(out) == contents(tmp_path / "expected")
    assert verify_artifact(str(out)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_source_is_gone_on_with(
    source: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with storage(kind, tmp_path / "stored", monkeypatch) as put:
        uri = put(source.path, "model")
        with pytest.raises(StoppedError):
            run(uri, out, stop_after=40_000)
        assert run(uri, out).num_units_resumed > 0
        run(put(source.path, "reference"), tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")


def touch(source: Any, begun: Path) -> None:
    os.utime(source.path / "model-00002-of-00002.safetensors", (1, 1))


def lose(source: Any, begun: Path) -> None:
    begun.unlink()


def describe_otherwise(source: Any, begun: Path) -> None:
    begun.write_text('{"source": "model"}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (touch, r"the source was written again since: model-00002-of-00002.safetensors\. Finish"),
        (lose, r"begun\.json is missing"),
        (describe_otherwise, r"begun\.json is not one that this version of podquant writes"),
    ],
)
def test_what_may_be_another_source_is_refused_by_name(
    source: Any, tmp_path: Path, change: Callable[[Any, Path], None], message: str
) -> None:
    with pytest.raises(StoppedError):
        run(str(source.path), tmp_path / "out", stop_after=40_000)
    change(source, tmp_path / "out.receipts" / "begun.json")
    with pytest.raises(ArtifactExistsError, match=message):
        run(str(source.path), tmp_path / "out")
