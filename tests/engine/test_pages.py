from __future__ import annotations

import pytest

from podquant.engine.pages import PagePool
from podquant.errors import CapacityError


def test_every_page_but_the_first_is_handed_out_once() -> None:
    pool = PagePool(num_pages=6, page_size=4)
    pages = pool.allocate(2) + pool.allocate(3)
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert pool.num_free == 0
    pool.free(pages[1:3])
    assert pool.num_free == 2
    assert set(pool.allocate(2)) == set(pages[1:3])


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_page_is_counted_once_begun(num_tokens: int, num_pages: int) -> None:
    assert PagePool(num_pages=2, page_size=4).num_pages_for(num_tokens) == num_pages


def test_too_many_are_refused_and_none_taken() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    pool.allocate(1)
    with pytest.raises(CapacityError, match="3 pages wanted, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("page", [0, 2, 4, -1])
def test_a_page_that_is_not_in_use_cannot_be_freed(page: int) -> None:
    pool = PagePool(num_pages=4, page_size=4)
    assert pool.allocate(1) == [1]
    with pytest.raises(ValueError, match=f"KV page {page} was freed but is not in use"):
        pool.free([page])


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 16), (0, 16), (8, 0)])
def test_a_pool_without_room_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(CapacityError, match="expected at least 2 pages"):
        PagePool(num_pages, page_size)


def test_a_page_that_is_kept_is_found_until_its_room_is_needed() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    first, second = pool.allocate(2)
    pool.keep(first, b"first")
    pool.keep(second, b"second")
    pool.share(first)
    pool.free([first, second])
    assert (pool.num_free, pool.is_used(first), pool.is_used(second)) == (2, True, False)
    pool.free([first])
    assert (pool.num_free, pool.find(b"first"), pool.find(b"second")) == (3, first, second)
    pool.share(second)
    assert pool.allocate(2)[1] == first
    assert (pool.num_free, pool.find(b"first"), pool.find(b"second")) == (0, None, second)
    with pytest.raises(CapacityError, match="1 pages wanted, 0 of 3 free"):
        pool.allocate(1)


def test_of_pages_with_the_same_content_the_first_is_found() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    first, second = pool.allocate(2)
    pool.keep(first, b"key")
    pool.keep(second, b"key")
    pool.free([second])
    assert (pool.find(b"key"), pool.num_free) == (first, 2)


def test_pages_are_freed_by_users_who_are_all_who_use_them() -> None:
    pool = PagePool(num_pages=6, page_size=4)
    shared, own = pool.allocate(2)
    pool.share(shared)
    assert pool.num_freed_by([[shared, own]]) == 1
    assert pool.num_freed_by([[shared, own], [shared]]) == 2
    assert pool.num_freed_by([]) == 0
