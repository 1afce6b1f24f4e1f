"""The order, the packs and the learning rates of an xtuner 0.1 run, case by case with its traps."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch

from tunesmith.convert.xtuner_order import (
    Iterations,
    Piece,
    Rates,
    pack_rows,
    shards,
    shuffle_seeds,
    shuffled_rows,
)
from tunesmith.core.errors import UserError

# -- shuffling ------------------------------------------------------------------------------------------


def test_the_first_shuffle_is_that_of_default_rng_with_the_runs_seed() -> None:
    assert next(shuffle_seeds(7)) == 7
    assert shuffled_rows(50, 7).tolist() == np.random.default_rng(7).permutation(50).tolist()


def test_shuffles_without_a_seed_are_those_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"n": list(range(40))})
    state = np.random.get_state()
    try:
        np.random.seed(11)
        theirs = [rows.shuffle()["n"][:] for _ in range(3)]
    finally:
        np.random.set_state(state)
    assert [shuffled_rows(40, seed).tolist() for seed in islice(shuffle_seeds(11), 3)] == theirs


# -- packing --------------------------------------------------------------------------------------------


def test_shards_are_contiguous_and_the_first_have_one_more() -> None:
    assert shards(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    assert shards(2, 32) == [range(0, 1), range(1, 2)]


def test_rows_are_cut_where_the_border_falls_and_the_tail_is_lost() -> None:
    packs = pack_rows([2, 0, 1], [5, 4, 6], size=4, workers=1)
    # Row 2 (6 tokens), row 0 (5), row 1 (4): 15 tokens make 3 packs of 4, and 3 tokens are lost.
    assert packs == [[Piece(2, 0, 4)], [Piece(2, 4, 6), Piece(0, 0, 2)], [Piece(0, 2, 5), Piece(1, 0, 1)]]


def test_a_shard_with_too_few_tokens_is_one_short_pack() -> None:
    packs = pack_rows(range(64), [10] * 64, size=2048, workers=32)
    assert len(packs) == 32 and all(sum(p.stop - p.start for p in pack) == 20 for pack in packs)


def test_each_shard_has_a_tail_of_its_own() -> None:
    packs = pack_rows(range(6), [3] * 6, size=4, workers=2)
    used = sum(p.stop - p.start for pack in packs for p in pack)
    assert (len(packs), used) == (4, 16)  # 9 tokens a shard: 8 in packs, 1 lost


def test_rows_come_to_the_packer_a_thousand_at_a_time() -> None:
    # The first 1,000 rows of one token do not fill a pack: they are one short pack, and nothing is carried on.
    packs = pack_rows(range(1500), [1] * 1500, size=1200, workers=1)
    assert [sum(p.stop - p.start for p in pack) for pack in packs] == [1000, 500]
    # Here they fill one; the 800 left over are carried on, and with 200 more they are a short pack.
    packs = pack_rows(range(1100), [2] * 1100, size=1200, workers=1)
    assert [sum(p.stop - p.start for p in pack) for pack in packs] == [1200, 1000]


def test_a_row_longer_than_several_packs_fills_them() -> None:
    packs = pack_rows([0], [10], size=4, workers=1)
    assert packs == [[Piece(0, 0, 4)], [Piece(0, 4, 8)]]


# -- order ----------------------------------------------------------------------------------------------


def test_every_epoch_is_torch_randperm_of_seed_plus_epoch() -> None:
    run = Iterations(count=5, epochs=2, seed=3, batch_size=1, accumulation=4)
    order = [run.at(t)[0][0] for t in range(run.total)]
    generators = [torch.Generator().manual_seed(3 + epoch) for epoch in range(2)]
    assert order == [i for g in generators for i in torch.randperm(5, generator=g).tolist()]


def test_windows_run_across_the_ends_of_epochs() -> None:
    run = Iterations(count=5, epochs=2, seed=0, batch_size=1, accumulation=4)
    assert [run.window(step) for step in range(run.steps)] == [range(0, 4), range(4, 8), range(8, 10)]


def test_the_last_window_is_applied_without_deepspeed_and_dropped_with_it() -> None:
    plain = Iterations(count=5, epochs=2, seed=0, batch_size=1, accumulation=4)
    dropped = Iterations(count=5, epochs=2, seed=0, batch_size=1, accumulation=4, drop_last=True)
    assert (plain.steps, dropped.steps) == (3, 2)


def test_gpus_take_every_so_manieth_of_a_list_that_is_filled_up() -> None:
    run = Iterations(count=5, epochs=1, seed=1, batch_size=2, accumulation=1, gpus=2)
    whole = torch.randperm(5, generator=torch.Generator().manual_seed(1)).tolist()
    whole = [*whole, whole[0]]
    assert run.per_epoch == 2
    assert run.at(0) == [[whole[0], whole[2]], [whole[1], whole[3]]]
    assert run.at(1) == [[whole[4]], [whole[5]]]


# -- learning rates -------------------------------------------------------------------------------------


def recursion(base: float, warmup: int, total: int, low: float = 0.0, start: float = 1e-5) -> list[float]:
    """The schedulers' own recursive forms: each multiplies the rate that it finds."""
    lr, found = base * (start if warmup else 1.0), []
    for t in range(total):
        if t and t < warmup:
            span = warmup - 1
            lr *= 1 + (1 - start) / (span * start + (t - 1) * (1 - start))
        elif t > warmup:
            length, last = total - warmup, t - warmup
            ratio = (1 + math.cos(math.pi * last / length)) / (1 + math.cos(math.pi * (last - 1) / length))
            lr = ratio * (lr - low) + low
        found.append(lr)
    return found


