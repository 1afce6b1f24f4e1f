"""Steps: the same global batch for every split of it, every row as often as its weight says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.unit.data.stores import store_of
from tunesmith.core.errors import UserError
from tunesmith.data.batches import StepPlan, epoch_rows, eval_batches
from tunesmith.data.store import TokenStore
from tunesmith.model.batch import IGNORE, Batch

LENGTHS = [int(n) for n in np.random.default_rng(1).integers(2, 40, size=97)]


def plan_of(store: TokenStore, **more: Any) -> StepPlan:
    given = {"packing": True, "max_length": 64, "micro_batch_size": 2, "grad_accumulation": 3, "seed": 0}
    return StepPlan(store, **(given | more))


def documents(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [
        tuple(batch.input_ids[a:b].tolist())
        for batch in batches
        for a, b in zip(batch.starts[:-1], batch.starts[1:], strict=True)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_is_every_row_once_and_whole(packing: bool) -> None:
    store = store_of(LENGTHS)
    plan = plan_of(store, packing=packing)
    seen = [d for step in range(plan.total_steps) for d in documents(plan(step))]
    assert sorted(seen) == sorted(tuple(store[i][0].tolist()) for i in range(len(store)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_steps", [None, 40])
def test_any_split_gives_the_same_global_batch(packing: bool, max_steps: int | None) -> None:
    store = store_of(LENGTHS)
    plans = [
        plan_of(
            store, packing=packing, micro_batch_size=m, grad_accumulation=a, max_steps=max_steps, epochs=2
        )
        for m, a in ((1, 8), (2, 4), (8, 1))
    ]
    assert len({plan.total_steps for plan in plans}) == 1
    for step in range(plans[0].total_steps):
        one, two, eight = (documents(plan(step)) for plan in plans)
        assert one == two == eight


def test_micro_batches_have_their_size_and_the_last_step_keeps_the_rest() -> None:
    plan = plan_of(store_of([5] * 20), packing=False, micro_batch_size=3, grad_accumulation=2)
    sizes = [[len(b.starts) - 1 for b in plan(step)] for step in range(plan.total_steps)]
    assert sizes == [[3, 3], [3, 3], [3, 3], [2]]


def test_packs_hold_at_most_max_length() -> None:
    plan = plan_of(store_of(LENGTHS), micro_batch_size=1)
    assert max(b.num_tokens for step in range(plan.total_steps) for b in plan(step)) <= 64
    assert plan.pack_efficiency > 0.95


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    store = store_of(LENGTHS)
    forwards, backwards = plan_of(store, epochs=3), plan_of(store, epochs=3)
    first = [documents(forwards(step)) for step in range(forwards.total_steps)]
    second = [documents(backwards(step)) for step in reversed(range(backwards.total_steps))]
    assert first == second[::-1]
    assert first != [documents(plan_of(store, epochs=3, seed=1)(s)) for s in range(forwards.total_steps)]


def test_epochs_differ_in_order() -> None:
    plan = plan_of(store_of(LENGTHS), epochs=2)
    half = plan.steps_per_epoch
    assert documents(plan(0)) != documents(plan(half))


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (2, 20), (0.5, 5), (0.1, 1), (0.3, 3), (0.01, 1), (2.25, 23)]
)
def test_fractional_epochs(epochs: float, steps: int) -> None:
    plan = plan_of(store_of([5] * 20), packing=False, micro_batch_size=2, grad_accumulation=1, epochs=epochs)
    assert plan.total_steps == steps


def test_max_steps_goes_on_into_further_epochs() -> None:
    plan = plan_of(store_of([5] * 20), packing=False, grad_accumulation=2, max_steps=23, epochs=1)
    assert (plan.total_steps, plan.steps_per_epoch) == (23, 5)
    counts = Counter(d for step in range(20) for d in documents(plan(step)))
    assert set(counts.values()) == {4}
    assert plan.epoch_of(22) == (4, 20)
    assert plan.epochs_after(20) == 4.0
    assert plan.epochs_after(22) == 4.4


def test_totals_are_the_sums_of_the_steps() -> None:
    store = store_of(LENGTHS, LENGTHS[:10], weights=(1, 0.5))
    for epochs in (1.0, 2.4):
        plan = plan_of(store, epochs=epochs)
        batches = [b for step in range(plan.total_steps) for b in plan(step)]
        assert plan.total_tokens == sum(b.num_tokens for b in batches)
        assert plan.total_supervised == sum(b.num_supervised for b in batches)
        assert plan.totals().documents == sum(len(b.starts) - 1 for b in batches)


def test_whole_weights_take_each_row_that_often() -> None:
    store = store_of([3] * 10, [3] * 5, weights=(1, 2))
    counts = Counter(epoch_rows(store, 0, 0).tolist())
    assert counts == dict.fromkeys(range(10), 1) | dict.fromkeys(range(10, 15), 2)


def test_half_weight_takes_one_half_then_the_other() -> None:
    store = store_of([3] * 10, weights=(0.5,))
    first, second = (set(epoch_rows(store, 3, epoch).tolist()) for epoch in (0, 1))
    assert (len(first), len(second)) == (5, 5)
    assert first | second == set(range(10))
    assert set(epoch_rows(store, 4, 0).tolist()) != first


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7, 1.5, 2.25])
def test_broken_weights_come_out_even_over_the_epochs(weight: float) -> None:
    store = store_of([3] * 20, weights=(weight,))
    counts = Counter(row for epoch in range(20) for row in epoch_rows(store, 0, epoch).tolist())
    assert sum(counts.values()) == round(20 * weight * 20)
    assert max(counts.values()) - min(counts.get(row, 0) for row in range(20)) <= 1


def test_a_tiny_weight_still_gives_a_row() -> None:
    store = store_of([3] * 3, weights=(0.01,))
    assert len(epoch_rows(store, 0, 0)) == 1
    assert plan_of(store, epochs=2, micro_batch_size=1, grad_accumulation=1).total_steps >= 1


def test_less_data_than_a_step_is_told() -> None:
    plan = plan_of(store_of([4, 5]), grad_accumulation=8)
    assert (plan.total_steps, len(plan(0)), plan(0)[0].num_tokens) == (1, 1, 9)
    assert "fewer than the 16 of one optimizer step" in plan.warnings[0]
    assert not plan_of(store_of([60] * 20), grad_accumulation=1).warnings


def test_no_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="no rows"):
        plan_of(store_of([]))


def test_batches_name_their_rows() -> None:
    store = store_of([3] * 4, [3] * 4)
    batch = plan_of(store, packing=False, micro_batch_size=8)(0)[0]
    for d, row in enumerate(batch.rows):
        token = int(batch.input_ids[batch.starts[d]])
        expected = f"file{token // 1000}: row {token % 1000 - 99}"
        assert store.place(row) == expected


def test_first_tokens_are_never_supervised() -> None:
    batch = plan_of(store_of(LENGTHS))(0)[0]
    assert (batch.labels[batch.starts[:-1]] == IGNORE).all()
    assert batch.num_supervised == batch.num_tokens - (len(batch.starts) - 1)


def test_eval_batches_hold_every_row_once_within_the_limit() -> None:
    store = store_of([*LENGTHS, 64])
    batches = eval_batches(store, max_tokens=60)
    assert sorted(documents(batches)) == sorted(tuple(store[i][0].tolist()) for i in range(len(store)))
    assert all(b.num_tokens <= 60 or len(b.starts) == 2 for b in batches)


def test_eval_batches_of_some_rows_are_always_the_same() -> None:
    store = store_of(LENGTHS)
    first, second = (documents(eval_batches(store, max_tokens=99, max_rows=7)) for _ in range(2))
    assert first == second
    assert len(first) == 7
    assert len(documents(eval_batches(store, max_tokens=99, max_rows=10_000))) == len(LENGTHS)


def test_eval_batches_of_nothing() -> None:
    assert eval_batches(store_of(), max_tokens=64) == []


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_longest_batch_is_that_of_all_epochs(packing: bool, seed: int) -> None:
    plan = plan_of(store_of(LENGTHS), packing=packing, seed=seed, epochs=3)
    sizes = [len(batch.input_ids) for step in range(plan.total_steps) for batch in plan(step)]
    assert len(plan.longest().input_ids) == max(sizes)
