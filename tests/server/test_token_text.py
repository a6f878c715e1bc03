"""Characters that several tokens share: their bytes, and where each token stands."""

from __future__ import annotations

from pathlib import Path

from podquant.server.token_text import TextOffsets, TokenText
from podquant.tokenizer.tokenizer import Tokenizer
from tests.server.conftest import write_tokenizer

TEXT = "né 🙂 x"


def tokens_of(directory: Path) -> tuple[Tokenizer, TokenText]:
    write_tokenizer(directory)
    tokenizer = Tokenizer.load(directory, {}, vocab_size=512, where=str(directory))
    return tokenizer, TokenText(tokenizer)


def test_parts_of_a_character_have_bytes_and_its_offset(tmp_path: Path) -> None:
    tokenizer, tokens = tokens_of(tmp_path)
    ids = tokenizer.encode(TEXT)
    data = [tokens.data(token) for token in ids]
    assert bytes(byte for each in data for byte in each or []) == TEXT.encode()
    assert "\N{REPLACEMENT CHARACTER}" in {tokens.text(token) for token in ids}
    offsets = TextOffsets(tokens)
    starts = [offsets.next(token) for token in ids]
    expected, before = [], b""
    for token in ids:
        expected.append(len(before.decode(errors="ignore")))
        before += tokens.shown(token)
    assert starts == expected
    assert max(starts) < len(TEXT)


def test_special_tokens_take_no_room_and_surplus_is_taken_off(tmp_path: Path) -> None:
    tokenizer, tokens = tokens_of(tmp_path)
    first, *rest = tokenizer.encode("def encode")
    special = min(tokenizer.special_ids)
    offsets = TextOffsets(tokens)
    assert offsets.of_prompt((special, first, *rest), len("def encode") - 1)[:2] == [0, 0]
    assert offsets.next(first) == len("def encode") - 1


def test_without_a_tokenizer() -> None:
    tokens = TokenText(None)
    assert (tokens.text(7), tokens.data(7), tokens.shown(7)) == ("token_id:7", None, b"")
