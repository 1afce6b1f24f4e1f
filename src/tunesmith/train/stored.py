"""How an optimizer keeps a number for every weight: fp32, 16 bits rounded by chance, or blocks of 8 bits.

Each form reads a chunk as fp32 and takes it back, so that fp32 never exists for more than a chunk.

Shapes: N elements of a tensor laid flat, B = ceil(N / BLOCK_8BIT), n elements of a chunk; `values` [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.model.hardware import made_once
from tunesmith.recipe.memory import BLOCK_8BIT

DECADES = 7


class Stored(Protocol):
    """A flat tensor of numbers. Chunks begin at multiples of BLOCK_8BIT."""

    def read(self, at: slice) -> Tensor:
        """A chunk as fp32 [n]; changes made to it count once it is handed to `write`."""
        ...

    def write(self, at: slice, value: Tensor) -> None:
        """Keep a chunk that `read` gave; `value` may be spoilt."""
        ...


@dataclass(frozen=True)
class Plain:
    """As it is: fp32, or 16 bits rounded to the nearest."""

    values: Tensor

    def read(self, at: slice) -> Tensor:
        return self.values[at].float()

    def write(self, at: slice, value: Tensor) -> None:
        if self.values.dtype != torch.float32:
            self.values[at].copy_(value)


@dataclass(frozen=True)
class Rounded:
    """bf16, rounded up or down by chance, so that the mean of what is kept is what was meant."""

    values: Tensor
    generator: torch.Generator

    def read(self, at: slice) -> Tensor:
        return self.values[at].float()

    def write(self, at: slice, value: Tensor) -> None:
        round_to_bf16_(value, self.generator)
        self.values[at].copy_(value)


@dataclass(frozen=True)
class Blocks8:
    """8 bits: each block of 256 by its largest magnitude and a code of the dynamic map (`dynamic_map`).

    codes [N] uint8, scales [B] fp32.
    """

    codes: Tensor
    scales: Tensor
    signed: bool

    def read(self, at: slice) -> Tensor:
        codes = self.codes[at]
        values = dynamic_map(self.signed, codes.device).index_select(0, codes.int())
        return _by_block(values, self.scales[blocks(at)], torch.Tensor.mul_)

    def write(self, at: slice, value: Tensor) -> None:
        scales = self.scales[blocks(at)]
        whole = len(value) // BLOCK_8BIT * BLOCK_8BIT
        torch.amax(value[:whole].view(-1, BLOCK_8BIT).abs(), 1, out=scales[: whole // BLOCK_8BIT])
        if whole < len(value):
            scales[-1] = value[whole:].abs().amax()
        # A block of zeros is divided by 1: its codes are those of 0, whatever the scale.
        _by_block(value, torch.where(scales > 0, scales, 1.0), torch.Tensor.div_)
        self.codes[at].copy_(nearest_codes(value, self.signed))


def blocks(at: slice) -> slice:
    """The blocks of a chunk of elements."""
    return slice(at.start // BLOCK_8BIT, -(-at.stop // BLOCK_8BIT))


def _by_block(values: Tensor, scales: Tensor, operation: object) -> Tensor:
    whole = len(values) // BLOCK_8BIT * BLOCK_8BIT
    operation(values[:whole].view(-1, BLOCK_8BIT), scales[: whole // BLOCK_8BIT, None])  # type: ignore[operator]
    if whole < len(values):
        operation(values[whole:], scales[-1])  # type: ignore[operator]
    return values


def round_to_bf16_(values: Tensor, generator: torch.Generator) -> Tensor:
    """Stochastic rounding of fp32 [n] to numbers that bf16 holds, in place.

    A value between two of them becomes the upper with the probability of its distance from the lower: noise
    below the last bit that stays is added, then cut off (Gupta et al. 2015, arXiv:1502.02551).
    """
    # One draw of 64 bits serves four elements, which is four times as fast.
    draws = torch.empty(-(-len(values) // 4), dtype=torch.int64, device=values.device)
    noise = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: len(values)]
    values.view(torch.int32).add_(noise).add_(1 << 15).bitwise_and_(-1 << 16)
    return values


@made_once
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values in ascending order that codes stand for (Dettmers et al. 2021, arXiv:2110.02861).

    Each of seven decades below 1 is halved more often than the one below it: 1 to 64 values a sign with
    `signed`, 2 to 128 without; 0 and 1 complete them.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2 ** (decade + (not signed))
        for place in range(count):
            value = (0.1 + 0.9 * (place + 0.5) / count) * 10.0 ** (decade - DECADES + 1)
            values += [value, -value] if signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float64).float().to(device)


def nearest_codes(values: Tensor, signed: bool) -> Tensor:
    """uint8 [n]: the code whose value is nearest; `values` fp32 within [-1, 1] ([0, 1] if not signed)."""
    lowest, border = _cells(signed, values.device)
    cells = (values.view(torch.int32) >> 16).add_(1 << 15)
    codes = lowest.index_select(0, cells)
    return codes.add_(values > border.index_select(0, cells))


@made_once
def _cells(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each value of an fp32's upper 16 bits: the code of the smallest number that begins with them, and
    above which number the next code is nearer. None of these cells reaches over more than two codes, so
    that two look-ups replace a search."""
    table = dynamic_map(signed, torch.device("cpu")).double()
    borders = (table[1:] + table[:-1]) / 2
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower_magnitude = upper.view(torch.float32).double()
    higher_magnitude = (upper | 0xFFFF).view(torch.float32).double()
    smallest = torch.minimum(lower_magnitude, higher_magnitude).nan_to_num(0.0)
    lowest = torch.searchsorted(borders, smallest)
    border = torch.cat([borders, torch.tensor([torch.inf], dtype=torch.float64)])[lowest]
    return lowest.to(torch.uint8).to(device), border.float().to(device)
