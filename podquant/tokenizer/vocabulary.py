"""What any kind of vocabulary can do. Knows nothing of files, chats or requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from podquant.tokenizer.detokenize import Detokenizer


class Vocabulary(Protocol):
    """Text to tokens and back; thread-safe.

    Attributes:
        special_ids: tokens without text.
        num_ids: one more than the largest id that a plain text can give; added tokens may lie above.
        longest: bytes of text that one token stands for at the most; None where a token may stand for any length, or
            text is dropped.
        dropped: bytes of which text may be dropped all the same, so that they do not count.
    """

    special_ids: frozenset[int]
    num_ids: int
    longest: int | None
    dropped: bytes

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; added tokens written out in `text` become those tokens. Long texts do not hold Python's lock."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all tokens; a special one shows as its name, an id without a token not at all."""
        ...

    def token_id(self, content: str) -> int | None:
        """The id of a token by its name."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for inside a text; None for an id without a token."""
        ...

    def detokenizer(self, skipped: AbstractSet[int], prompt_ids: Iterable[int]) -> Detokenizer:
        """Text for what follows `prompt_ids`, token by token, without that of `skipped`."""
        ...
