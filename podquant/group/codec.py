"""Messages as bytes and back: dataclasses, named by their class, and checked field by field against their annotations.

A message is a JSON head, `[kind, fields]`, and behind it the raw bytes of its NumPy arrays, which the head describes.
Nothing received is executed or unpickled: only the kinds that a codec was made for come out of it, each with exactly
its fields, of exactly their types. Knows nothing of sockets, or of what messages mean.
"""

from __future__ import annotations

import enum
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeAliasType, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_HEAD = struct.Struct(">I")
_DTYPES = {name: np.dtype(name) for name in ("<i4", "<f4")}
"""Of arrays, named as NumPy's `dtype.str` does, which tells the order of bytes."""

_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_PLAIN = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_SHOWN = 60
"""Characters of a wrong value that an error quotes."""

type _Read = Callable[[Any, _Tail], Any]
type _Write = Callable[[Any, list[Any]], Any]
type _Kind = Callable[..., Any]
"""A class of messages, or of values in them."""


class MalformedError(Exception):
    """Bytes that are no message of the kinds expected; says which message and field, what was expected and found."""


class Codec[M]:
    """Decodes what arrives in one direction of a connection: messages of these kinds, and no others."""

    def __init__(self, messages: Any) -> None:
        """`messages`: the union of their classes, M. Raises TypeError for a field that no message can have."""
        self.kinds: Mapping[str, Callable[..., M]] = {kind.__name__: kind for kind in _alternatives(messages)}
        for kind in self.kinds.values():
            _fields(kind)

    def decode(self, payload: bytes | bytearray) -> M:
        """The message behind `encode`. Its arrays share the memory of `payload`.

        Raises:
            MalformedError: it is none of these kinds, or a field is missing, unknown, or of another type.
        """
        try:
            (size,) = _HEAD.unpack_from(payload)
            head = json.loads(payload[_HEAD.size : _HEAD.size + size])
        except (struct.error, ValueError, RecursionError) as error:
            raise MalformedError(f"no message: {error}") from error
        tail = _Tail(payload, _HEAD.size + size)
        try:
            message: M = _read_tagged(self.kinds, head, tail)
            tail.end()
        except _WrongError as error:
            raise MalformedError(str(error)) from None
        return message


def encode(message: Any) -> bytes:
    """A message, which is a dataclass, as bytes; its arrays must be int32 or float32."""
    blobs: list[Any] = []
    head = _to_json(_write_tagged(message, blobs)).encode()
    return b"".join((_HEAD.pack(len(head)), head, *blobs))


