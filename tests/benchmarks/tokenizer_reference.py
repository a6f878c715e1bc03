"""Makes `tests/data/tokenizers/`: small tokenizers as families ship them, and ids that other libraries give.

By hand, in an environment of its own (transformers==5.24.0 mistral-common sentencepiece protobuf tiktoken):

    python -m tests.benchmarks.tokenizer_reference

The references are transformers' AutoTokenizer, mistral-common's Tekkenizer and tiktoken; `tests/tokenizer/
test_reference_ids.py` holds podquant to them.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
import tokenizers
import transformers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

ROOT = Path(__file__).parents[2]
OUT = ROOT / "tests" / "data" / "tokenizers"
LINES = [line for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()] + [
    *("def f(x):", "    return x  # twice", "class A:", "        for each in self.all:"),
    *(
        "naïve café, größer, straße, señor",
        "日本語のテキスト 日本 テスト",
        "Привет, мир!",
        "你好，世界！",
        "1, 2, 3.14",
    ),
] * 20
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    *("", " ", "   ", "\n", "hello", " hello", "  hello ", "Hello world!", "  two  spaces,   three   "),
    *(
        "\n\n\n  \n\tx\r\n",
        "👩‍👩‍👧‍👦 🇩🇪 😀😀",
        "日本語、漢字。한국어",
        "e\u0301 n\u0303o",
        "I'll don't WE'RE 1234567 x=3.14",
    ),
    *(
        "\ufffd\x00\u200d▁ ▁▁a",
        "▁hello",
        "a▁b",
        "𝄞 \U0010ffff ﬁ ① Å",
        "\u00a0x\u3000y",
        "Привет, мир!",
        "مرحبا",
        "नमस्ते",
    ),
    *("def f(x):\n    return x  # twice\n\n\nclass A:\n\tpass", '{"a": [1, 2.5, null]}', "http://a.b/?q=1&r=%20"),
    *("<s>", "<s>hello", "<s> hello", "hello<s>", "hello <s> world", "</s></s>", "<unk> a", "<0x0A>", "<bos>x<eos>"),
    *(
        "[INST] What is 1+1? [/INST]",
        "<s>[INST]Hi[/INST] Hello </s><s>[INST] Bye [/INST]",
        "x[INST]y",
        "[INST][INST] [TOOL",
    ),
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>",
    "<bos><start_of_turn>user\nHello there<end_of_turn>\n<start_of_turn>model\n",
    *("<start_of_turn>", " <start_of_turn> x", "\n\n<end_of_turn>\n\n  y"),
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    *(
        "<s><|im_start|>user\nHello<|im_end|>\n",
        "<|im_start|> a <|im_end|> b",
        "<|user|>  \n hi <|user|>x",
        "<tool>x <tool> y",
    ),
    *("<|endoftext|>a", "<|begin_of_text|>hi<|eot_id|>", "<think>\nhm\n</think>\n\nyes", "License, Version 2.0"),
    *(
        "a" * 40,
        "You may obtain a copy of the License at",
        "the  the   the    the",
        "\r\n\r\n",
        "\ttab\tsep",
        "trail\n",
    ),
]

BYTES = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"} | {
    **{"remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True},
    "vocab_size": 900,
}
CONTROL = ["[INST]", "[/INST]", "[TOOL_CALLS]"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
RUNS = ["▁" * length for length in range(2, 17)] + ["\n" * length for length in range(1, 9)]
UNUSED = [f"[UNUSED_TOKEN_{number}]" for number in (145, 146)]
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama": BYTES,
    "mistral": BYTES | {"control_symbols": CONTROL},
    "gemma": BYTES
    | {"add_dummy_prefix": False, "bos_id": 2, "eos_id": 1, "pad_id": 0, "unk_id": 3, "bos_piece": "<bos>"}
    | {"eos_piece": "<eos>", "user_defined_symbols": [*TURNS, *RUNS], "vocab_size": 950},
    "internlm": BYTES | {"user_defined_symbols": UNUSED},
    "unigram": {"model_type": "unigram", "vocab_size": 420, "normalization_rule_name": "identity"},
}


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens_decoder`."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | flags
    return {"content": content, "special": special} | flags


FIRST = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
LLAMA = ROLES | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
BEYOND = {
    **FIRST,
    **{"900": token("<|im_start|>"), "901": token("<|im_end|>"), "902": token("<|user|>", rstrip=True)},
    "903": token("<tool>", special=False),
}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"} | {
    **{"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False},
    "additional_special_tokens": TURNS,
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def sentencepiece_model(kind: str) -> bytes:
    """The bytes of a trained tokenizer.model."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **SENTENCEPIECE[kind],
    )
    return out.getvalue()


