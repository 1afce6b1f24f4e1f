"""torch's CUDA caching allocator played through without a GPU: what it reserves for a step's tensors.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.1 to 2.13), with its default settings:

- A request is rounded up to whole 512 bytes. Up to 1 MiB it goes to the pool of small blocks, above to that
  of large ones; the two never lend to each other.
- The smallest free block that holds it is taken, among equals the one at the lowest address. What is left
  over becomes a free block of its own if it is at least 512 bytes (small) or more than 1 MiB (large);
  otherwise it goes with the block and counts as allocated.
- With no such block a segment is asked of the driver: 2 MiB for small requests, 20 MiB for those below
  10 MiB, above that the request rounded up to whole 2 MiB.
- A freed block joins its free neighbours in the segment. Segments go back to the driver only when a new one
  does not fit the card: then all that are wholly free, and the request is tried once more.
- Under PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True each pool is one segment that grows by pages of 2 MiB
  (small) or 20 MiB (large) that need not be given back as a whole, and every rest of 512 bytes is split off.

What it does not know: several streams (FSDP frees on another one, so blocks come back later), CUDA graphs and
their pools, max_split_size_mb and roundup_power2_divisions, the addresses that a driver really gives out
(here they rise; only ties between equal blocks depend on them), and what libraries ask of the driver
themselves (cuBLAS without torch's workspace, NCCL, bitsandbytes' paged memory).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MIB = 1024**2
SMALLEST_BLOCK = 512
LARGEST_SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT_FROM = 10 * MIB
SEGMENT_ROUNDING = 2 * MIB
ENDLESS = 1 << 60  # address space of an expandable segment

Event = tuple[int, int, int]


def round_block(num_bytes: int) -> int:
    """Bytes of the block that a tensor of `num_bytes` asks for: whole 512 bytes, none for nothing."""
    return -(-num_bytes // SMALLEST_BLOCK) * SMALLEST_BLOCK


def segment_bytes(block: int) -> int:
    """Bytes that are asked of the driver when no free block holds a block of `block` bytes."""
    if block <= LARGEST_SMALL:
        return SMALL_SEGMENT
    if block < OWN_SEGMENT_FROM:
        return LARGE_SEGMENT
    return -(-block // SEGMENT_ROUNDING) * SEGMENT_ROUNDING


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """Where a card was too small: the number of the event, counted from 0, and of its record; bytes that it
    asked for; bytes allocated and reserved then, after all wholly free segments were given back."""

    event: int
    record: int
    num_bytes: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """What torch would report as max_memory_allocated and max_memory_reserved, and the most segments at once.

    flushes: how often free segments went back to the driver to make room, which stalls a run; failure: where
    the card was too small nevertheless, the figures being those up to there.
    """

    allocated_bytes: int
    reserved_bytes: int
    segments: int
    flushes: int
    failure: OutOfMemory | None

    @property
    def fits(self) -> bool:
        return self.failure is None


def simulate(
    events: Iterable[Event], *, capacity: int | None = None, expandable_segments: bool = False
) -> CacheUse:
    """What the allocator reserves for (time, record, bytes) events in order of time, negative bytes freeing.

    capacity: bytes that the driver can give to torch in all, the CUDA context taken off; None for no limit.
    Raises ValueError when a record is allocated twice or freed without being allocated.
    """
    cache = (ExpandableCache if expandable_segments else Cache)(capacity)
    allocated = reserved = segments = 0
    failure = None
    for number, (_, record, num_bytes) in enumerate(events):
        if num_bytes < 0:
            cache.free(record)
        elif num_bytes > 0:
            if not cache.allocate(record, num_bytes):
                failure = OutOfMemory(
                    event=number,
                    record=record,
                    num_bytes=num_bytes,
                    allocated_bytes=cache.allocated,
                    reserved_bytes=cache.reserved,
                )
                break
            allocated, reserved = max(allocated, cache.allocated), max(reserved, cache.reserved)
            segments = max(segments, cache.segments)
    return CacheUse(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        segments=segments,
        flushes=cache.flushes,
        failure=failure,
    )


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment. mapped: memory lies behind its addresses (always, unless segments expand)."""

    start: int
    size: int
    pool: Pool
    free: bool = True
    mapped: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def split(self) -> bool:
        return self.before is not None or self.after is not None

    def cut(self, size: int) -> Block:
        """Keep the first `size` bytes; the rest as a block of its own, in the same state."""
        rest = Block(self.start + size, self.size - size, self.pool, self.free, self.mapped, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def join(self, other: Block | None) -> None:
        """Take over a free neighbour of the same kind, which leaves the pool."""
        if other is None or not other.free or other.mapped is not self.mapped:
            return
        self.pool.remove(other)
        if other is self.before:
            self.start, self.before = other.start, other.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = other.after
            if self.after is not None:
                self.after.before = self
        self.size += other.size


@dataclass(slots=True, eq=False)
class Pool:
    """The free blocks of one kind: `ranked` by (size, address); where segments expand, `unmapped` are the
    addresses of those without memory, and `mapped_bytes` is the memory behind all others, free or not."""

    small: bool
    mapped_bytes: int = 0
    ranked: list[tuple[int, int]] = field(default_factory=list)
    unmapped: list[int] = field(default_factory=list)
    at: dict[int, Block] = field(default_factory=dict)

    @property
    def page(self) -> int:
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT

    def add(self, block: Block) -> None:
        """Enter a free block, joined with its free neighbours."""
        block.join(block.before)
        block.join(block.after)
        self.at[block.start] = block
        if block.mapped:
            insort(self.ranked, (block.size, block.start))
        else:
            insort(self.unmapped, block.start)

    def remove(self, block: Block) -> None:
        del self.at[block.start]
        if block.mapped:
            del self.ranked[bisect_left(self.ranked, (block.size, block.start))]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.start)]

    def free_blocks(self) -> list[Block]:
        return [self.at[start] for _, start in self.ranked]


