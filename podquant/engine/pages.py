"""Which pages of the KV cache are free. Counts pages; knows nothing about arrays, sequences or devices."""

from __future__ import annotations

from podquant.errors import CapacityError


class PagePool:
    """`num_pages` pages of `page_size` tokens each. Page 0 is never handed out: padding rows of a batch write there."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 2 or page_size < 1:
            raise CapacityError(
                f"A KV cache of {num_pages} pages of {page_size} tokens holds no sequence: expected at least 2 pages "
                "(the first is for padding) of 1 token. Give the cache more memory or choose smaller pages."
            )
        self.page_size = page_size
        self.num_usable = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = [False] + [True] * self.num_usable

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises CapacityError, taking none, if fewer are free."""
        if count > len(self._free):
            raise CapacityError(
                f"KV cache: {count} pages wanted, {len(self._free)} of {self.num_usable} free. "
                "Callers compare `num_free` first."
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. Raises ValueError for a page that is free already or is not of this pool."""
        for page in pages:
            if not 0 < page <= self.num_usable or self._is_free[page]:
                raise ValueError(
                    f"KV page {page} was freed but is not in use (pages 1 to {self.num_usable} can be): "
                    "a sequence was released twice, or with another's pages."
                )
            self._is_free[page] = True
            self._free.append(page)
