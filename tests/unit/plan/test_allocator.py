"""The CUDA caching allocator on paper: each of its rules by hand, and what must hold for any use."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tunesmith.plan.allocator import Cache, CacheUse, Event, ExpandableCache, round_block, simulate

KIB, MIB = 1024, 1024**2


def events(*sizes: tuple[str, float]) -> list[Event]:
    """("a", bytes) allocates a under its name; ("a", 0) frees it."""
    held: dict[str, int] = {}
    found = []
    for time, (name, size) in enumerate(sizes):
        record = ord(name)
        if size:
            held[name] = int(size)
        found.append((time, record, int(size) if size else -held.pop(name)))
    return found


def used(*sizes: tuple[str, float], capacity: float | None = None, expandable: bool = False) -> CacheUse:
    room = None if capacity is None else int(capacity)
    return simulate(events(*sizes), capacity=room, expandable_segments=expandable)


@pytest.mark.parametrize(
    ("num_bytes", "block"), [(0, 0), (1, 512), (512, 512), (513, 1024), (10**6, 1000448)]
)
def test_blocks_are_whole_512_bytes(num_bytes: int, block: int) -> None:
    assert round_block(num_bytes) == block


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # a rest of no more than 1 MiB goes with the block; a larger one is split off
        (11 * MIB, 12 * MIB, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (19.5 * MIB, 20 * MIB, 20 * MIB),
    ],
)
def test_segment_for_a_request(request_bytes: float, allocated: int, reserved: int) -> None:
    found = used(("a", request_bytes))
    assert (found.allocated_bytes, found.reserved_bytes, found.segments) == (allocated, reserved, 1)


def test_small_blocks_share_a_segment_and_pools_never_lend() -> None:
    assert used(*[(name, 512 * KIB) for name in "abcd"]).reserved_bytes == 2 * MIB
    assert used(*[(name, 512 * KIB) for name in "abcde"]).reserved_bytes == 4 * MIB
    # 20 MiB lie free, but not for a small block
    assert used(("a", 20 * MIB), ("a", 0), ("b", KIB)).reserved_bytes == 22 * MIB


def test_the_best_fit_is_taken() -> None:
    # 12 and 30 MiB are free: 11.5 MiB goes into the 12, then 29 into the 30
    found = used(("a", 30 * MIB), ("b", 12 * MIB), ("a", 0), ("b", 0), ("c", 11.5 * MIB), ("d", 29.5 * MIB))
    assert (found.reserved_bytes, found.segments) == (42 * MIB, 2)


def test_freed_neighbours_become_one_block() -> None:
    cut = [("a", 20 * MIB), ("a", 0), ("b", 8 * MIB), ("c", 8 * MIB), ("b", 0), ("c", 0)]
    assert used(*cut, ("d", 20 * MIB)).reserved_bytes == 20 * MIB
    # with 8 MiB of it taken, the rest is two pieces, and 12 MiB need a segment of their own
    assert used(*cut[:5], ("d", 12 * MIB)).reserved_bytes == 32 * MIB


def test_rest_of_a_cached_large_block_goes_with_it_up_to_one_mib() -> None:
    found = used(("a", 40 * MIB), ("a", 0), ("b", 39 * MIB))
    assert (found.allocated_bytes, found.reserved_bytes) == (40 * MIB, 40 * MIB)
    cache = Cache()
    cache.allocate(0, 40 * MIB)
    cache.free(0)
    cache.allocate(1, 39 * MIB)
    assert cache.allocated == 40 * MIB
    cache.free(1)
    cache.allocate(2, 39 * MIB - 512)
    assert cache.allocated == 39 * MIB - 512


def test_free_segments_go_back_before_a_card_is_too_small() -> None:
    story = [("a", 40 * MIB), ("a", 0), ("b", 50 * MIB)]
    assert used(*story, capacity=100 * MIB).flushes == 0
    found = used(*story, capacity=60 * MIB)
    assert (found.fits, found.flushes, found.reserved_bytes) == (True, 1, 50 * MIB)


def test_a_card_too_small_is_told_with_the_place() -> None:
    # 9 MiB in the middle of a segment of 20 keep it: 21 of 100 MiB are not in use, yet 12 MiB do not fit
    story = [("a", 9 * MIB), ("b", 9 * MIB), ("a", 0), ("c", 70 * MIB), ("d", 12 * MIB)]
    found = used(*story, capacity=100 * MIB)
    assert found.failure is not None and not found.fits
    assert (found.failure.event, found.failure.record, found.failure.num_bytes) == (4, ord("d"), 12 * MIB)
    assert (found.failure.allocated_bytes, found.failure.reserved_bytes) == (79 * MIB, 90 * MIB)
    assert used(*story, capacity=102 * MIB).fits


def test_expandable_segments_use_what_fragments_would_waste() -> None:
    story = [("a", 30 * MIB), ("b", 30 * MIB), ("a", 0), ("b", 0), ("c", 60 * MIB)]
    assert used(*story).reserved_bytes == 120 * MIB
    assert used(*story, expandable=True).reserved_bytes == 60 * MIB
    small, large = used(("a", KIB), expandable=True), used(("a", 21 * MIB), expandable=True)
    assert (small.reserved_bytes, large.reserved_bytes) == (2 * MIB, 40 * MIB)
    assert large.allocated_bytes == 21 * MIB


def test_expandable_segments_give_single_pages_back() -> None:
    # the first 80 MiB are free, the last 20 are not: their pages are used for 60 MiB at the end
    story = [("a", 80 * MIB), ("b", 20 * MIB), ("a", 0), ("c", 90 * MIB)]
    found = used(*story, capacity=120 * MIB, expandable=True)
    assert (found.fits, found.flushes, found.segments) == (True, 1, 1)
    assert used(*story, capacity=100 * MIB, expandable=True).failure is not None


def test_a_lower_gap_is_filled_before_the_segment_grows() -> None:
    cache = ExpandableCache(100 * MIB)
    for record, size in enumerate((40, 20)):
        assert cache.allocate(record, size * MIB)
    cache.free(0)
    cache.empty()
    assert cache.reserved == 20 * MIB
    assert cache.allocate(2, 30 * MIB)
    starts = {record: start for record, start, _ in cache.live()}
    assert starts[2] < starts[1]


def test_nothing_takes_nothing() -> None:
    assert simulate([(0, 1, 0), (1, 1, 0)]) == used()
    assert used().reserved_bytes == 0


def test_events_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="record 1 is freed"):
        simulate([(0, 1, -512)])
    with pytest.raises(ValueError, match="record 1 is allocated twice"):
        simulate([(0, 1, 512), (1, 1, 512)])


def long_story(number: int) -> list[Event]:
    """A use of memory as long as told: numbers of a linear congruential generator, half of them releases."""
    state, live, found = 12345, list[tuple[int, int]](), list[Event]()

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % below

    for time in range(number):
        if live and draw(2):
            record, size = live.pop(draw(len(live)))
            found.append((time, record, -size))
        else:
            live.append((time, 1 + draw((4 * KIB, MIB, 10 * MIB, 200 * MIB)[draw(4)])))
            found.append((time, *live[-1]))
    return found


@pytest.mark.parametrize(
    ("number", "capacity", "allocated", "reserved", "segments", "flushes"),
    [
        (4000, None, 3020202496, 3414163456, 28, 0),
        (1000, None, 1690536960, 2258632704, 20, 0),
        (1000, 2100528414, 1690928640, 2097152000, 18, 3),
    ],
)
def test_as_torch_itself(
    number: int, capacity: int | None, allocated: int, reserved: int, segments: int, flushes: int
) -> None:
    """The figures are those of torch 1.13.1's own DeviceCachingAllocator, compiled with a driver that counts."""
    found = simulate(long_story(number), capacity=capacity)
    assert found == CacheUse(
        allocated_bytes=allocated, reserved_bytes=reserved, segments=segments, flushes=flushes, failure=None
    )


@pytest.mark.parametrize("kind", [Cache, ExpandableCache])
@pytest.mark.parametrize("seed", range(4))
def test_any_use_keeps_the_books(kind: type[Cache], seed: int) -> None:
    """Blocks never overlap, nothing is lost, the card's size is kept, and all of it comes back."""
    chance = random.Random(seed)
    capacity = 700 * MIB
    cache, live = kind(capacity), dict[int, int]()
    for record in range(1500):
        if live and chance.random() < 0.5:
            cache.free(gone := chance.choice(list(live)))
            del live[gone]
        size = chance.choice(
            (chance.randint(1, MIB), chance.randint(MIB, 12 * MIB), chance.randint(1, 90 * MIB))
        )
        if cache.allocate(record, size):
            live[record] = size
        assert sum(map(round_block, live.values())) <= cache.allocated <= cache.reserved <= capacity
        spans = sorted((start, start + held) for _, start, held in cache.live())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert {record: live[record] <= held for record, _, held in cache.live()} == dict.fromkeys(live, True)
    assert cache.flushes > 0
    for record in list(live):
        cache.free(record)
    assert cache.allocated == 0
    cache.empty()
    assert (cache.reserved, cache.segments) == (0, 0)