def byte_level(pattern: str | None) -> tokenizers.Tokenizer:
    """Byte-level BPE, split by `pattern` or as GPT-2 does."""
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = by_bytes
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def llama3() -> tokenizers.Tokenizer:
    """Adds its beginning by a template, and takes whole pieces before merging."""
    tokenizer = byte_level(PATTERN)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(names)
    begin = tokenizer.token_to_id(names[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]}:1 $B:1", special_tokens=[(names[0], begin)]
    )
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def qwen() -> tokenizers.Tokenizer:
    """Composes characters; its special tokens follow the vocabulary."""
    tokenizer = byte_level(PATTERN)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def metaspace(model: Path, *, first: bool) -> tokenizers.Tokenizer:
    """Sentencepiece's BPE in the form of tokenizer.json, as Llama 2 has it, or as Metaspace has it."""
    proto = SentencePieceExtractor(str(model)).proto
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, vocab)
    prepends = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    content = json.loads(tokenizer.to_str())
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    content["normalizer"] = None if first else json.loads(prepends.__getstate__())
    content["pre_tokenizer"] = scheme if first else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def ranks() -> list[bytes]:
    """Byte strings by rank: the bytes, and what byte-level BPE merges."""
    characters = {character: bytes([byte]) for byte, character in enumerate(_characters())}
    vocabulary = json.loads(byte_level(PATTERN).to_str())["model"]["vocab"]
    tokens = [b"".join(characters[each] for each in name) for name in sorted(vocabulary, key=vocabulary.get)]
    return [bytes([byte]) for byte in range(256)] + [each for each in tokens if len(each) > 1]


def _characters() -> list[str]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tekken() -> dict[str, Any]:
    """As Mistral Nemo has it: more ranks than the model, and special tokens that are not listed."""
    tokens = ranks()
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(each).decode(), "token_str": None}
        for rank, each in enumerate(tokens)
    ]
    config = {"pattern": PATTERN, "num_vocab_tokens": len(vocab), "version": "v3"}
    return {"config": config | {"default_vocab_size": 600, "default_num_special_tokens": 30}, "vocab": vocab}


