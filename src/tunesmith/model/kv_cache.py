"""The memory of a paged key/value cache, and attention over it for one flat stream of new tokens.

`pages` and `scheduler` decide which sequence has which pages; here are the tensors. Sequences that bring one
token each (decoding) are attended together, by a kernel that reads the pages where they lie or, where there
is none, by copies of similar length; a sequence that brings more (a chunk of its prompt) by itself.

Shapes: T new tokens of R sequences, H query heads, Hkv key heads, G = H / Hkv, Dh head size, P pages,
L tokens of the longest sequence of a group.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.core.errors import UserError
from tunesmith.model.config import token_bytes
from tunesmith.model.cpu_kernels import Kernels
from tunesmith.model.pages import EMPTY_PAGE, PAGE, pages_for

# Linux: promise no memory for what may never be touched.
MAP_NORESERVE = 0x4000
LEAST_DEFAULT_BYTES = 1 << 29
# Of the memory that is free once the weights are there.
SHARE_OF_CPU, SHARE_OF_GPU = 0.25, 0.8


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` new tokens of a sequence that has `start` in the cache already; `pages` have room for all."""

    pages: Sequence[int]
    start: int
    count: int


class KVCache:
    """Keys and values of `num_pages` pages and of page 0, which is never written.

    Layers and head sizes are learnt from the tensors that come. On a CPU, memory is taken from the system
    as pages are first written. kernels: what attends over pages where they lie, None for torch's operations.
    dtype: what keys and values are rounded to; None: they stay as they come.
    """

    def __init__(
        self, num_pages: int, kernels: Kernels | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.num_pages = num_pages
        self.kernels = kernels
        self.dtype = dtype
        self._copies: dict[int, Tensor] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._addresses: tuple[Any, Any] | None = None

    def at(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k_pages and v_pages [P, PAGE, Hkv, Dh] of a layer, like `k` and `v` [1, Hkv, T, Dh] in kind."""
        found = self._buffers.get(layer)
        if found is None:
            found = self._buffers[layer] = (self._new(k), self._new(v))
        return found

    def addresses(self, layers: Sequence[int]) -> tuple[Any, Any] | None:
        """Of k_pages and of v_pages of the `layers`, for the kernels; None before all of them are there."""
        if self._addresses is None and all(layer in self._buffers for layer in layers):
            buffers = [self._buffers[layer] for layer in layers]
            if all(k.shape == v.shape == buffers[0][0].shape for k, v in buffers):
                array = ctypes.c_void_p * len(layers)
                k_pages, v_pages = ([pair[i].data_ptr() for pair in buffers] for i in (0, 1))
                self._addresses = array(*k_pages), array(*v_pages)
        return self._addresses

    def copied(self, which: int, pages: Tensor, chosen: Tensor) -> Tensor:
        """A copy of the `chosen` pages, in memory that the next call with the same `which` uses again."""
        num_values = len(chosen) * pages[0].numel()
        found = self._copies.get(which)
        if found is None or found.numel() < num_values:
            found = self._copies[which] = pages.new_empty(num_values)
        out = found[:num_values].view(-1, *pages.shape[1:])
        return torch.index_select(pages, 0, chosen, out=out)

    def _new(self, like: Tensor) -> Tensor:
        """Zeros: what a masked position holds has weight 0, but 0 times a stray NaN is NaN."""
        shape = (self.num_pages + 1, PAGE, like.shape[1], like.shape[3])
        dtype = self.dtype or like.dtype
        try:
            if like.device.type != "cpu":
                return like.new_zeros(shape, dtype=dtype)
            num_bytes = math.prod(shape) * dtype.itemsize
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=dtype).view(shape)
        except (OSError, torch.cuda.OutOfMemoryError) as error:
            raise UserError(
                f"a cache of {self.num_pages * PAGE} tokens does not fit this machine's memory: {error}",
                hint="give the cache fewer tokens",
            ) from None


@dataclass(frozen=True, slots=True)
class Paged:
    """Where the kernels find what a pass of single tokens reads and writes; shapes as in `CacheLayout`.

    k_pages and v_pages: arrays of the layers' addresses; dtype: of what is stored there.
    """

    k_pages: Any
    v_pages: Any
    slots: Tensor
    tables: Tensor
    lengths: Tensor
    dtype: torch.dtype


def default_cache_tokens(model: nn.Module, dtype: torch.dtype, wanted: int, least: int) -> int:
    """`wanted` tokens, or as many as there is room for; in any case the `least` that one sequence needs."""
    num_bytes = token_bytes(cast(Any, model).config, dtype.itemsize)
    device = next(model.parameters()).device
    if device.type == "cuda":
        room = cache_room("cuda", weight_bytes(model), torch.cuda.mem_get_info(device)[0])
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = cache_room("cpu", weight_bytes(model), free)
    return max(least, min(wanted, room // num_bytes))


def cache_room(device: Literal["cpu", "cuda"], weights: int, free: int) -> int:
    """Bytes that the cache may take; weights, free: bytes, the free ones once the weights are there.

    On a CPU as much as the weights take, or LEAST_DEFAULT_BYTES, but no more than a share of what is free; on
    a GPU a share of what is free.
    """
    if device == "cuda":
        return int(free * SHARE_OF_GPU)
    return min(max(weights, LEAST_DEFAULT_BYTES), int(free * SHARE_OF_CPU))


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights, those of packed layers (served_weights) included."""
    packed = sum(int(getattr(part, "num_bytes", 0)) for part in model.modules())
    return packed + sum(value.nbytes for value in model.parameters())


class CacheLayout:
    """Attention for one forward pass over the tokens of `chunks`, end to end; those of one token come first.

    positions [T] int64: each new token's place in its sequence. slots [T] int64: page * PAGE + offset where
    its key and value go. tables [R, most pages] int32: each sequence's pages, filled up with the empty page.
    lengths [R] int32: each sequence's tokens, the new ones included. first_row [R + 1] int32: sequence r
    brings rows first_row[r] to first_row[r + 1] - 1 of the stream. num_single: how many bring one token.
    """

    def __init__(
        self, cache: KVCache, chunks: Sequence[Chunk], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._cache, self._dtype, self._device = cache, dtype, device
        counts = [chunk.count for chunk in chunks]
        self.num_single = sum(count == 1 for count in counts)
        assert all(count == 1 for count in counts[: self.num_single]), "chunks of one token come first"
        self._ends = [chunk.start + chunk.count for chunk in chunks]
        self._tables = _tables(chunks)
        positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        owners = np.repeat(np.arange(len(chunks)), counts)
        slots = _slots(self._tables[owners, positions // PAGE], positions)
        self._first_row = [0, *accumulate(counts)]
        self.positions = self._tensor(positions)
        self.slots = self._tensor(slots)
        self.tables = self._tensor(self._tables)
        self.lengths = self._tensor(np.asarray(self._ends, dtype=np.int32))
        self.first_row = self._tensor(np.asarray(self._first_row, dtype=np.int32))
        self._groups: list[_Group] | None = None
        self._prompts = [
            self._prompt(row, chunk) for row, chunk in enumerate(chunks) if row >= self.num_single
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k, v [1, Hkv, T, Dh]; q [1, H, T, Dh] sees its own sequence up to itself. [1, T, H, Dh]."""
        k_pages, v_pages = self._store(layer, k, v)
        if not self._prompts:
            return self._attend_single(q, k_pages, v_pages, scale)[None]
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        if self.num_single:
            out[0, : self.num_single] = self._attend_single(q, k_pages, v_pages, scale)
        for prompt in self._prompts:
            rows = slice(prompt.first, prompt.first + prompt.count)
            keys = self._seen_by(prompt, 0, k[:, :, rows], k_pages).to(q.dtype)
            values = self._seen_by(prompt, 1, v[:, :, rows], v_pages).to(q.dtype)
            out[0, rows] = _attend_prompt(q[:, :, rows], keys, values, prompt.mask, scale)
        return out

    def paged(self, layers: Sequence[int]) -> Paged | None:
        """For the kernels to attend in all the `layers`; None where some row brings more than one token."""
        if self._prompts or self._cache.kernels is None:
            return None
        found = self._cache.addresses(layers)
        return found and Paged(
            *found, self.slots, self.tables, self.lengths, self._cache.dtype or self._dtype
        )

    def _seen_by(self, prompt: _Prompt, which: int, new: Tensor, pages: Tensor) -> Tensor:
        """[1, Hkv, end, Dh]: the keys or values of all of a sequence's tokens, `new` its newest."""
        if prompt.pages is None:
            # Rounded as the cache has them, so that it does not matter how a prompt was cut.
            return new.to(pages.dtype)
        copy = self._cache.copied(which, pages, prompt.pages).flatten(0, 1)
        return copy[None, : prompt.end].transpose(1, 2)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; the layer's k_pages and v_pages."""
        k_pages, v_pages = self._cache.at(layer, k, v)
        k_T, v_T = k[0].transpose(0, 1), v[0].transpose(0, 1)
        kernels = self._cache.kernels
        if kernels is not None and k_pages.shape == v_pages.shape:
            kernels.write_pages(k_T, v_T, k_pages, v_pages, self.slots)
        else:
            for pages, new in ((k_pages, k_T), (v_pages, v_T)):
                pages.view(-1, *pages.shape[2:]).index_copy_(0, self.slots, new.to(pages.dtype))
        return k_pages, v_pages

    def _attend_single(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float) -> Tensor:
        """[num_single, H, Dh]."""
        rows = q[0, :, : self.num_single].transpose(0, 1)
        kernels = self._cache.kernels
        if kernels is not None and k_pages.shape == v_pages.shape:
            tables, lengths = self.tables[: self.num_single], self.lengths[: self.num_single]
            return kernels.paged_attention(rows, k_pages, v_pages, tables, lengths, scale)
        if self._groups is None:
            self._groups = self._grouped()
        if len(self._groups) == 1:
            return self._attend_group(rows, self._groups[0], k_pages, v_pages, scale)
        out = rows.new_empty(*rows.shape[:2], v_pages.shape[3])
        for group in self._groups:
            out[group.rows] = self._attend_group(rows[group.rows], group, k_pages, v_pages, scale)
        return out

    def _attend_group(
        self, rows: Tensor, group: _Group, k_pages: Tensor, v_pages: Tensor, scale: float
    ) -> Tensor:
        """[n, H, Dh]. A key head's G query heads lie along the query axis, so that no key is repeated."""
        count, heads, size = rows.shape
        copies = []
        for which, pages in enumerate((k_pages, v_pages)):
            copy = self._cache.copied(which, pages, group.pages).view(-1, *pages.shape[2:])
            if group.mask is not None:
                copy.index_fill_(0, group.beyond, 0.0)
            copy = copy.view(count, -1, *pages.shape[2:])[:, : group.length]
            copies.append(copy.transpose(1, 2).to(rows.dtype))
        grouped = rows.reshape(count, k_pages.shape[2], -1, size)
        k, v = copies
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=group.mask, scale=scale)
        return out.reshape(count, heads, -1)

    def _grouped(self) -> list[_Group]:
        """Sequences of one new token, in groups of similar length: each is padded to its longest."""
        order = sorted(range(self.num_single), key=lambda row: self._ends[row])
        groups: list[list[int]] = []
        for row in order:
            if groups and self._ends[row] <= self._ends[groups[-1][0]] * 5 // 4 + 4 * PAGE:
                groups[-1].append(row)
            else:
                groups.append([row])
        if len(groups) == 1:
            groups = [list(range(self.num_single))]
        return [self._group(rows) for rows in groups]

    def _group(self, rows: list[int]) -> _Group:
        ends = np.asarray([self._ends[row] for row in rows])
        pages = self._tables[rows, : pages_for(int(ends.max()))]
        seen = np.arange(pages.shape[1] * PAGE) < ends[:, None]
        # Of the pages copied, what lies beyond a sequence's own tokens may be NaN: 0 times NaN is NaN.
        beyond = np.flatnonzero(~seen & np.repeat(pages != EMPTY_PAGE, PAGE, axis=1))
        return _Group(
            self._tensor(np.asarray(rows)),
            self._tensor(pages.reshape(-1)),
            self._tensor(beyond),
            None if len(rows) == 1 else self._additive(self._tensor(seen))[:, None, None],
            int(ends[0]) if len(rows) == 1 else seen.shape[1],
        )

    def _prompt(self, row: int, chunk: Chunk) -> _Prompt:
        first, end = self._first_row[row], self._ends[row]
        if chunk.start == 0:
            return _Prompt(first, chunk.count, end, None, None)
        seen = torch.ones(chunk.count, end, dtype=torch.bool, device=self._device).tril_(chunk.start)
        pages = self._tensor(self._tables[row, : pages_for(end)])
        return _Prompt(first, chunk.count, end, pages, self._additive(seen))

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~seen, float("-inf"))

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences attended in one call, each padded to the most pages; a single one is not padded.

    pages [n * most pages]: their pages one after the other; beyond: which tokens of these are not theirs;
    mask [n, 1, 1, L], additive; length: L.
    """

    rows: Tensor
    pages: Tensor
    beyond: Tensor
    mask: Tensor | None
    length: int


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Rows first to first + count - 1: the last of a sequence's `end` tokens. pages: None: they are all."""

    first: int
    count: int
    end: int
    pages: Tensor | None
    mask: Tensor | None


def _tables(chunks: Sequence[Chunk]) -> NDArray[np.int32]:
    counts = [pages_for(chunk.start + chunk.count) for chunk in chunks]
    tables = np.zeros((len(chunks), max(counts)), dtype=np.int32)
    for row, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
        tables[row, :count] = chunk.pages[:count]
    return tables


def _slots(pages: NDArray[np.int32], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return pages.astype(np.int64) * PAGE + positions % PAGE


def _attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [1, H, n, Dh], k and v [1, Hkv, m, Dh] -> [n, H, Dh]."""
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
