"""Byte-level BPE as GPT-2 and Qwen 2 keep it where tokenizer.json is missing: `vocab.json` and `merges.txt`.

The files do not say how a text is split before merging; the tokenizer classes whose way is known are declared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.foreign import cut
from podquant.tokenizer.files import TokenizerFiles
from podquant.tokenizer.panics import reason
from podquant.tokenizer.patterns import QWEN
from podquant.tokenizer.vocabulary_json import JsonVocabulary, with_added_tokens


@dataclass(frozen=True)
class _Class:
    """What a tokenizer class says beyond its files.

    Attributes:
        pattern: whose matches are merged one by one, None for GPT-2's.
        composes: whether a text is brought to Unicode's form C.
        roles: as `TokenizerFiles.roles`, where the files name none.
    """

    pattern: str | None = None
    composes: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)


_CLASSES = {
    "GPT2Tokenizer": _Class(roles=dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")),
    "Qwen2Tokenizer": _Class(QWEN, composes=True, roles={"eos_token": "<|endoftext|>"}),
}
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"} | {
    "qwen3_moe": "Qwen2Tokenizer",
    "gpt2": "GPT2Tokenizer",
}


def load_merges(files: TokenizerFiles, path: Path, model_type: str | None) -> tuple[JsonVocabulary, TokenizerFiles]:
    """Read `path`, the vocabulary, and the merges beside it; also the files, with the class's roles.

    Raises CheckpointError.
    """
    where, merges = f"{files.where}/{path.name}", path.with_name("merges.txt")
    if not merges.is_file():
        raise CheckpointError(
            f"{files.where}/{merges.name} is missing, without which {path.name} is no tokenizer. Download it, or save "
            "a tokenizer.json beside the weights."
        )
    name = files.class_name or _CLASS_OF_MODEL.get(model_type or "")
    if name not in _CLASSES:
        raise UnsupportedModelError(
            f"{where}: how tokenizer class {cut(str(name))} splits a text is not known. Known are {', '.join(_CLASSES)}"
            "; for others save a tokenizer.json beside the weights."
        )
    kind = _CLASSES[name]
    files = files.with_roles(kind.roles)
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(merges)))
    except BaseException as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{where} and {merges.name} are no BPE vocabulary: {reason(error)}. Copy them again if they are damaged, "
            "or take the files that the model came with."
        ) from error
    adds_space = files.settings.get("add_prefix_space") is True
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=adds_space, use_regex=kind.pattern is None)
    tokenizer.pre_tokenizer = by_bytes
    if kind.pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(kind.pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    if kind.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return with_added_tokens(tokenizer, files, where), files
