"""The files of a model beside its weights that go along into an artifact: tokenizer, licence, card, code and the like.

Chosen by name, and what the model card shows or links to. Knows nothing of their content, save for the links.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import unquote

from podquant.checkpoint.shards import WEIGHTS
from podquant.storage.store import Store

CARD = "README.md"

_PATTERNS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
    "*.py",
    CARD,
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Of files that mean the same beside quantized weights (`*` does not match a `/` here)."""

_LINKS = re.compile(r"""\]\(\s*<?([^)\s>]+)|(?:src|href)\s*=\s*["']([^"']+)["']""")
"""Of Markdown (`[text](target)`, `![text](target)`) and of HTML."""

_MOST_CARD_BYTES = 4 << 20


def companions(store: Store, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the files to copy, in the order of `sizes`, which are all files of `store`."""
    shown = _shown_by_card(store, sizes)
    return tuple(name for name in sizes if _may_go(name) and (name in shown or _matches(name)))


def _may_go(name: str) -> bool:
    return not name.endswith(WEIGHTS) and not any(part.startswith(".") for part in name.split("/"))


def _matches(name: str) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _PATTERNS)


def _shown_by_card(store: Store, sizes: Mapping[str, int]) -> frozenset[str]:
    if not 0 < sizes.get(CARD, 0) <= _MOST_CARD_BYTES:
        return frozenset()
    text = store.read(CARD, _MOST_CARD_BYTES).decode(errors="replace")
    targets = (unquote(first or second).partition("#")[0] for first, second in _LINKS.findall(text))
    return frozenset(str(PurePosixPath(target)) for target in targets if target and "://" not in target)