class _WrongError(Exception):
    """A value that is not what its annotation says, and where in the message it is."""

    def __init__(self, problem: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(problem, path)
        self._problem, self._path = problem, path

    def inside(self, name: object) -> _WrongError:
        """As seen from one step further out."""
        return _WrongError(self._problem, (str(name), *self._path))

    def __str__(self) -> str:
        message, *path = self._path or ("",)
        where = f"message {message}: " if message else ""
        return where + (f"field {'.'.join(path)}: " if path else "") + self._problem


def _wrong(expected: str, got: Any) -> _WrongError:
    text = repr(got)
    return _WrongError(f"expected {expected}, got {text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'}")


class _Tail:
    """The bytes behind a head, taken array by array."""

    def __init__(self, payload: bytes | bytearray, offset: int) -> None:
        self._payload, self._offset = payload, offset

    def take(self, value: Any) -> Array:
        """The next array, which the head describes as `[dtype, shape]`."""
        if type(value) is not list or len(value) != 2 or not _is_dtype(value[0]) or not _are_counts(value[1]):
            raise _wrong("the type and shape of an array", value)
        dtype, count = _DTYPES[value[0]], math.prod(value[1])
        left = len(self._payload) - self._offset
        if count * dtype.itemsize > left:
            raise _WrongError(f"expected {count * dtype.itemsize:,} bytes of an array, got {left:,}")
        array = np.frombuffer(self._payload, dtype, count, self._offset).reshape(value[1])
        self._offset += array.nbytes
        return array

    def end(self) -> None:
        """Nothing may be left."""
        if self._offset != len(self._payload):
            raise _WrongError(f"{len(self._payload) - self._offset:,} bytes more than its arrays take")


def _is_dtype(name: Any) -> bool:
    return type(name) is str and name in _DTYPES


def _are_counts(shape: Any) -> bool:
    return type(shape) is list and all(type(axis) is int and axis >= 0 for axis in shape)


@dataclass(frozen=True)
class _Plan:
    """How the values of one annotation are read from JSON's, and become them.

    Attributes:
        read: a value from JSON's.
        write: JSON's from a value; None: they are the same.
        as_is: JSON's of these types are values, so `read` need not be asked.
    """

    read: _Read
    write: _Write | None = None
    as_is: frozenset[type] = frozenset()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """What a union is of, unions in it taken apart as well; of anything else, itself."""
    if isinstance(hint, TypeAliasType):
        return _alternatives(hint.__value__)
    if get_origin(hint) not in (Union, UnionType):
        return (hint,)
    return tuple(each for part in get_args(hint) for each in _alternatives(part))


@cache
def _plan(hint: Any) -> _Plan:
    """Of an annotation. Raises TypeError for one that no message can have."""
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return _union(alternatives)
    (hint,) = alternatives
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _plain(frozenset((hint,)))
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple:
        return _tuple(arguments)
    if origin is Mapping and arguments[0] is str:
        return _mapping(_plan(arguments[1]))
    if origin is np.ndarray:
        return _Plan(lambda value, tail: tail.take(value), _write_array)
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return _choice(tuple(each.value for each in hint), hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(hint)
    raise TypeError(f"no message can have a field of {hint}")


def _plain(kinds: frozenset[type]) -> _Plan:
    """Values that are the same in JSON; an integer is a number too."""
    expected = " or ".join(name for kind, name in _PLAIN.items() if kind in kinds)
    widens = float in kinds and int not in kinds

    def read(value: Any, tail: _Tail) -> Any:
        if type(value) in kinds:
            return value
        if widens and type(value) is int:
            return float(value)
        raise _wrong(expected, value)

    return _Plan(read, as_is=kinds)


def _choice(choices: tuple[str, ...], make: Callable[[str], str] = str) -> _Plan:
    def read(value: Any, tail: _Tail) -> Any:
        if type(value) is str and value in choices:
            return make(value)
        raise _wrong(f"one of {', '.join(choices)}", value)

    return _Plan(read)


def _union(kinds: tuple[Any, ...]) -> _Plan:
    """Plain types; or one of any kind and None; or messages, each with its kind in front of its fields."""
    if all(kind in _PLAIN for kind in kinds):
        return _plain(frozenset(kinds))
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:
        return _optional(_plan(others[0]))
    messages = {kind.__name__: kind for kind in kinds}
    return _Plan(lambda value, tail: _read_tagged(messages, value, tail), _write_tagged)


def _optional(plan: _Plan) -> _Plan:
    read, write = plan.read, plan.write
    return _Plan(
        lambda value, tail: None if value is None else read(value, tail),
        None if write is None else lambda value, blobs: None if value is None else write(value, blobs),
        plan.as_is | {NoneType},
    )


def _tuple(arguments: tuple[Any, ...]) -> _Plan:
    if arguments[1:] == (...,):
        return _list(_plan(arguments[0]))
    plans = [_plan(each) for each in arguments]
    if any(plan.write is not None for plan in plans):
        raise TypeError("a row of a message holds plain values only")
    return _row(list(enumerate(plans)), lambda *values: values)


def _list(plan: _Plan) -> _Plan:
    """A tuple of any number of values."""
    write_one = plan.write

    def read(value: Any, tail: _Tail) -> Any:
        if type(value) is not list:
            raise _wrong("a list", value)
        if plan.as_is.issuperset(map(type, value)):
            return tuple(value)  # the tokens of a prompt are many thousands
        return tuple(_read_each([(number, plan) for number in range(len(value))], value, tail))

    return _Plan(read, None if write_one is None else lambda value, blobs: [write_one(each, blobs) for each in value])


def _row(plans: Sequence[tuple[Any, _Plan]], make: Callable[..., Any]) -> _Plan:
    """So many values, in this order."""
    num_values = len(plans)

    def read(value: Any, tail: _Tail) -> Any:
        if type(value) is not list or len(value) != num_values:
            raise _wrong(f"a list of {num_values} values ({', '.join(str(name) for name, _ in plans)})", value)
        return make(*_read_each(plans, value, tail))

    return _Plan(read)


def _mapping(plan: _Plan) -> _Plan:
    """Plain values by names that the sender chooses."""
    if plan.write is not None:
        raise TypeError("a mapping of a message holds plain values only")

    def read(value: Any, tail: _Tail) -> Any:
        if type(value) is not dict:
            raise _wrong("an object", value)
        return dict(zip(value, _read_each([(name, plan) for name in value], value.values(), tail), strict=True))

    return _Plan(read, lambda value, blobs: dict(value))


def _read_each(plans: Iterable[tuple[Any, _Plan]], values: Iterable[Any], tail: _Tail) -> list[Any]:
    """Values by what their plans make of them; an error names the one that is wrong."""
    found = []
    for (name, plan), value in zip(plans, values, strict=True):
        if type(value) in plan.as_is:
            found.append(value)
            continue
        try:
            found.append(plan.read(value, tail))
        except _WrongError as error:
            raise error.inside(name) from None
    return found


@cache
def _fields(kind: _Kind) -> Mapping[str, _Plan]:
    """Of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: _plan(hints[field.name]) for field in fields(cast(Any, kind))}


def _record(kind: _Kind) -> _Plan:
    """A dataclass inside a message: the values of its fields, in their order."""
    plans = _fields(kind)
    writers = [(name, plan.write) for name, plan in plans.items()]

    def write(value: Any, blobs: list[Any]) -> Any:
        return [
            getattr(value, name) if write_field is None else write_field(getattr(value, name), blobs)
            for name, write_field in writers
        ]

    return _Plan(_row(list(plans.items()), kind).read, write)


def _read_message(kind: _Kind, value: Any, tail: _Tail) -> Any:
    """A message: an object with exactly its fields."""
    plans = _fields(kind)
    if type(value) is not dict:
        raise _wrong("an object with its fields", value)
    if missing := [name for name in plans if name not in value]:
        raise _WrongError(f"field {missing[0]} is missing")
    if unknown := [name for name in value if name not in plans]:
        raise _WrongError(f"field {unknown[0]!r:.{_SHOWN}} is unknown")
    return kind(*_read_each(plans.items(), [value[name] for name in plans], tail))


def _write_message(message: Any, blobs: list[Any]) -> dict[str, Any]:
    return {
        name: getattr(message, name) if plan.write is None else plan.write(getattr(message, name), blobs)
        for name, plan in _fields(cast(_Kind, type(message))).items()
    }


def _read_tagged(kinds: Mapping[str, _Kind], value: Any, tail: _Tail) -> Any:
    """`[kind, fields]`, of one of these kinds."""
    if type(value) is not list or len(value) != 2 or type(value[0]) is not str:
        raise _wrong("a message, [kind, fields]", value)
    if value[0] not in kinds:
        raise _WrongError(f"message {value[0]!r:.{_SHOWN}}: unknown here, expected one of {', '.join(kinds)}")
    try:
        return _read_message(kinds[value[0]], value[1], tail)
    except _WrongError as error:
        raise error.inside(value[0]) from None


def _write_tagged(message: Any, blobs: list[Any]) -> list[Any]:
    return [type(message).__name__, _write_message(message, blobs)]


def _write_array(array: Array, blobs: list[Any]) -> list[Any]:
    name = array.dtype.str
    if name not in _DTYPES:
        raise TypeError(f"an array of {array.dtype} cannot be sent, only of int32 and float32")
    blobs.append(np.ascontiguousarray(array).data)
    return [name, array.shape]
