"""Attention over pages against attention over each sequence's own keys and values, in float64."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.tiny_models import make
from tunesmith.core.errors import UserError
from tunesmith.model import cpu_kernels, kv_cache
from tunesmith.model.kv_cache import (
    CacheLayout,
    Chunk,
    KVCache,
    cache_room,
    default_cache_tokens,
    weight_bytes,
)
from tunesmith.model.pages import PAGE, pages_for
from tunesmith.model.served_weights import pack_weights

HEADS, KEY_HEADS, SIZE, SCALE = 6, 2, 16, 0.3
CPU = torch.device("cpu")
KERNELS = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])


class Sequences:
    """Sequences whose tokens have random queries, keys and values; their pages lie in disorder."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(0)
        self.num_pages = sum(map(pages_for, lengths)) + 3
        order = iter((torch.randperm(self.num_pages, generator=draw) + 1).tolist())
        self.pages = [[next(order) for _ in range(pages_for(length))] for length in lengths]
        self.qkv = [
            tuple(
                torch.randn(heads, length, SIZE, generator=draw).to(dtype)
                for heads in (HEADS, KEY_HEADS, KEY_HEADS)
            )
            for length in lengths
        ]

    def cache(self, kernels: bool, dtype: torch.dtype | None = None) -> KVCache:
        """All that is not written yet is NaN, but for page 0."""
        cache = KVCache(self.num_pages, cpu_kernels.load() if kernels else None, dtype)
        for buffer in cache.at(0, *(part[None] for part in self.qkv[0][1:])):
            buffer[1:] = torch.nan
        return cache

    def attend(self, cache: KVCache, spans: list[tuple[int, int, int]]) -> list[Tensor]:
        """One pass over tokens start to end of some sequences: (sequence, start, end)."""
        chunks = [Chunk(self.pages[i], start, end - start) for i, start, end in spans]
        dtype = self.qkv[0][0].dtype
        layout = CacheLayout(cache, chunks, dtype=dtype, device=CPU)
        q, k, v = (
            torch.cat([self.qkv[i][which][:, start:end] for i, start, end in spans], 1)[None]
            for which in range(3)
        )
        out = layout.attend(0, q, k, v, SCALE)[0]
        assert layout.positions.tolist() == [at for _, start, end in spans for at in range(start, end)]
        assert layout.lengths.tolist() == [end for _, _, end in spans]
        return list(out.split([end - start for _, start, end in spans]))

    def expected(self, i: int, start: int, end: int) -> Tensor:
        q, k, v = (part.double() for part in self.qkv[i])
        seen = torch.ones(end - start, end, dtype=torch.bool).tril_(start)
        out = scaled_dot_product_attention(
            q[:, start:end], k[:, :end], v[:, :end], attn_mask=seen, scale=SCALE, enable_gqa=True
        )
        return out.transpose(0, 1)


@KERNELS
def test_single_tokens_and_chunks_equal_each_sequences_own_attention(kernels: bool) -> None:
    sequences = Sequences([1, 40, 300, 16, 17, 310, 90])
    cache = sequences.cache(kernels)
    passes = [
        [(0, 0, 1), (1, 0, 39), (2, 0, 299)],
        [(1, 39, 40), (3, 0, 15), (4, 0, 16), (5, 0, 200)],
        [(2, 299, 300), (3, 15, 16), (4, 16, 17), (5, 200, 309), (6, 0, 32)],
        [(5, 309, 310)],
        [(6, 32, 90)],
    ]
    for spans in passes:
        for span, got in zip(spans, sequences.attend(cache, spans), strict=True):
            torch.testing.assert_close(got.double(), sequences.expected(*span), atol=1e-5, rtol=1e-5)


@KERNELS
def test_a_cache_of_fewer_bits_rounds_once_however_a_prompt_is_cut(kernels: bool) -> None:
    sequences, found = Sequences([64]), []
    for cut in (64, 63, 20):
        cache = sequences.cache(kernels, torch.bfloat16)
        spans = [(0, 0, cut), *([(0, cut, 64)] if cut < 64 else [])]
        found.append(torch.cat([sequences.attend(cache, [span])[0] for span in spans]))
        assert {buffer.dtype for buffer in cache.at(0, *sequences.qkv[0][1:])} == {torch.bfloat16}
    torch.testing.assert_close(found[0].double(), sequences.expected(0, 0, 64), atol=0.03, rtol=0.03)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


def test_pages_shared_by_two_sequences_are_read_by_both() -> None:
    sequences = Sequences([2 * PAGE, 2 * PAGE])
    sequences.qkv[1] = tuple(
        torch.cat([a[:, :PAGE], b[:, PAGE:]], 1) for a, b in zip(*sequences.qkv, strict=True)
    )
    sequences.pages[1][0] = sequences.pages[0][0]
    cache = sequences.cache(kernels=False)
    sequences.attend(cache, [(0, 0, PAGE)])
    for span in ((1, PAGE, 2 * PAGE), (0, PAGE, 2 * PAGE)):
        [got] = sequences.attend(cache, [span])
        torch.testing.assert_close(got.double(), sequences.expected(*span), atol=1e-5, rtol=1e-5)


def test_memory_is_taken_as_it_is_first_written() -> None:
    like = torch.ones(1, 8, PAGE, 128)
    cache = KVCache((1 << 32) // (PAGE * 8 * 128 * 4))
    before = resident_bytes()
    layout = CacheLayout(cache, [Chunk([1], 0, PAGE)], dtype=torch.float32, device=CPU)
    layout.attend(0, like, like, like, 1.0)
    assert resident_bytes() - before < 100 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_cache_that_does_not_fit_is_told() -> None:
    like = torch.ones(1, 8, 1, 128)
    with pytest.raises(UserError, match="a cache of 17592186044416 tokens does not fit"):
        KVCache(1 << 40).at(0, like, like)


def test_the_default_size_is_what_is_wanted_within_the_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    # 2 layers x keys and values x 2 heads x 16 numbers x 4 bytes = 512 bytes a token.
    assert default_cache_tokens(model, torch.float32, 1000, 10) == 1000
    assert default_cache_tokens(model, torch.float32, 10**9, 10) == 2**29 // 512
    assert default_cache_tokens(model, torch.bfloat16, 10**9, 10) == 2**29 // 256
    assert default_cache_tokens(model, torch.float32, 10**9, 10**8) == 10**8
    monkeypatch.setattr(kv_cache, "LEAST_DEFAULT_BYTES", 1)
    assert default_cache_tokens(model, torch.float32, 10**9, 10) == weight_bytes(model) // 512
    monkeypatch.setattr(kv_cache, "SHARE_OF_CPU", 0.0)
    assert default_cache_tokens(model, torch.float32, 10**9, 10) == 10


def test_the_room_of_the_cache() -> None:
    """A GPU's is 80% of what is free; a CPU's the weights' size, from 512 MiB to a quarter of what is free."""
    gib = 1 << 30
    assert cache_room("cuda", 5 * gib, 10 * gib) == 8 * gib
    assert cache_room("cpu", 5 * gib, 40 * gib) == 5 * gib
    assert cache_room("cpu", 5 * gib, 10 * gib) == 5 * gib // 2
    assert cache_room("cpu", 1, 40 * gib) == gib // 2
    assert cache_room("cpu", 1, gib) == gib // 4


def test_the_weights_of_packed_layers_count() -> None:
    model = make()
    before = weight_bytes(model)
    assert before == sum(value.nbytes for value in model.parameters())
    pack_weights(model, "fp32")
    assert weight_bytes(model) >= before
