"""Which replica a request goes to."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("ray.serve")
from tunesmith.cluster.prefix_router import SLACK, ranked

NAMES = [f"replica-{n}" for n in range(5)]


def test_the_same_key_goes_to_the_same_replica_and_keys_are_spread() -> None:
    firsts = [ranked(f"key {n}", NAMES, {})[0] for n in range(1000)]
    assert firsts == [ranked(f"key {n}", NAMES[::-1], {})[0] for n in range(1000)]
    assert all(120 < count < 280 for count in Counter(firsts).values())


def test_only_the_keys_of_a_replica_that_goes_move() -> None:
    gone = NAMES[2]
    for n in range(200):
        before = ranked(f"key {n}", NAMES, {})
        after = ranked(f"key {n}", [name for name in NAMES if name != gone], {})
        assert after == [name for name in before if name != gone]


def test_a_replica_with_too_much_to_do_is_passed_over() -> None:
    favourite, second, *_ = ranked("key", NAMES, {})
    assert ranked("key", NAMES, {favourite: SLACK - 1})[0] == favourite
    order = ranked("key", NAMES, {favourite: SLACK})
    assert order[0] == second and order[-1] == favourite
    assert ranked("key", NAMES, dict.fromkeys(NAMES, 7))[0] == favourite


def test_without_a_key_the_idlest_is_first() -> None:
    load = {name: number for number, name in enumerate(NAMES)}
    assert ranked("", NAMES, load) == NAMES
    assert len({ranked("", NAMES, {})[0] for _ in range(200)}) == len(NAMES)
    assert ranked("", [], {}) == ranked("key", [], {}) == []