class Cache:
    """The allocator's state, in bytes: `allocated` to tensors, `reserved` of the driver, in `segments`."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.segments = self.flushes = 0
        self.pools = Pool(small=True), Pool(small=False)
        self._live: dict[int, Block] = {}
        self._end = 0

    def allocate(self, record: int, num_bytes: int) -> bool:
        """Give `num_bytes` to a record; False when the card is too small for it."""
        if record in self._live:
            raise ValueError(f"record {record} is allocated twice")
        size = round_block(num_bytes)
        pool = self.pools[size > LARGEST_SMALL]
        block = self._best(pool, size) or self._grow(pool, size)
        if block is None and self.capacity is not None:
            self.flushes += 1
            self.empty()
            block = self._grow(pool, size)
        if block is None:
            return False
        block.free = False
        if self._worth_splitting(pool, block.size - size):
            rest = block.cut(size)
            rest.free = True
            pool.add(rest)
        self._live[record] = block
        self.allocated += block.size
        return True

    def free(self, record: int) -> None:
        """Take back what a record has. Raises ValueError when it has nothing."""
        block = self._live.pop(record, None)
        if block is None:
            raise ValueError(f"record {record} is freed, but not allocated")
        self.allocated -= block.size
        block.free = True
        block.pool.add(block)

    def empty(self) -> None:
        """torch.cuda.empty_cache(): give every segment that is wholly free back to the driver."""
        for pool in self.pools:
            for block in pool.free_blocks():
                if not block.split:
                    pool.remove(block)
                    self.segments -= 1
                    self.reserved -= block.size

    def live(self) -> Iterator[tuple[int, int, int]]:
        """(record, address, bytes) of every live block."""
        return ((record, block.start, block.size) for record, block in self._live.items())

    def _best(self, pool: Pool, size: int) -> Block | None:
        place = bisect_left(pool.ranked, (size, -1))
        if place == len(pool.ranked):
            return None
        return pool.at.pop(pool.ranked.pop(place)[1])

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """A block of a new segment; None when that is more than the card has."""
        room = segment_bytes(size)
        if not self._has_room(room):
            return None
        block = Block(self._end, room, pool)
        self._end += room
        self.segments += 1
        self.reserved += room
        return block

    def _has_room(self, num_bytes: int) -> bool:
        return self.capacity is None or self.reserved + num_bytes <= self.capacity

    def _worth_splitting(self, pool: Pool, rest: int) -> bool:
        return rest >= SMALLEST_BLOCK if pool.small else rest > LARGEST_SMALL


class ExpandableCache(Cache):
    """The same under expandable_segments:True: one segment a pool, growing and shrinking by pages."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        for pool in self.pools:
            # whole pages of both sizes lie below the start
            pool.add(Block(0 if pool.small else LARGE_SEGMENT * ENDLESS, ENDLESS, pool, mapped=False))

    def empty(self) -> None:
        """Give every page that is wholly free back to the driver."""
        for pool in self.pools:
            for block in pool.free_blocks():
                self._unmap(block)

    def _best(self, pool: Pool, size: int) -> Block | None:
        """The best fit, where a block at the growing end counts with all that it can grow to."""
        place = bisect_left(pool.ranked, (size, -1))
        if place == len(pool.ranked):
            return None
        while place + 1 < len(pool.ranked) and self._reach(pool, place + 1) < self._reach(pool, place):
            place += 1
        return pool.at.pop(pool.ranked.pop(place)[1])

    @staticmethod
    def _reach(pool: Pool, place: int) -> int:
        block = pool.at[pool.ranked[place][1]]
        grows = block.after is not None and not block.after.mapped
        return block.size + (block.after.size if grows and block.after is not None else 0)

    def _grow(self, pool: Pool, size: int) -> Block | None:
        block = self._lowest_room(pool, size)
        if not block.mapped and not self._map(block, min(size, block.size)):
            return None
        while block.size < size:
            following = block.after
            assert following is not None and not following.mapped
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following  # which has taken over the block before it
        pool.remove(block)
        return block

    def _lowest_room(self, pool: Pool, size: int) -> Block:
        """The first of a row of free and unmapped blocks that together hold `size`, at the lowest address."""
        for start in pool.unmapped:
            first = pool.at[start]
            if first.before is not None and first.before.free:
                first = first.before
            if _row_holds(first, size):
                return first
        raise AssertionError("the end of the segment has room for everything")

    def _map(self, block: Block, num_bytes: int) -> bool:
        """Put memory behind the first pages of an unmapped block; False when the card has not so much."""
        pool = block.pool
        room = -(-num_bytes // pool.page) * pool.page
        if not self._has_room(room):
            return False
        pool.remove(block)
        rest = block.cut(room) if room < block.size else None
        block.mapped = True
        for piece in (rest, block):
            if piece is not None:
                pool.add(piece)
        self._count(pool, room)
        return True

    def _unmap(self, block: Block) -> None:
        """Take the memory of the whole pages in a free block away; what lies around them stays."""
        pool = block.pool
        first = -(-block.start // pool.page) * pool.page
        last = (block.start + block.size) // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        pages = block.cut(first - block.start) if first > block.start else block
        rest = pages.cut(last - first) if pages.size > last - first else None
        pages.mapped = False
        for piece in (block if block is not pages else None, rest, pages):
            if piece is not None:
                pool.add(piece)
        self._count(pool, first - last)

    def _worth_splitting(self, pool: Pool, rest: int) -> bool:
        return rest >= SMALLEST_BLOCK

    def _count(self, pool: Pool, num_bytes: int) -> None:
        pool.mapped_bytes += num_bytes
        self.reserved += num_bytes
        self.segments = sum(pool.mapped_bytes > 0 for pool in self.pools)


def _row_holds(block: Block | None, size: int) -> bool:
    """Whether a block and the free and unmapped ones that follow it without a gap have `size` bytes."""
    room = 0
    while room < size and block is not None and block.free:
        room, block = room + block.size, block.after
    return room >= size
