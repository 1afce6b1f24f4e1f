"""The keys and values of running sequences, and attention over them for one flat stream of new tokens.

Sequences lie in pools of slots, a pool for each power of two of tokens: a sequence moves to the next pool
when it outgrows its own. So memory is at most about twice what is used, and one attention call serves all
sequences of similar length with little padding. In a pool the used slots are always 0 … n-1.

Shapes: T new tokens of all sequences, H query heads, Hkv key heads, G = H / Hkv, Dh head size, S slots,
L tokens of a slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SMALLEST_POOL = 512


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence's place: slot `index` of `pool`, with `length` tokens in it."""

    pool: Pool
    index: int
    length: int = 0


@dataclass(eq=False, slots=True)
class Pool:
    """Slots of `size` tokens each; `buffers[layer]` holds keys and values [S, L, Hkv, Dh]."""

    size: int
    slots: list[Slot] = field(default_factory=list)
    buffers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def at(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's buffers with room for every slot, like `k` and `v` [1, Hkv, T, Dh] in kind."""
        found = self.buffers.get(layer)
        if found is None or found[0].shape[0] < len(self.slots):
            found = self.buffers[layer] = (self._grown(found, 0, k), self._grown(found, 1, v))
        return found

    def _grown(self, old: tuple[Tensor, Tensor] | None, which: int, like: Tensor) -> Tensor:
        num_slots = 1 << (len(self.slots) - 1).bit_length()
        # Zeros, not empty memory: a masked position has weight 0, but 0 times a stray NaN is NaN.
        new = like.new_zeros(num_slots, self.size, like.shape[1], like.shape[3])
        if old is not None:
            new[: old[which].shape[0]] = old[which]
        return new


class KVCache:
    """Slots for sequences of up to `max_length` tokens. Layers and head sizes are learnt from the tensors."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.pools: dict[int, Pool] = {}

    def open(self, num_tokens: int) -> Slot:
        """A new slot with room for `num_tokens`."""
        return self._place(self._pool(num_tokens))

    def reserve(self, slot: Slot, num_tokens: int) -> None:
        """Make room for `num_tokens` in all, moving the sequence to a larger pool when it needs one."""
        if num_tokens <= slot.pool.size:
            return
        old = Slot(slot.pool, slot.index, slot.length)
        old.pool.slots[old.index] = old
        new = self._place(self._pool(num_tokens))
        for layer, (k, v) in old.pool.buffers.items():
            row_k, row_v = k[None, old.index].transpose(1, 2), v[None, old.index].transpose(1, 2)
            new_k, new_v = new.pool.at(layer, row_k, row_v)
            new_k[new.index, : slot.length] = k[old.index, : slot.length]
            new_v[new.index, : slot.length] = v[old.index, : slot.length]
        slot.pool, slot.index = new.pool, new.index
        slot.pool.slots[slot.index] = slot
        self.close(old)

    def close(self, slot: Slot, *, wipe: bool = False) -> None:
        """Free a slot; the pool's last sequence takes its place. `wipe`: it may hold NaN or infinity."""
        pool, last = slot.pool, slot.pool.slots.pop()
        for buffers in pool.buffers.values():
            for buffer in buffers:
                if wipe:
                    buffer[slot.index].zero_()
                if last is not slot and last.length:
                    buffer[slot.index, : last.length] = buffer[last.index, : last.length]
        if last is not slot:
            last.index = slot.index
            pool.slots[last.index] = last

    def _pool(self, num_tokens: int) -> Pool:
        size = min(max(SMALLEST_POOL, 1 << (num_tokens - 1).bit_length()), -(-self.max_length // 8) * 8)
        return self.pools.setdefault(size, Pool(size))

    @staticmethod
    def _place(pool: Pool) -> Slot:
        slot = Slot(pool, len(pool.slots))
        pool.slots.append(slot)
        return slot


@dataclass(frozen=True, slots=True)
class _Write:
    """Where a pool's new tokens go: rows `to` of its buffers seen as [S * L, Hkv, Dh]. `rows` None: all."""

    pool: Pool
    rows: Tensor | None
    to: Tensor


@dataclass(frozen=True, slots=True)
class _Decode:
    """One new token each for some slots of a pool. `slots` None: all of them, in order."""

    pool: Pool
    first: int
    count: int
    slots: Tensor | None
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Several new tokens of one slot: tokens first … first + count - 1 of the stream."""

    slot: Slot
    first: int
    count: int
    mask: Tensor | None


class CacheLayout:
    """Attention for one forward pass: each of `chunks` is a slot and how many new tokens it brings.

    The stream holds the chunks' tokens in this order. Chunks of one token of the same pool should stand
    together, by slot index: they become one attention call. `advance()` after the pass.
    """

    def __init__(
        self, chunks: Sequence[tuple[Slot, int]], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._chunks, self._dtype, self._device = chunks, dtype, device
        self._positions: list[int] = []
        self._decodes: list[_Decode] = []
        self._prefills: list[_Prefill] = []
        runs: list[tuple[Pool, int, list[Slot]]] = []
        for slot, count in chunks:
            first = len(self._positions)
            self._positions += range(slot.length, slot.length + count)
            if count > 1:
                self._prefills.append(_Prefill(slot, first, count, self._causal(slot.length, count)))
            elif runs and runs[-1][0] is slot.pool and runs[-1][1] + len(runs[-1][2]) == first:
                runs[-1][2].append(slot)
            else:
                runs.append((slot.pool, first, [slot]))
        self._decodes = [self._decode(*run) for run in runs]
        self._writes = self._plan_writes()

    @property
    def positions(self) -> Tensor:
        """[T] int64: each new token's position in its sequence."""
        return torch.tensor(self._positions, device=self._device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k, v [1, Hkv, T, Dh]; q [1, H, T, Dh] sees its own sequence up to itself. [1, T, H, Dh]."""
        k_T, v_T = k[0].transpose(0, 1), v[0].transpose(0, 1)
        for write in self._writes:
            for buffer, new in zip(write.pool.at(layer, k, v), (k_T, v_T), strict=True):
                flat = buffer.view(-1, *buffer.shape[2:])
                flat.index_copy_(0, write.to, new if write.rows is None else new[write.rows])
        if len(self._decodes) == 1 and not self._prefills:
            return self._attend_decode(self._decodes[0], layer, q, scale)[None]
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        for part in self._decodes:
            out[0, part.first : part.first + part.count] = self._attend_decode(part, layer, q, scale)
        for chunk in self._prefills:
            out[0, chunk.first : chunk.first + chunk.count] = self._attend_prefill(chunk, layer, q, scale)
        return out

    def advance(self) -> None:
        """Count the new tokens as part of their sequences."""
        for slot, count in self._chunks:
            slot.length += count

    @staticmethod
    def _attend_decode(part: _Decode, layer: int, q: Tensor, scale: float) -> Tensor:
        """[count, H, Dh]. A key head's G query heads lie along the query axis, so that no key is repeated."""
        k, v = part.pool.buffers[layer]
        num_slots = len(part.pool.slots)
        rows = q[0, :, part.first : part.first + part.count].transpose(0, 1)
        if part.slots is not None:
            spread = rows.new_zeros(num_slots, *rows.shape[1:])
            rows = spread.index_copy_(0, part.slots, rows)
        grouped = rows.reshape(num_slots, k.shape[2], -1, rows.shape[2])
        out = scaled_dot_product_attention(
            grouped,
            k[:num_slots, : part.length].transpose(1, 2),
            v[:num_slots, : part.length].transpose(1, 2),
            attn_mask=part.mask,
            scale=scale,
        ).reshape(num_slots, rows.shape[1], -1)
        return out if part.slots is None else out[part.slots]

    @staticmethod
    def _attend_prefill(chunk: _Prefill, layer: int, q: Tensor, scale: float) -> Tensor:
        """[count, H, Dh]."""
        k, v = chunk.slot.pool.buffers[layer]
        end = chunk.slot.length + chunk.count
        out = scaled_dot_product_attention(
            q[:, :, chunk.first : chunk.first + chunk.count],
            k[None, chunk.slot.index, :end].transpose(1, 2),
            v[None, chunk.slot.index, :end].transpose(1, 2),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[2],
        )
        return out[0].transpose(0, 1)

    def _causal(self, start: int, count: int) -> Tensor | None:
        """Mask [count, start + count] of tokens that follow `start` others; None when none precede."""
        if start == 0:
            return None
        seen = torch.ones(count, start + count, dtype=torch.bool, device=self._device).tril_(start)
        return self._additive(seen)

    def _decode(self, pool: Pool, first: int, slots: list[Slot]) -> _Decode:
        lengths = [1] * len(pool.slots)
        for slot in slots:
            lengths[slot.index] = slot.length + 1
        # A multiple of 8, which CUDA's kernels want of a mask's rows.
        longest = min(-(-max(lengths) // 8) * 8, pool.size)
        ends = torch.tensor(lengths, device=self._device)[:, None, None, None]
        mask = self._additive(torch.arange(longest, device=self._device) < ends)
        indices = [slot.index for slot in slots]
        dense = indices == list(range(len(pool.slots)))
        where = None if dense else torch.tensor(indices, device=self._device)
        return _Decode(pool, first, len(slots), where, longest, mask)

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~seen, float("-inf"))

    def _plan_writes(self) -> list[_Write]:
        rows: dict[int, list[int]] = defaultdict(list)
        targets: dict[int, list[int]] = defaultdict(list)
        pools: dict[int, Pool] = {}
        first = 0
        for slot, count in self._chunks:
            size = slot.pool.size
            pools[size] = slot.pool
            rows[size] += range(first, first + count)
            start = slot.index * size + slot.length
            targets[size] += range(start, start + count)
            first += count
        everything = len(pools) == 1
        return [
            _Write(pool, None if everything else self._index(rows[size]), self._index(targets[size]))
            for size, pool in pools.items()
        ]

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
