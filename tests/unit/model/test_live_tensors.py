"""Bytes of live tensors by hand: views, freed tensors, what autograd keeps."""

from __future__ import annotations

import torch
from torch import nn

from tunesmith.model.live_tensors import LiveTensors

MIB = 1024**2


def test_storages_count_once_and_until_they_are_freed() -> None:
    with LiveTensors() as live:
        a = torch.ones(MIB // 4)
        assert live.live_bytes == MIB
        view = a.view(2, -1)[1]
        assert live.live_bytes == MIB
        b = a * 2
        assert live.live_bytes == 2 * MIB
        del a
        assert live.live_bytes == 2 * MIB  # the view holds it
        del view
        assert live.live_bytes == MIB
        b.mul_(2)
        assert live.live_bytes == MIB
    assert live.peak_bytes == 2 * MIB


def test_what_the_backward_pass_keeps_and_makes_counts() -> None:
    with LiveTensors() as live:
        weight = nn.Parameter(torch.ones(512, 512))  # 1 MiB
        live.reset_peak()
        loss = (weight @ weight).tanh().sum()  # tanh keeps its output
        assert live.live_bytes == 2 * MIB + 4
        assert live.peak_bytes == 3 * MIB
        loss.backward()
        assert live.live_bytes == 2 * MIB + 4  # the gradient, in place of tanh's output
    # The weight, its two gradients on their way to be summed, and that of the product.
    assert 4 * MIB <= live.peak_bytes <= 4 * MIB + 16
    assert sum(size for size, _ in live.at_peak()) == live.peak_bytes
    assert live.at_peak()[0][1] == "float32[512, 512] by mm"


def test_tensors_from_before_count_once_named() -> None:
    before = torch.ones(MIB // 4)
    live = LiveTensors()
    live.track(before, "loading")
    live.track(before[3:], "loading")
    assert live.live_bytes == MIB
    del before
    assert live.live_bytes == 0


def test_without_products_the_same_tensors_are_there() -> None:
    def peak(*, products: bool) -> int:
        with LiveTensors(products=products) as live:
            layer = nn.Linear(64, 64)
            out = layer(torch.ones(100, 64)).relu() @ torch.ones(64, 3)
            out.sum().backward()
        if not products:
            assert not out.detach().any()
        return live.peak_bytes

    assert peak(products=True) == peak(products=False)


def test_a_product_into_given_memory_is_left_out_too() -> None:
    into = torch.ones(3, 4)
    with LiveTensors(products=False):
        assert torch.mm(torch.ones(3, 2), torch.ones(2, 4), out=into) is into
    assert not into.any()
