"""The page pool against a simple model of it: no page is lost, none is given twice."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.page_counts import check_pool
from tunesmith.model.pages import EMPTY_PAGE, PAGE, PagePool, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (10 * PAGE, 10)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_every_page_is_given_once_and_never_the_empty_one() -> None:
    pool = PagePool(5)
    taken = {pool.take() for _ in range(5)}
    assert taken == {1, 2, 3, 4, 5}
    assert EMPTY_PAGE not in taken
    assert pool.take() is None
    assert (pool.num_used, pool.num_available) == (5, 0)


def test_freed_pages_are_used_again_before_untouched_ones() -> None:
    pool = PagePool(100)
    first = [pool.take() for _ in range(3)]
    pool.release([page for page in first if page is not None])
    assert {pool.take() for _ in range(3)} == set(first)


def test_a_pool_of_any_size_is_made_at_once() -> None:
    pool = PagePool(10**12)
    page = pool.take()
    assert (pool.num_used, pool.num_available) == (1, 10**12 - 1)
    assert page == 1


def test_a_published_page_is_found_while_used_and_afterwards() -> None:
    pool = PagePool(2)
    page, key = pool.take(), pool.key(b"", range(PAGE))
    assert page is not None
    assert pool.find(key) is None
    pool.publish(page, key)
    assert pool.find(key) == page
    pool.release([page])
    pool.release([page])
    assert pool.num_used == 0
    assert pool.find(key) == page
    assert pool.num_used == 1


def test_keys_depend_on_tokens_their_order_what_came_before_and_the_pool() -> None:
    pool, tokens = PagePool(1), list(range(PAGE))
    keys = {
        pool.key(b"", tokens),
        pool.key(b"", tokens[::-1]),
        pool.key(b"1 adapter", tokens),
        pool.key(b"2 adapter", tokens),
        pool.key(pool.key(b"", tokens), tokens),
        PagePool(1).key(b"", tokens),
    }
    assert len(keys) == 6
    assert pool.key(b"", tokens) in keys


def test_the_least_recently_used_page_goes_first_and_the_end_of_a_sequence_before_its_beginning() -> None:
    pool = PagePool(4)
    old, new = (
        [_published(pool, name) for name in ("a", "b")],
        [_published(pool, name) for name in ("c", "d")],
    )
    pool.release(old)
    pool.release(new)
    assert pool.find(_key(pool, "a")) == old[0]
    pool.release([old[0]])
    assert [pool.take() for _ in range(4)] == [old[1], new[1], new[0], old[0]]


def test_a_page_of_the_same_tokens_that_is_known_stays() -> None:
    pool = PagePool(2)
    first, second = _published(pool, "a"), _published(pool, "a")
    assert first != second
    pool.release([second])
    assert pool.find(_key(pool, "a")) == first
    check_pool(pool, [[first], [first]])


def test_forgotten_pages_are_not_found_again_even_while_others_use_them() -> None:
    pool = PagePool(2)
    page = _published(pool, "a")
    pool.find(_key(pool, "a"))
    pool.release([page], forget=True)
    assert pool.find(_key(pool, "a")) is None
    check_pool(pool, [[page]])
    pool.release([page])
    check_pool(pool, [])
    assert pool.num_available == 2


@pytest.mark.parametrize("seed", range(4))
def test_random_use_loses_no_page(seed: int) -> None:
    """Sequences take, find, publish and release pages; what each holds is written down beside the pool."""
    draw, pool = random.Random(seed), PagePool(draw_size := 12)
    held: list[list[int]] = []
    content: dict[int, str] = {}
    for _ in range(3000):
        action = draw.random()
        if action < 0.4 or not held:
            _grow(draw, pool, held, content)
        elif action < 0.6:
            name = draw.choice("abcdefghijklmnop")
            page = pool.find(_key(pool, name))
            if page is not None:
                assert content[page] == name
                draw.choice(held).append(page)
        else:
            pool.release(held.pop(draw.randrange(len(held))), forget=draw.random() < 0.1)
        check_pool(pool, held)
    for pages in held:
        pool.release(pages)
    check_pool(pool, [])
    assert pool.num_available == draw_size


def _grow(draw: random.Random, pool: PagePool, held: list[list[int]], content: dict[int, str]) -> None:
    page = pool.take()
    if page is None:
        return
    content[page] = name = draw.choice("abcdefghijklmnop")
    if draw.random() < 0.7:
        pool.publish(page, _key(pool, name))
    if held and draw.random() < 0.5:
        draw.choice(held).append(page)
    else:
        held.append([page])


def _published(pool: PagePool, name: str) -> int:
    page = pool.take()
    assert page is not None
    pool.publish(page, _key(pool, name))
    return page


def _key(pool: PagePool, name: str) -> bytes:
    return pool.key(name.encode(), range(PAGE))


def test_the_policy_loads_no_torch() -> None:
    code = (
        "import sys\nimport tunesmith.model.scheduler, tunesmith.model.pages\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