@pytest.mark.parametrize("per_epoch", [23, 50, 3250])
def test_the_first_200_rates_are_those_of_the_recursion(per_epoch: int) -> None:
    rates = Rates(peak=2e-5, warmup_epochs=0.03 * 3, epochs=3, per_epoch=per_epoch)
    count = min(200, 3 * per_epoch)
    expected = recursion(2e-5, int(0.09 * per_epoch), 3 * per_epoch)[:count]
    np.testing.assert_allclose([rates.lr(t) for t in range(count)], expected, rtol=1e-9, atol=0)


def test_the_peak_is_held_twice_and_the_last_rate_is_not_zero() -> None:
    rates = Rates(peak=2e-5, warmup_epochs=0.09, epochs=3, per_epoch=1000)
    assert rates.warmup == 90
    assert rates.lr(0) == 2e-5 * 1e-5
    assert rates.lr(89) == pytest.approx(2e-5) and rates.lr(90) == pytest.approx(2e-5)
    assert 0 < rates.lr(2999) < 1e-10


@pytest.mark.parametrize("per_epoch", [1, 5, 11])
def test_trap_no_warmup_iteration_and_xtuner_stops(per_epoch: int) -> None:
    with pytest.raises(UserError, match="end should be larger than begin"):
        Rates(peak=2e-5, warmup_epochs=0.09, epochs=3, per_epoch=per_epoch)


@pytest.mark.parametrize("per_epoch", [12, 17, 22])
def test_trap_one_warmup_iteration_and_the_rate_stays_at_a_hundred_thousandth(per_epoch: int) -> None:
    rates = Rates(peak=2e-5, warmup_epochs=0.09, epochs=3, per_epoch=per_epoch)
    assert rates.warmup == 1
    assert max(rates.lr(t) for t in range(3 * per_epoch)) == pytest.approx(2e-10)


def test_without_warmup_and_with_a_floor() -> None:
    rates = Rates(peak=1e-3, warmup_epochs=0, epochs=2, per_epoch=10, lowest=1e-4)
    expected = recursion(1e-3, 0, 20, low=1e-4)
    np.testing.assert_allclose([rates.lr(t) for t in range(20)], expected, rtol=1e-9)
    constant = Rates(peak=1e-3, warmup_epochs=0, epochs=2, per_epoch=10, cosine=False)
    assert {constant.lr(t) for t in range(20)} == {1e-3}
