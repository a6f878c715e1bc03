"""Small real vocabularies, made here: ranks as tiktoken files hold them, and sentencepiece models."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import sentencepiece

CORPUS = (
    "The quick brown fox jumps over the lazy dog, then the dog jumps over the fox.",
    "Hello world! Hello there, hello again; the world is wide and the words are many.",
    "naïve café, größer, straße, señor",
    "日本語のテキスト 日本 テスト",
    "def f(x):\n    return x\n\n    # twice  two\n",
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HARD_TEXTS = (
    "",
    " ",
    "Hello world!",
    "  two  spaces,   three   ",
    "\n\n\n  \n\tx\r\n",
    "👩‍👩‍👧‍👦 🇩🇪 😀😀",
    "日本語のテキスト、漢字。한국어",
    "e\u0301 n\u0303o a\u0308\u0323",
    "I'll don't WE'RE 1234567 x=3.14",
    "\ufffd\x00\u200d▁ ▁▁a",
    "𝄞 \U0010ffff ﬁ ① Å",
    "<s>[INST] hi [/INST]</s> <|im_start|>user<|im_end|><|endoftext|><0x0A>",
)


@cache
def trained_ranks(num: int = 320) -> dict[bytes, int]:
    """Ranks of byte-level BPE, trained on `CORPUS` as it is split by Qwen's pattern: the most frequent pair first."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [
        [bytes([byte]) for byte in piece.encode()] for text in CORPUS for piece in regex.findall(QWEN_PATTERN, text)
    ]
    while len(ranks) < num:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        words = [_merged(word, left, right) for word in words]
    return ranks


def merge_by_ranks(ranks: dict[bytes, int], text: str) -> list[int]:
    """Byte-level BPE as defined: in each piece, the first pair of lowest rank becomes one token, until none is left."""
    ids = []
    for piece in regex.findall(QWEN_PATTERN, text):
        word = [bytes([byte]) for byte in piece.encode()]
        while known := [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(word)) if a + b in ranks]:
            at = min(known)[1]
            word[at : at + 2] = [word[at] + word[at + 1]]
        ids += [ranks[token] for token in word]
    return ids


def _merged(word: Sequence[bytes], left: bytes, right: bytes) -> list[bytes]:
    merged: list[bytes] = []
    at = 0
    while at < len(word):
        width = 2 if tuple(word[at : at + 2]) == (left, right) else 1
        merged.append(b"".join(word[at : at + width]))
        at += width
    return merged


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """A file in tiktoken's text form."""
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")


SENTENCEPIECE: dict[str, dict[str, Any]] = {
    # as Llama 2 and Mistral have it
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    | {"remove_extra_whitespaces": False, "split_digits": True, "vocab_size": 420},
    # as Mistral 7B v0.3 has it
    "mistral": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    | {"remove_extra_whitespaces": False, "split_digits": True, "vocab_size": 423}
    | {"control_symbols": ["[INST]", "[/INST]", "[TOOL_CALLS]"]},
    # as Gemma has it
    "gemma": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    | {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "vocab_size": 420}
    | {"user_defined_symbols": ["\n\n", "▁▁", "<start_of_turn>"], "bos_id": 2, "eos_id": 1, "pad_id": 0, "unk_id": 3},
    # as T5 and its time had it: NFKC, and every run of white space becomes one space
    "unigram": {"model_type": "unigram", "vocab_size": 110},
}


@cache
def sentencepiece_model(kind: str) -> bytes:
    """The bytes of a tokenizer.model."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=out,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **SENTENCEPIECE[kind],
    )
    return out.getvalue()
