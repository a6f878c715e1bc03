"""The manifest: what FORMAT.md §2 allows is read back as written, and each thing it forbids is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from podquant.artifact.manifest import Manifest, parse_manifest
from podquant.config.scheme import Scheme
from podquant.errors import ArtifactError

INT8 = {"weight_dtype": "int8", "activation_dtype": None, "weight_block_size": None}
FILE = "model-00001-of-00001.safetensors"


def tensor(
    dtype: str, shape: list[int], scheme: dict[str, Any] | None = None, scales: str | None = None
) -> dict[str, Any]:
    piece = {"file": FILE, "rank": None, "start": [0] * len(shape), "shape": shape}
    return {"dtype": dtype, "shape": shape, "scheme": scheme, "scales": scales, "pieces": [piece]}


DOCUMENT: dict[str, Any] = {
    "format": "podquant-artifact",
    "version": 1,
    "written_by": "podquant 9.9",
    "tp_size": 1,
    "source": {"name": "tiny", "files": {"model.safetensors": {"size": 10, "header_sha256": "0" * 64}}},
    "modules": {"a": {"scheme": INT8, "rule": "int8.yaml:3"}, "b": {"scheme": None, "rule": "no rule"}},
    "files": {FILE: {"size": 99, "crc32c": "0badcafe"}},
    "tensors": {
        "a.weight": tensor("I8", [4, 6], INT8, "a.weight_scale"),
        "a.weight_scale": tensor("F32", [4, 1]),
        "b.weight": tensor("BF16", [4, 6]),
        "step": tensor("I64", []),
    },
}


def sliced() -> dict[str, Any]:
    """The same with `a.weight` cut along its input axis for two ranks, its scales shared."""
    document = copy.deepcopy(DOCUMENT)
    document["tp_size"] = 2
    document["files"][f"shared/{FILE}"] = document["files"][FILE]
    for each in document["tensors"].values():
        each["pieces"][0]["file"] = f"shared/{FILE}"
    for rank in range(2):
        document["files"][f"tp-0{rank}-of-02/{FILE}"] = {"size": 9, "crc32c": "00000000"}
    document["tensors"]["a.weight"]["pieces"] = [
        {"file": f"tp-0{rank}-of-02/{FILE}", "rank": rank, "start": [0, 3 * rank], "shape": [4, 3]} for rank in range(2)
    ]
    return document


def parse(document: object) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), "/place")


@pytest.mark.parametrize("document", [DOCUMENT, sliced()])
def test_reads_back_what_it_writes(document: dict[str, Any]) -> None:
    manifest = parse(document)
    assert json.loads(manifest.encode()) == document
    assert parse_manifest(manifest.encode(), "x") == manifest
    assert manifest.tensors["a.weight"].scheme == Scheme("int8")
    assert manifest.files[FILE].crc32c == 0x0BADCAFE


def test_a_newer_version_is_refused_naming_its_writer() -> None:
    with pytest.raises(ArtifactError, match=r"/place: podquant.json: format version 2, written by podquant 9\.9"):
        parse({"format": "podquant-artifact", "version": 2, "written_by": "podquant 9.9", "new": "thing"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1]", "expected a JSON object at the top, got list"),
        (b'{"format": 1, "format": 2}', "duplicate key 'format'"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b"{}", "the key 'format' is missing"),
    ],
)
def test_not_a_manifest(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_manifest(data, "/place")


PIECE = ("tensors", "a.weight", "pieces", 0)
BAD = [
    (("format",), "other", "format: expected \"podquant-artifact\", got 'other'"),
    (("extra",), 1, "unknown key 'extra'"),
    (("tp_size",), 0, "tp_size: expected an integer from 1, got 0"),
    (("tp_size",), True, "tp_size: expected an integer from 1, got True"),
    (("tp_size",), 2**70, "tp_size: expected an integer"),
    (("written_by",), 3, "written_by: expected a string, got 3"),
    (("source",), [], "source: expected an object, got []"),
    (("source", "files", "model.safetensors", "header_sha256"), "xyz", "header_sha256: expected 64 lower-case hex"),
    (("files", FILE, "size"), -1, f'files["{FILE}"]: size: expected an integer from 0, got -1'),
    (("files", FILE, "crc32c"), "0BADCAFE", "crc32c: expected 8 lower-case hexadecimal digits"),
    (("files", "../x"), {"size": 1, "crc32c": "00000000"}, "expected a name inside the artifact, got '../x'"),
    (("files", "/x"), {"size": 1, "crc32c": "00000000"}, "expected a name inside the artifact, got '/x'"),
    (("tensors", "a.weight", "dtype"), "I4", "dtype: expected one of BF16"),
    (("tensors", "a.weight", "dtype"), "F8_E4M3", "expected a matrix of int8, as its scheme says, got float8_e4m3fn"),
    (("tensors", "a.weight", "shape"), [4, -6], "shape: expected a list of non-negative integers"),
    (("tensors", "a.weight", "scales"), None, "expected scheme and scales both set or both null"),
    (("tensors", "a.weight", "scales"), "b.weight", 'with scales "X.weight_scale" in the manifest, got "b.weight"'),
    (("tensors", "b.weight", "shape"), [4, 6, 1], "expected pieces that cut [4, 6, 1] along one axis"),
    (("tensors", "a.weight_scale"), tensor("F32", [1, 4]), "expected scales F32 [4, 1], got F32 [1, 4]"),
    (("tensors", "a.weight_scale"), tensor("BF16", [4, 1]), "expected scales F32 [4, 1], got BF16 [4, 1]"),
    (("tensors", "a.weight", "scheme", "weight_dtype"), "int4", "weight_dtype: expected one of int8, float8_e4m3fn"),
    (("tensors", "a.weight", "scheme", "activation_dtype"), "int4", "activation_dtype: expected one of int8"),
    (("tensors", "a.weight", "scheme", "weight_block_size"), [0, 1], "weight_block_size: expected two positive"),
    (("tensors", "a.weight", "scheme"), None, "expected scheme and scales both set or both null"),
    (("tensors", "a.weight", "pieces"), [], "expected one piece of rank null at tp_size 1, got ranks []"),
    (("tensors", "a.weight", "pieces"), 3, "pieces: expected a list, got 3"),
    ((*PIECE, "rank"), 0, "expected one piece of rank null at tp_size 1, got ranks [0]"),
    ((*PIECE, "file"), "missing", 'its file "missing" is not listed'),
    ((*PIECE, "start"), [0, 1], "pieces overlap or leave a gap"),
    ((*PIECE, "shape"), [4, 5], "pieces cover 5 of 6 along axis 1"),
    ((*PIECE, "shape"), [3, 5], "expected pieces that cut [4, 6] along one axis"),
    ((*PIECE, "start"), [0], "expected pieces that cut [4, 6] along one axis"),
    (("modules", "c"), {"scheme": None, "rule": ""}, 'modules["c"] has no tensor "c.weight"'),
    (("modules", "b", "scheme"), INT8, 'modules["b"] and its tensor disagree'),
    (("modules",), {}, 'its module "a" is not a module of the manifest'),
]


def changed(document: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    document = copy.deepcopy(document)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_each_wrong_field_is_named(path: tuple[Any, ...], value: object, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse(changed(DOCUMENT, path, value))
    assert "/place: podquant.json" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*PIECE, "rank"), 1, "expected one piece of rank null, or ranks 0..1 at tp_size 2, got ranks [1, 1]"),
        ((*PIECE, "shape"), [4, 4], "pieces overlap or leave a gap"),
        ((*PIECE, "shape"), [4, 2], "pieces overlap or leave a gap"),
        ((*PIECE[:-1], 1, "shape"), [4, 2], "pieces cover 5 of 6 along axis 1"),
        (
            (*PIECE, "file"),
            f"tp-01-of-02/{FILE}",
            f'the piece of rank 0: expected it in "tp-00-of-02/{FILE}", got "tp-01-of-02/{FILE}"',
        ),
        (
            ("tensors", "step", "pieces", 0, "file"),
            f"tp-01-of-02/{FILE}",
            f'the piece of rank None: expected it in "shared/{FILE}", got',
        ),
    ],
)
def test_slices_must_cover_the_tensor(path: tuple[Any, ...], value: object, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse(changed(sliced(), path, value))
    assert message in str(caught.value)


@pytest.mark.parametrize("key", sorted(DOCUMENT))
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(ArtifactError, match=f"the key '{key}' is missing"):
        parse({name: value for name, value in DOCUMENT.items() if name != key})


TENSOR = "a.weight"
BOMBS: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "slices": (("tp_size",), 10**18),
    "slices of 90 digits": (("tp_size",), 10**90),
    "slices in a list": (("tp_size",), [1] * 100_000),
    "many axes": (("tensors", TENSOR, "shape"), [1] * 100_000),
    "a rank": (("tensors", TENSOR, "pieces", 1, "rank"), 10**18),
    "many pieces": (
        ("tensors", TENSOR, "pieces"),
        [{"file": "x", "rank": None, "start": [0, 0], "shape": [1, 1]}] * 10_000,
    ),
    "a long file": (("tensors", TENSOR, "pieces", 0, "file"), "x" * 1_000_000),
    "long scales": (("tensors", TENSOR, "scales"), "x" * 1_000_000),
    "a long type": (("tensors", TENSOR, "dtype"), "x" * 1_000_000),
    "a long checksum": (("files", f"shared/{FILE}", "crc32c"), "0" * 1_000_000),
    "large blocks": (("tensors", TENSOR, "scheme", "weight_block_size"), [10**18, 10**18]),
    "a long format": (("format",), "x" * 1_000_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_counts_are_compared_and_values_are_cut(bomb: str) -> None:
    document: Any = sliced()
    (*way, last), value = BOMBS[bomb]
    place = document
    for key in way:
        place = place[key]
    place[last] = value
    with pytest.raises(ArtifactError) as raised:
        parse(document)
    assert len(str(raised.value)) < 400
