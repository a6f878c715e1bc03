"""Names for what is in pages of the KV cache. Keys and values depend on all tokens before them, and so do the names."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


class PageKeys:
    """The keys of a sequence's full pages, made as they are asked for.

    Two pages have one key only if they hold the same tokens after the same tokens, for requests with the same salt:
    each is the SHA-256 of the one before it and of the page's tokens.

    Args:
        page_size: tokens of a page.
        salt: requests with different ones share nothing, so nobody learns from the time of an answer what others asked.
    """

    def __init__(self, page_size: int, salt: str) -> None:
        self._page_size = page_size
        self._keys: list[bytes] = []
        self._root = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()

    def of(self, token_ids: Sequence[int], count: int) -> list[bytes]:
        """Of the first `count` pages of a sequence that only ever grows."""
        for page in range(len(self._keys), count):
            before = self._keys[-1] if self._keys else self._root
            tokens = array("q", token_ids[page * self._page_size : (page + 1) * self._page_size])
            self._keys.append(hashlib.sha256(before + tokens.tobytes()).digest())
        return self._keys[:count]
