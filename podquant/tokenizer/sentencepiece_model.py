"""What a `tokenizer.model` says of its pieces and of white space, which the `sentencepiece` library does not tell.

The file is a protobuf (sentencepiece_model.proto); of its fields only these are read, and one is set. Knows nothing of
how text becomes pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
"""Fields of ModelProto."""
_PIECE, _TYPE = 1, 3
"""Fields of ModelProto.SentencePiece."""
_ROLES = {"bos_token": (46, "<s>"), "eos_token": (47, "</s>")}
"""Fields of TrainerSpec, and their values where absent."""
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4
"""Fields of NormalizerSpec; the latter two are true where absent."""


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencepieceModel:
    """The part of a model that is read here.

    Attributes:
        pieces: text and type of each, by id.
        adds_prefix: whether a space is put before every text.
        removes_spaces: whether spaces at both ends, and all but one of several, are dropped.
        normalizes: whether characters are replaced by others, or dropped.
        roles: the pieces for unknown text, beginning and end, such as `bos_token` → `<s>`.
    """

    pieces: tuple[tuple[str, PieceType], ...]
    adds_prefix: bool
    removes_spaces: bool
    normalizes: bool
    roles: dict[str, str]

    @classmethod
    def parse(cls, model: bytes) -> SentencepieceModel:
        """Raises ValueError for bytes that are no such message."""
        pieces = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        for number, value in _fields(model):
            if isinstance(value, int):
                continue
            if number == _PIECES:
                pieces.append(_piece(dict(_fields(value))))
            elif number == _TRAINER:
                trainer |= dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer |= dict(_fields(value))
        return cls(
            tuple(pieces),
            normalizer.get(_ADD_DUMMY_PREFIX, 1) != 0,
            normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1) != 0,
            bool(normalizer.get(_CHARSMAP)),
            _roles(trainer, pieces),
        )

    def ids_of(self, kind: PieceType) -> list[int]:
        """The ids of pieces of a type."""
        return [token_id for token_id, (_, each) in enumerate(self.pieces) if each is kind]


def with_prefix(model: bytes, adds: bool) -> bytes:
    """The same model, but for whether it puts a space before every text: protobuf merges a message given twice."""
    setting = bytes([_ADD_DUMMY_PREFIX << 3, adds])
    return model + bytes([_NORMALIZER << 3 | 2, len(setting)]) + setting


def _piece(fields: dict[int, int | bytes]) -> tuple[str, PieceType]:
    piece, kind = fields.get(_PIECE, b""), fields.get(_TYPE, PieceType.NORMAL)
    if not isinstance(piece, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has fields of the wrong kind")
    return piece.decode(), PieceType(kind)


def _roles(trainer: dict[int, int | bytes], pieces: list[tuple[str, PieceType]]) -> dict[str, str]:
    roles = {}
    for piece, kind in pieces:
        if kind is PieceType.UNKNOWN:
            roles["unk_token"] = piece
    for role, (number, default) in _ROLES.items():
        name = trainer.get(number) or default
        piece = name.decode() if isinstance(name, bytes) else str(name)
        if (piece, PieceType.CONTROL) in pieces:
            roles[role] = piece
    return roles


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field, in protobuf's wire format."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        else:
            if kind == 2:
                length, at = _varint(message, at)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"byte {at}: wire type {kind} is none that the format has")
            value = message[at : at + length]
            at += length
            if at > len(message):
                raise ValueError(f"field {number} ends {at - len(message)} bytes after the file")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"byte {at}: a number does not end")