def write_files() -> None:
    """Every file that a case uses."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for kind in SENTENCEPIECE:
        (OUT / f"{kind}.model").write_bytes(sentencepiece_model(kind))
    for name, tokenizer in {
        "llama3": llama3(),
        "qwen": qwen(),
        "prepend": metaspace(OUT / "llama.model", first=False),
        "metaspace": metaspace(OUT / "llama.model", first=True),
    }.items():
        (OUT / f"{name}.json").write_text(tokenizer.to_str() + "\n")
    byte_level(None).model.save(str(OUT), "gpt2")
    (OUT / "tekken.json").write_text(json.dumps(tekken()) + "\n")
    lines = [base64.b64encode(each) + b" %d" % rank for rank, each in enumerate(ranks())]
    (OUT / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")


def sentencepiece_case(name: str, kind: str, model_type: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    return case(name, {"tokenizer.model": f"{kind}.model"}, model_type, settings)


def case(name: str, files: dict[str, str], model_type: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """One tokenizer: the files of a checkpoint by the names in `OUT`, and what the small files say."""
    return {"name": name, "files": files, "model_type": model_type, "tokenizer_config": settings}


def cases() -> list[dict[str, Any]]:
    names = dict(zip(UNUSED, ("<|im_end|>", "<|im_start|>"), strict=True))
    ids = {piece: sentencepiece_id("internlm", piece) for piece in UNUSED}
    renamed = FIRST | {str(ids[piece]): token(name) for piece, name in names.items()}
    turns = {str(sentencepiece_id("gemma", piece)): token(piece) for piece in TURNS}
    runs = {str(sentencepiece_id("gemma", piece)): token(piece, special=False) for piece in RUNS}
    control = FIRST | {str(sentencepiece_id("mistral", piece)): token(piece) for piece in CONTROL}
    first = {str(number): token(name) for number, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>"))}
    end = len(json.loads((OUT / "qwen.json").read_text())["model"]["vocab"])
    later = {str(end + 3): token("<tool>", special=False), str(end + 4): token("<|user|>", rstrip=True)}
    return [
        sentencepiece_case("llama 1", "llama", "llama", LLAMA),
        sentencepiece_case("llama 2", "llama", "llama", LLAMA | {"legacy": False}),
        sentencepiece_case("llama, legacy", "llama", "llama", LLAMA | {"legacy": True}),
        sentencepiece_case("llama, no prefix", "llama", "llama", LLAMA | {"add_prefix_space": False}),
        sentencepiece_case("llama, more tokens", "llama", "llama", LLAMA | {"added_tokens_decoder": BEYOND}),
        sentencepiece_case(
            "mistral 1",
            "llama",
            "mistral",
            LLAMA | {"legacy": True, "added_tokens_decoder": FIRST, "add_eos_token": True},
        ),
        sentencepiece_case(
            "mistral 3", "mistral", "mistral", LLAMA | {"legacy": False, "added_tokens_decoder": control}
        ),
        sentencepiece_case("mistral, one file", "mistral", "mistral", None),
        sentencepiece_case("gemma", "gemma", "gemma", GEMMA | {"added_tokens_decoder": first | turns | runs}),
        sentencepiece_case(
            "internlm 2",
            "internlm",
            "internlm2",
            ROLES
            | {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True, "added_tokens_decoder": renamed}
            | {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}},
        ),
        sentencepiece_case("unigram", "unigram", "other", None),
        case("llama 3", {"tokenizer.json": "llama3.json"}, "llama", FAST | LLAMA3),
        case(
            "qwen 3, more tokens",
            {"tokenizer.json": "qwen.json"},
            "other",
            FAST | {"eos_token": "<|im_end|>", "added_tokens_decoder": later},
        ),
        case("prepend", {"tokenizer.json": "prepend.json"}, "other", FAST | ROLES),
        case("metaspace", {"tokenizer.json": "metaspace.json"}, "other", FAST | ROLES),
        case(
            "gpt 2",
            {"vocab.json": "gpt2-vocab.json", "merges.txt": "gpt2-merges.txt"},
            "gpt2",
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "eos_token": None, "unk_token": None},
        ),
        case("tekken", {"tekken.json": "tekken.json"}, "mistral", None),
        case("qwen 1", {"qwen.tiktoken": "qwen.tiktoken"}, "qwen", None),
    ]


def sentencepiece_id(kind: str, piece: str) -> int:
    found: int = sentencepiece.SentencePieceProcessor(model_file=str(OUT / f"{kind}.model")).piece_to_id(piece)
    return found


def lay_out(one: dict[str, Any], directory: Path) -> None:
    """The directory of a checkpoint, less its weights."""
    for name, source in one["files"].items():
        shutil.copy(OUT / source, directory / name)
    (directory / "config.json").write_text(json.dumps({"model_type": one["model_type"]}))
    if one["tokenizer_config"] is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(one["tokenizer_config"]))


def refer(one: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`one` with ids of every text, null where the reference does not tell, and their text less special tokens."""
    if "tekken.json" in one["files"]:
        reference = Tekkenizer.from_file(directory / "tekken.json")
        plain = [not any(name in text for name in reference._special_tokens_reverse_vocab) for text in TEXTS]
        ids = [reference.encode(text, bos=True, eos=False) for text in TEXTS]
        decoded = [reference.decode(each) for each in ids]
        return one | {
            "ids": [each if is_plain else None for each, is_plain in zip(ids, plain, strict=True)],
            "decoded": [each if is_plain else None for each, is_plain in zip(decoded, plain, strict=True)],
        }
    if "qwen.tiktoken" in one["files"]:
        tokens = {each: rank for rank, each in enumerate(ranks())}
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        encoding = tiktoken.Encoding(
            "qwen",
            pat_str=PATTERN,
            mergeable_ranks=tokens,
            special_tokens={name: len(tokens) + offset for offset, name in enumerate(special)},
        )
        composed = [normalizers.NFC().normalize_str(text) for text in TEXTS]
        ids = [encoding.encode(text, allowed_special="all") for text in composed]
        return one | {"ids": ids, "decoded": [encoding.decode([i for i in each if i < len(tokens)]) for each in ids]}
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    # without settings transformers 5 adds no beginning, unlike 4 and the families' own code
    adds = one["tokenizer_config"] is not None
    ids = [reference.encode(text, add_special_tokens=adds) for text in TEXTS]
    decoded = [reference.decode(each, skip_special_tokens=True) for each in ids]
    if one["name"] == "unigram":  # sentencepiece drops all spaces at the beginning, transformers one
        own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        decoded = [own.decode([each for each in some if each > own.eos_id()]) for some in ids]
    return one | {"ids": ids, "decoded": decoded}


def main() -> None:
    write_files()
    done = []
    for one in cases():
        with tempfile.TemporaryDirectory() as folder:
            lay_out(one, Path(folder))
            done.append(refer(one, Path(folder)))
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    versions |= {"sentencepiece": sentencepiece.__version__, "tiktoken": tiktoken.__version__}
    lines = ",\n".join(json.dumps(one, ensure_ascii=True) for one in done)
    head = f'"versions": {json.dumps(versions)},\n"texts": {json.dumps(TEXTS)}'
    (OUT / "reference.json").write_text(f'{{{head},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
