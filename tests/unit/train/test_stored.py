"""The 8-bit map against its definition and bitsandbytes', nearest codes by search, rounding's mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.recipe.memory import BLOCK_8BIT
from tunesmith.train.stored import (
    Blocks8,
    Plain,
    Rounded,
    blocks,
    dynamic_map,
    nearest_codes,
    round_to_bf16_,
)

CPU = torch.device("cpu")


def numbers(*, signed: bool) -> Tensor:
    """Of all magnitudes from 1e-9 to 1, with 0 and 1."""
    torch.manual_seed(0)
    found = torch.cat([torch.rand(20_000), 10 ** (-9 * torch.rand(20_000)), torch.tensor([0.0, 1.0])])
    return torch.cat([found, -found]) if signed else found


def blocks8(count: int, *, signed: bool) -> Blocks8:
    return Blocks8(torch.zeros(count, dtype=torch.uint8), torch.zeros(-(-count // BLOCK_8BIT)), signed)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(dynamic_map(signed, CPU), functional.create_dynamic_map(signed))


def test_the_map_by_hand() -> None:
    signed, unsigned = dynamic_map(True, CPU), dynamic_map(False, CPU)
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    assert signed[0] == -signed[-2] and unsigned[0] == 0 and unsigned[-1] == signed[-1] == 1
    # The highest decade: 64 halves of [0.1, 1] a sign; the lowest: its middle.
    torch.testing.assert_close(signed[-2], torch.tensor(1 - 0.9 / 128))
    torch.testing.assert_close(signed[128], torch.tensor(0.55e-6))
    torch.testing.assert_close(unsigned[1:3], torch.tensor([0.325e-6, 0.775e-6]))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    values, table = numbers(signed=signed), dynamic_map(signed, CPU).double()
    borders = (table[1:] + table[:-1]) / 2
    wanted = torch.searchsorted(borders, values.double())
    codes = nearest_codes(values, signed).long()
    # A number within fp32's rounding of a border is as near to one code as to the other.
    off_border = values.double() - borders[torch.minimum(codes, wanted).clamp(max=254)]
    on_border = off_border.abs() < 1e-7 * values.abs()
    assert torch.equal(codes[~on_border], wanted[~on_border])
    assert on_border.sum() < 10


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [BLOCK_8BIT, 3 * BLOCK_8BIT, 5 * BLOCK_8BIT + 7, 9])
def test_blocks_are_read_back_by_us_and_by_bitsandbytes(signed: bool, count: int) -> None:
    torch.manual_seed(count)
    values = torch.randn(count) * torch.randn(count).exp()
    values = values if signed else values.square()
    kept = blocks8(count, signed=signed)
    kept.write(slice(0, count), values.clone())
    back = kept.read(slice(0, count))
    largest = kept.scales.repeat_interleave(BLOCK_8BIT)[:count]
    # Half a step of the highest decade: 0.9 / 128 of the block's largest. The signed map has no -1.
    assert ((back - values).abs() <= largest * (0.9 / 128 + 1e-6)).all()
    exact = values == largest
    assert exact.any() and torch.equal(back[exact], values[exact])
    pytest.importorskip("bitsandbytes")
    theirs = torch.ops.bitsandbytes.dequantize_blockwise(
        kept.codes, kept.scales, dynamic_map(signed, CPU), BLOCK_8BIT, torch.float32
    )
    assert torch.equal(theirs, back)


def test_chunks_are_written_as_the_whole_is() -> None:
    torch.manual_seed(0)
    values, count = torch.randn(6 * BLOCK_8BIT + 100), 6 * BLOCK_8BIT + 100
    whole, parts = blocks8(count, signed=True), blocks8(count, signed=True)
    whole.write(slice(0, count), values.clone())
    for at in (slice(0, 2 * BLOCK_8BIT), slice(2 * BLOCK_8BIT, 6 * BLOCK_8BIT), slice(6 * BLOCK_8BIT, count)):
        parts.write(at, values[at].clone())
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)
    assert blocks(slice(2 * BLOCK_8BIT, count)) == slice(2, 7)


def test_zeros_and_tiny_numbers_come_back() -> None:
    kept = blocks8(2 * BLOCK_8BIT, signed=True)
    values = torch.zeros(2 * BLOCK_8BIT)
    values[BLOCK_8BIT:] = 1e-38
    kept.write(slice(0, 2 * BLOCK_8BIT), values.clone())
    torch.testing.assert_close(kept.read(slice(0, 2 * BLOCK_8BIT)), values, rtol=1e-6, atol=0)


def test_rounding_keeps_the_mean_and_only_takes_neighbours() -> None:
    draw = torch.Generator().manual_seed(0)
    for value, below, above in (
        (1.001, 1.0, 1.0078125),
        (-1.001, -1.0, -1.0078125),
        (3e-5, 2.99e-5, 3.01e-5),
    ):
        found = round_to_bf16_(torch.full((200_001,), value), draw)
        assert torch.equal(found, found.bfloat16().float())
        assert len(found.unique()) == 2
        assert found.abs().min() >= abs(below) * 0.99 and found.abs().max() <= abs(above) * 1.01
        # The mean's standard error is under gap / (2 sqrt n) = 0.0011 gaps; five of them.
        gap = float(found.max() - found.min())
        assert abs(float(found.double().mean()) - value) < 0.0056 * gap


def test_what_bf16_holds_is_not_changed() -> None:
    values = torch.randn(1000).bfloat16().float()
    values[:3] = torch.tensor([0.0, torch.inf, -torch.inf])
    assert torch.equal(round_to_bf16_(values.clone(), torch.Generator()), values)


def test_small_steps_are_not_lost_to_rounding() -> None:
    """A thousand steps of a tenth of bf16's spacing: nearest rounding stands still, chance does not."""
    at, near, chance = slice(0, 4096), torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    stores = Plain(near), Rounded(chance, torch.Generator().manual_seed(0))
    for _ in range(1000):
        for stored in stores:
            value = stored.read(at)
            value += 0.0078125 / 10
            stored.write(at, value)
    assert (near == 1).all()
    assert abs(float(chance.float().mean()) - 1.78125) < 0.01
