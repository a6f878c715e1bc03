"""Which pages of the KV cache are free, shared, or kept for what is in them.

A page may have several users, and a key that names its content. One without a user is kept under its key until the room
is needed, longest unused first. Counts pages; knows nothing about arrays, sequences or devices, or how keys are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

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
        self._num_users = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._unused: dict[int, None] = {}
        """Kept for their content alone, longest unused first."""

    @property
    def num_free(self) -> int:
        """Pages that can be had: nobody uses them."""
        return len(self._free) + len(self._unused)

    def num_pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages for one user. Raises CapacityError, taking none, if fewer are free."""
        if count > self.num_free:
            raise CapacityError(
                f"KV cache: {count} pages wanted, {self.num_free} of {self.num_usable} free. "
                "Callers compare `num_free` first."
            )
        pages = [self._free.pop() if self._free else self._drop_oldest() for _ in range(count)]
        for page in pages:
            self._num_users[page] = 1
        return pages

    def find(self, key: bytes) -> int | None:
        """The page with this content, used or kept; None if there is none."""
        return self._by_key.get(key)

    def share(self, page: int) -> None:
        """Become one more user of a page that was found."""
        self._unused.pop(page, None)
        self._num_users[page] += 1

    def keep(self, page: int, key: bytes) -> None:
        """Say what is in a page in use; another page that holds the same goes on to be the one that is found."""
        if key not in self._by_key:
            self._by_key[key] = page
            self._keys[page] = key

    def is_used(self, page: int) -> bool:
        """Whether anybody uses it."""
        return self._num_users[page] > 0

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back, each by one user; of those that are kept, the last is given up first.

        Raises:
            ValueError: nobody uses a page, or it is not of this pool.
        """
        for page in reversed(pages):
            if not 0 < page <= self.num_usable or not self._num_users[page]:
                raise ValueError(
                    f"KV page {page} was freed but is not in use (pages 1 to {self.num_usable} can be): "
                    "a sequence was released twice, or with another's pages."
                )
            self._num_users[page] -= 1
            if self._num_users[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._unused[page] = None

    def num_freed_by(self, users: Iterable[Sequence[int]]) -> int:
        """How many more pages would be free if these users, each with its pages, gave them back."""
        counts = Counter(page for pages in users for page in pages)
        return sum(count == self._num_users[page] for page, count in counts.items())

    def _drop_oldest(self) -> int:
        page = next(iter(self._unused))
        del self._unused[page]
        key, self._keys[page] = self._keys[page], None
        assert key is not None
        del self._by_key[key]
        return page
