"""Messages survive the way to bytes and back; whatever else arrives is refused, with the message and field at fault."""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podquant.group.codec import Array, Codec, MalformedError, encode


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Point:
    """A value inside a message."""

    x: int
    label: str | None = None


@dataclass(frozen=True)
class Ping:
    """Without fields."""


@dataclass(frozen=True)
class Shape:
    """With a field of every type that there is."""

    count: int
    ratio: float
    is_open: bool
    side: Literal["left", "right"]
    colour: Colour | None
    reason: str | int | None
    points: tuple[Point, ...]
    best: Point | None
    numbers: tuple[int, ...]
    pairs: tuple[tuple[int, float], ...]
    flags: Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Envelope:
    """With another message inside."""

    inside: Ping | Shape


@dataclass(frozen=True)
class Arrays:
    """With arrays."""

    name: str
    arrays: tuple[Array, ...]


type Anything = Ping | Shape | Envelope | Arrays
CODEC: Codec[Anything] = Codec(Anything)
SHAPE = Shape(
    3, 0.1, True, "left", Colour.BLUE, 7, (Point(1), Point(2, "zwei")), None, (1, 2), ((1, -0.5),), {"a": None, "b": 2}
)

texts = st.text()
points = st.builds(Point, st.integers(), st.none() | texts)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
shapes = st.builds(
    Shape,
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.sampled_from(["left", "right"]),
    st.none() | st.sampled_from(Colour),
    st.none() | texts | st.integers(),
    st.lists(points).map(tuple),
    st.none() | points,
    st.lists(st.integers()).map(tuple),
    st.lists(st.tuples(st.integers(), st.floats(allow_nan=False))).map(tuple),
    st.dictionaries(texts, plain),
)


@given(shapes | st.builds(Envelope, shapes | st.just(Ping())) | st.just(Ping()))
def test_a_message_survives(message: Anything) -> None:
    found = CODEC.decode(encode(message))
    assert found == message
    assert repr(found) == repr(message)  # 1 is not 1.0, nor True


def test_arrays_travel_as_raw_bytes() -> None:
    ints, floats = np.arange(12, dtype=np.int32).reshape(3, 4), np.array([[0.1, -np.inf]], np.float32)
    payload = encode(Arrays("x", (ints, floats[:, ::-1], ints[:0], ints[:, 1:3])))
    assert ints.tobytes() in payload
    found = CODEC.decode(bytearray(payload))
    assert isinstance(found, Arrays)
    assert [array.tolist() for array in found.arrays] == [
        ints.tolist(),
        floats[:, ::-1].tolist(),
        [],
        ints[:, 1:3].tolist(),
    ]
    with pytest.raises(TypeError, match="an array of float64 cannot be sent"):
        encode(Arrays("x", (np.zeros(1),)))


def parts(message: Anything) -> tuple[Any, bytes]:
    """The head and the tail of a message's bytes."""
    payload = encode(message)
    (size,) = struct.unpack_from(">I", payload)
    return json.loads(payload[4 : 4 + size]), payload[4 + size :]


def joined(head: Any, tail: bytes = b"") -> bytes:
    data = json.dumps(head).encode()
    return struct.pack(">I", len(data)) + data + tail


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 1.0, "field count: expected an integer, got 1.0"),
        ("count", True, "field count: expected an integer, got True"),
        ("ratio", "1", "field ratio: expected a number, got '1'"),
        ("ratio", False, "field ratio: expected a number, got False"),
        ("is_open", 1, "field is_open: expected true or false, got 1"),
        ("side", "up", "field side: expected one of left, right, got 'up'"),
        ("colour", "green", "field colour: expected one of red, blue, got 'green'"),
        ("reason", 1.5, "field reason: expected an integer or text or null, got 1.5"),
        ("points", {}, "field points: expected a list, got {}"),
        ("points", [[1, None], [2]], r"field points.1: expected a list of 2 values \(x, label\), got \[2\]"),
        ("points", [["1", None]], "field points.0.x: expected an integer, got '1'"),
        ("best", 3, r"field best: expected a list of 2 values \(x, label\), got 3"),
        ("numbers", [1, None], "field numbers.1: expected an integer, got None"),
        ("pairs", [[1, 2, 3]], "field pairs.0: expected a list of 2 values"),
        ("flags", [], r"field flags: expected an object, got \[\]"),
        ("flags", {"a": [0] * 1000}, r"field flags.a: expected .*, got \[0, 0, 0.{40,60}\.\.\.$"),
    ],
)
def test_a_field_of_another_type_is_named(field: str, value: Any, message: str) -> None:
    head, _ = parts(SHAPE)
    head[1][field] = value
    with pytest.raises(MalformedError, match=f"message Shape: {message}"):
        CODEC.decode(joined(head))
    with pytest.raises(MalformedError, match=f"message Envelope: field inside.Shape.{message[6:]}"):
        CODEC.decode(joined(["Envelope", {"inside": head}]))


