"""Packing and orders: properties over many random cases, and figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.data.pack import best_fit, shuffled


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook algorithm: each document, longest first, into the fullest pack that still takes it."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        fitting = [p for p, room in enumerate(rooms) if room >= lengths[document]]
        if fitting:
            pack = min(fitting, key=lambda p: rooms[p])
        else:
            pack = len(packs)
            packs.append([])
            rooms.append(capacity)
        packs[pack].append(document)
        rooms[pack] -= lengths[document]
    return packs


def test_worked_example() -> None:
    """3 goes beside 6, where it leaves 1, and not beside 5, where it would leave 2."""
    assert best_fit(np.array([6, 5, 3, 2, 2]), 10) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("seed", range(30))
def test_nothing_lost_split_or_overfull(seed: int) -> None:
    chance = np.random.default_rng(seed)
    capacity = int(chance.integers(8, 600))
    lengths = chance.integers(1, capacity + 1, size=int(chance.integers(0, 400)))
    packs = best_fit(lengths, capacity)
    assert sorted(d for pack in packs for d in pack) == list(range(len(lengths)))
    assert all(0 < lengths[pack].sum() <= capacity for pack in packs)
    assert len(packs) == len(naive_best_fit(lengths.tolist(), capacity))
    assert packs == best_fit(lengths, capacity)


def test_typical_rows_fill_their_packs() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.7, 20_000).astype(np.int64), 8, 2048)
    packs = best_fit(lengths, 2048)
    assert lengths.sum() / (len(packs) * 2048) > 0.99


def test_a_document_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="1 … 8"):
        best_fit(np.array([3, 9]), 8)


def test_order_is_a_permutation_that_the_key_decides() -> None:
    first = shuffled(1000, 7, 0)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == shuffled(1000, 7, 0)).all()
    assert (first != shuffled(1000, 7, 1)).any()
    assert (first != shuffled(1000, 8, 0)).any()
    assert (shuffled(1000, 0, 7) != shuffled(1000, 7, 0)).any()


def test_order_is_the_same_on_every_machine() -> None:
    """Written down once: a change would make every old run impossible to repeat."""
    assert shuffled(8, 0, 0).tolist() == [4, 2, 7, 0, 3, 6, 1, 5]


def test_order_has_no_visible_pattern() -> None:
    places = np.array([shuffled(100, seed)[0] for seed in range(2000)])
    counts = np.bincount(places, minlength=100)
    chi_squared = ((counts - 20.0) ** 2 / 20.0).sum()
    assert chi_squared < 150  # 99 degrees of freedom: 1 in 1000 is above 148
