"""Verification names everything that is wrong with an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from podquant.artifact.verify import verify_artifact

Make = Callable[..., Path]
FILE = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(("tp_size", "axis"), [(1, 0), (2, 1)])
def test_a_sound_artifact_has_no_problems(make_artifact: Make, tp_size: int, axis: int) -> None:
    place = make_artifact(tp_size, axis)
    counts: list[int] = []
    assert verify_artifact(str(place), counts.append) == []
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file() and path.name != "podquant.json"]
    assert sum(counts) == sum(sizes)


def test_other_files_are_nobodys_business(make_artifact: Make) -> None:
    place = make_artifact()
    (place / "README.md").write_text("mine")
    assert verify_artifact(str(place)) == []


def test_each_changed_byte_of_the_weights_is_found(make_artifact: Make) -> None:
    place = make_artifact()
    data = bytearray((place / FILE).read_bytes())
    for at in range(0, len(data), 7):
        data[at] ^= 1
        (place / FILE).write_bytes(data)
        problems = verify_artifact(str(place))
        assert any(f"{FILE}: expected CRC32C" in problem for problem in problems)
        data[at] ^= 1


def test_everything_is_named_not_only_the_first(make_artifact: Make) -> None:
    place = make_artifact()
    (place / "config.json").unlink()
    (place / "quality.json").write_bytes((place / "quality.json").read_bytes().replace(b"40.5", b"99.9"))
    (place / FILE).write_bytes((place / FILE).read_bytes()[:-8])
    (place / "stray.safetensors").write_bytes(b"")
    problems = verify_artifact(str(place))
    for text in (
        "config.json is missing",
        "quality.json: expected CRC32C",
        f"{FILE}: expected ",
        "tensor 'steps' ends at byte",
        "stray.safetensors does not belong here",
    ):
        assert any(text in problem for problem in problems), text
    assert len(problems) == 5


def test_no_artifact_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert verify_artifact(str(tmp_path)) == [
        f"{tmp_path}: no podquant.json, so no artifact (an unfinished conversion leaves none). "
        "Give a directory that podquant convert wrote"
    ]


def replace(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return change


def scale(value: float) -> bytes:
    return np.float32(value).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace(FILE, scale(0.5), scale(0)),
            "greater than zero, got 0.0 at [0, 0]",
        ),
        (replace(FILE, scale(0.5), scale(-1)), "got -1.0 at [0, 0]"),
        (replace(FILE, scale(1), scale(np.nan)), "got nan at [5, 0]"),
        (replace(FILE, scale(1), scale(np.inf)), "got inf at [5, 0]"),
        (replace(FILE, b"\xfc", b"\x80"), "a.weight: row 2 holds the code -128, which no code may be"),
        (replace(FILE, b'"steps"', b'"stops"'), f"{FILE}: the tensor steps is missing"),
        (replace(INDEX, b'"steps"', b'"stops"'), f"{INDEX}: its weight_map differs from the manifest: see steps"),
        (replace(INDEX, b"{", b""), f"{INDEX}: not valid JSON"),
        (
            lambda files: files.update({INDEX: b"{}"}),
            f"{INDEX}: its weight_map differs from the manifest: see a.weight",
        ),
        (lambda files: files.pop(INDEX) and None, f"{INDEX} is not listed in the manifest"),
        (lambda files: files.update({FILE: b"\xff" * 99}), "claims a header of"),
    ],
)
def test_what_checksums_do_not_tell(
    make_artifact: Make, change: Callable[[dict[str, bytes]], None], message: str
) -> None:
    problems = verify_artifact(str(make_artifact(change=change)))
    assert any(message in problem for problem in problems), problems
    assert not any("CRC32C" in problem for problem in problems)


def test_the_count_of_wrong_scales_is_told(make_artifact: Make) -> None:
    def change(files: dict[str, bytes]) -> None:
        scales = np.linspace(0.5, 1, 6, dtype=np.float32).tobytes()
        files[FILE] = files[FILE].replace(scales, bytes(24))

    (problem,) = verify_artifact(str(make_artifact(change=change)))
    assert problem.endswith("got 0.0 at [0, 0] and 5 more")


def test_a_manifest_that_lies_about_a_checksum(make_artifact: Make) -> None:
    place = make_artifact()
    document = json.loads((place / "podquant.json").read_text())
    document["files"][FILE]["crc32c"] = "00000000"
    (place / "podquant.json").write_text(json.dumps(document))
    (problem,) = verify_artifact(str(place))
    assert f"{place}: {FILE}: expected CRC32C 00000000, as the manifest says, got " in problem