@pytest.mark.parametrize("field", ["count", "flags", "best"])
def test_a_missing_field_and_an_unknown_one_are_named(field: str) -> None:
    head, _ = parts(SHAPE)
    head[1]["extra"] = 1
    with pytest.raises(MalformedError, match=r"^message Shape: field 'extra' is unknown$"):
        CODEC.decode(joined(head))
    del head[1][field]
    with pytest.raises(MalformedError, match=f"^message Shape: field {field} is missing$"):
        CODEC.decode(joined(head))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "no message"),
        (b"\0\0\0\x05[1, 2", "no message"),
        (b"\0\0\0\x02\xff\xff", "no message"),
        (struct.pack(">I", 200_000) + b"[" * 200_000, "no message"),
        (joined({"Ping": {}}), r"expected a message, \[kind, fields\], got {'Ping': {}}"),
        (joined(["Pong", {}]), "message 'Pong': unknown here, expected one of Ping, Shape, Envelope, Arrays"),
        (joined([["Ping"], {}]), "expected a message"),
        (joined(["Point", {"x": 1, "label": None}]), "message 'Point': unknown here"),
        (joined(["Ping", []]), r"message Ping: expected an object with its fields, got \[\]"),
        (joined(["Ping", {}], b"x"), "1 bytes more than its arrays take"),
        (
            joined(["Envelope", {"inside": ["Arrays", {}]}]),
            "'Arrays': unknown here, expected one of Ping, Shape",
        ),
    ],
)
def test_what_is_no_message_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        CODEC.decode(payload)


values = st.recursive(plain, lambda each: st.lists(each) | st.dictionaries(texts, each), max_leaves=5)


@given(st.sampled_from([field.name for field in fields(Shape)]), values, values, st.binary(max_size=9))
def test_nothing_but_a_message_or_a_refusal_comes_out(field: str, one: Any, other: Any, tail: bytes) -> None:
    head, _ = parts(SHAPE)
    head[1][field] = one
    for each in (head, [one, other], ["Arrays", {"name": "", "arrays": [other]}], ["Envelope", {"inside": one}]):
        try:
            found = CODEC.decode(joined(each, tail))
        except MalformedError:
            continue
        assert CODEC.decode(encode(found)) == found


@pytest.mark.parametrize(
    ("described", "tail", "message"),
    [
        ([["<i8", [1]]], bytes(8), "field arrays.0: expected the type and shape of an array, got"),
        ([["<i4", [-1]]], bytes(4), "expected the type and shape of an array"),
        ([["<i4", [1.0]]], bytes(4), "expected the type and shape of an array"),
        ([["<i4", [1]], [["<i4"], [1]]], bytes(8), "field arrays.1: expected the type and shape"),
        ([["<i4", [2]]], bytes(7), "field arrays.0: expected 8 bytes of an array, got 7"),
        ([["<i4", [1 << 60, 1 << 60]]], bytes(8), "bytes of an array, got 8"),
        ([["<i4", [1]]], bytes(8), "4 bytes more than its arrays take"),
    ],
)
def test_arrays_that_are_not_there_are_refused(described: Any, tail: bytes, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        CODEC.decode(joined(["Arrays", {"name": "x", "arrays": described}], tail))


def test_a_class_that_cannot_be_sent_is_found_when_a_codec_is_made() -> None:
    @dataclass(frozen=True)
    class Odd:
        when: complex

    with pytest.raises(TypeError, match="no message can have a field of"):
        Codec(Odd)
