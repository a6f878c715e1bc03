"""Small real tokenizers of the kinds that checkpoints carry."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from podquant.tokenizer.tokenizer import Tokenizer
from podquant.tokenizer.vocabulary import Vocabulary
from podquant.tokenizer.vocabulary_json import JsonVocabulary
from podquant.tokenizer.vocabulary_sentencepiece import SentencepieceVocabulary
from podquant.tokenizer.vocabulary_tiktoken import TiktokenClass, TiktokenVocabulary
from tests.tokenizer.vocabularies import QWEN_PATTERN, sentencepiece_model, trained_ranks

CORPUS = [
    "The quick brown fox jumps over the lazy dog, then the dog jumps over the fox.",
    "Hello world! Hello there, hello again; the world is wide and the words are many.",
    "naïve café, größer, straße, señor",
    "日本語のテキスト 日本 テスト",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(*, is_whole: bool = True) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have; or not whole, as SmolLM2: some bytes have no token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_whole else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Sentencepiece BPE with a token for each byte it has no piece for, as Llama 2 and Mistral have."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """Sentencepiece unigram with byte fallback, as Gemma's relatives have."""
    pieces = [
        "▁",
        "▁the",
        "▁hello",
        "▁world",
        "he",
        "ll",
        "o",
        "wor",
        "ld",
        "é",
        "日本",
        *"abcdefghijklmnopqrstuvwxyz,.!",
    ]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    scores = [(piece, 0.0) for piece in SPECIAL] + [(piece, -2.0 - 1 / len(piece)) for piece in pieces]
    model = models.Unigram(scores + [(piece, -20.0) for piece in bytes_], unk_id=0, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def ranks() -> TiktokenVocabulary:
    """Byte-level BPE in tiktoken's form."""
    return TiktokenVocabulary(TiktokenClass(QWEN_PATTERN), trained_ranks(), {"<s>": 400, "</s>": 401}, {400, 401})


def sentencepiece() -> SentencepieceVocabulary:
    """Llama 2's kind in sentencepiece's own form."""
    return SentencepieceVocabulary(sentencepiece_model("llama"))


KINDS: dict[str, Callable[[], Vocabulary]] = {
    "byte_level": lambda: JsonVocabulary(byte_level()),
    "byte_fallback": lambda: JsonVocabulary(byte_fallback()),
    "unigram": lambda: JsonVocabulary(unigram()),
    "ranks": ranks,
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="session", params=list(KINDS))
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(KINDS[request.param]())


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Tokenizer:
    return Tokenizer(JsonVocabulary(byte_level()), eos_ids=[2])


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Tokenizer:
    return Tokenizer(JsonVocabulary(byte_fallback()), eos_ids=[2])
