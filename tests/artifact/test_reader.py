"""An artifact, whole or cut, gives the rows asked for; one that breaks FORMAT.md is refused when it is opened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.artifact.reader import Artifact
from podquant.config.scheme import Scheme
from podquant.errors import ArtifactError, CheckpointError, StorageError

Make = Callable[..., Path]
FILE = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(("tp_size", "axis"), [(1, 0), (2, 0), (3, 0), (2, 1), (4, 1)])
def test_rows_are_put_together(make_artifact: Make, whole: dict[str, Any], tp_size: int, axis: int) -> None:
    artifact = Artifact.open(str(make_artifact(tp_size, axis)))
    for name, array in whole.items():
        np.testing.assert_array_equal(artifact.read_tensor(name), array)
        assert artifact.read_tensor(name).dtype == array.dtype
    for start in range(7):
        for stop in range(start, 7):
            expected = whole["a.weight"][start:stop]
            np.testing.assert_array_equal(artifact.read_rows("a.weight", start, stop), expected)
            out = np.full((stop - start, 4), 99, np.int8)
            assert artifact.read_rows("a.weight", start, stop, out=out) is out
            np.testing.assert_array_equal(out, expected)
    artifact.close()


def test_columns_are_those_of_whole_pieces(make_artifact: Make, whole: dict[str, Any]) -> None:
    artifact = Artifact.open(str(make_artifact(4, 1)))
    assert artifact.column_bounds("a.weight") == (0, 1, 2, 3, 4)
    for columns in ((0, 1), (3, 4), (1, 3), (0, 4)):
        expected = whole["a.weight"][1:5, slice(*columns)]
        np.testing.assert_array_equal(artifact.read_rows("a.weight", 1, 5, columns=columns), expected)
    artifact.close()


def test_columns_that_split_a_piece_are_refused(make_artifact: Make) -> None:
    artifact = Artifact.open(str(make_artifact(2, 1)))
    with pytest.raises(ArtifactError, match=r"a\.weight: columns \[0, 1\] are not whole pieces of \[0, 2, 4\]"):
        artifact.read_rows("a.weight", 0, 6, columns=(0, 1))


def test_it_tells_what_the_tensors_are(make_artifact: Make) -> None:
    artifact = Artifact.open(str(make_artifact()))
    assert artifact.config == {"model_type": "llama"}
    assert artifact.tensors["a.weight"].scheme == Scheme("int8")
    assert artifact.tensors["a.weight"].scales == "a.weight_scale"
    assert artifact.tensors["norm.weight"].scheme is None
    assert artifact.read_quality()["a.weight"]["sqnr_db"] == 40.5


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("a.weight", 0, 7), ("a.weight", -1, 2), ("a.weight", 3, 2), ("steps", 0, 1)]
)
def test_rows_that_are_not_there(make_artifact: Make, name: str, start: int, stop: int) -> None:
    artifact = Artifact.open(str(make_artifact()))
    with pytest.raises(ArtifactError, match=rf"{name}: no rows \[{start}, {stop}\) in shape"):
        artifact.read_rows(name, start, stop)


def test_a_tensor_that_is_not_there(make_artifact: Make) -> None:
    with pytest.raises(ArtifactError, match=r"no tensor 'b\.weight'"):
        Artifact.open(str(make_artifact())).read_tensor("b.weight")


@pytest.mark.slow
def test_reading_needs_neither_jax_nor_convert() -> None:
    unwanted = "('jax', 'podquant.conversion', 'numba')"
    code = f"import sys, podquant.artifact.reader; print([name for name in {unwanted} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def remove(name: str) -> Callable[[Path], object]:
    return lambda place: (place / name).unlink()


def shorten(name: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-1])


def lie(*path: Any, value: object) -> Callable[[Path], object]:
    """Change the manifest only."""

    def change(place: Path) -> None:
        document = json.loads((place / "podquant.json").read_text())
        at = document
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        (place / "podquant.json").write_text(json.dumps(document))

    return change


def reheader(place: Path) -> None:
    """Rename a tensor inside the file, keeping its length."""
    data = (place / FILE).read_bytes()
    (place / FILE).write_bytes(data.replace(b'"steps"', b'"stops"'))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("podquant.json"), ArtifactError, "no podquant.json, so no artifact"),
        (remove(FILE), ArtifactError, f"{FILE} is missing"),
        (remove("quality.json"), ArtifactError, "quality.json is missing"),
        (shorten(FILE), ArtifactError, rf"{FILE}: expected \d+ bytes, as the manifest says, got \d+"),
        (reheader, ArtifactError, f"{FILE}: the tensor steps is missing, which the manifest places here"),
        (lie("tensors", "steps", value=None), ArtifactError, f"{FILE}: holds steps, which the manifest does not place"),
        (
            lie("tensors", "norm.weight", "dtype", value="F16"),
            ArtifactError,
            r"norm.weight: expected F16 \[4\], .* BF16",
        ),
        (lie("files", "config.json", value=None), ArtifactError, "config.json is not listed in the manifest"),
        (lie("version", value=7), ArtifactError, "format version 7, written by podquant 9.9"),
    ],
)
def test_what_is_wrong_is_found_on_opening(
    make_artifact: Make, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    place = make_artifact()
    damage(place)
    with pytest.raises(error, match=message) as caught:
        Artifact.open(str(place))
    assert str(place) in str(caught.value)


def test_tensors_in_another_order_are_refused(make_artifact: Make) -> None:
    """Readers that go through a file from front to back rely on it."""
    place = make_artifact()
    document = json.loads((place / "podquant.json").read_text())
    names = list(document["tensors"])
    document["tensors"] = {name: document["tensors"][name] for name in [*names[:2], *names[:1:-1]]}
    (place / "podquant.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=f"{FILE}: norm.weight is not where the order of the manifest places it"):
        Artifact.open(str(place))


def test_a_broken_header_is_refused(make_artifact: Make) -> None:
    place = make_artifact(change=lambda files: files.update({FILE: b"\xff" * 64}))
    with pytest.raises(CheckpointError, match=f"{FILE}: claims a header of"):
        Artifact.open(str(place))


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected a directory, found nothing"):
        Artifact.open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tensors": {"a.weight": {}}}', "sqnr_db' is missing"),
        ('{"tensors": {"a.weight": {"sqnr_db": "x"}}}', "number"),
    ],
)
def test_quality_figures_are_not_trusted(make_artifact: Make, text: str, message: str) -> None:
    artifact = Artifact.open(str(make_artifact(change=lambda files: files.update({"quality.json": text.encode()}))))
    with pytest.raises(ArtifactError, match=message):
        artifact.read_quality()


def test_an_artifact_without_quality_figures(make_artifact: Make) -> None:
    artifact = Artifact.open(str(make_artifact(change=lambda files: files.pop("quality.json") and None)))
    with pytest.raises(ArtifactError, match=r"quality\.json: is not listed in the manifest"):
        artifact.read_quality()
