"""Whether a page pool's books are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tunesmith.model.pages import PagePool


def check_pool(pool: PagePool, held: Iterable[Sequence[int]]) -> None:
    """`held`: the pages of every sequence. Each page is used by those who hold it, or free, or idle."""
    users = Counter(page for pages in held for page in pages)
    every = range(1, pool.num_pages + 1)
    assert {page: count for page, count in pool._users.items() if count} == users, "a page is counted wrongly"
    unused = [page for page in every if not users[page]]
    untouched = range(pool._first_untouched, pool.num_pages + 1)
    assert sorted([*pool._free, *pool._idle, *untouched]) == unused, "a page is lost, or given twice"
    assert {page: key for key, page in pool._page_of.items()} == pool._key_of
    assert set(pool._idle) == {page for page in unused if page in pool._key_of}
    assert (pool.num_used, pool.num_available) == (len(users), len(unused))
