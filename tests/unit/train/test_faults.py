"""Cutting batches to what memory holds, and telling a spike from noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.conftest import make_documents, one_batch
from tunesmith.core.events import EventLog
from tunesmith.model.batch import Batch, join
from tunesmith.train import faults


def of_lengths(*lengths: int) -> Batch:
    documents = [(np.full(n, 7), np.full(n, 7)) for n in lengths]
    return join(documents, tuple(range(100, 100 + len(lengths))))


def sizes(batches: list[Batch]) -> list[int]:
    return [batch.num_tokens for batch in batches]


def test_halves_meet_at_the_border_nearest_to_the_middle() -> None:
    assert sizes(list(faults.halve(of_lengths(10, 20, 30, 40)))) == [60, 40]
    assert sizes(list(faults.halve(of_lengths(90, 5, 5)))) == [90, 10]
    assert faults.halve(of_lengths(50)) == ()


@pytest.mark.parametrize("limit", [1, 37, 150, 10_000])
def test_cutting_keeps_every_document_label_and_row_in_order(limit: int) -> None:
    batch = one_batch(make_documents(12, seed=3))
    pieces = faults.cut([batch], limit)
    assert np.array_equal(np.concatenate([p.input_ids for p in pieces]), batch.input_ids)
    assert np.array_equal(np.concatenate([p.labels for p in pieces]), batch.labels)
    assert np.array_equal(np.concatenate([p.positions for p in pieces]), batch.positions)
    assert sum((p.rows for p in pieces), ()) == batch.rows
    assert all(p.num_tokens <= limit or p.num_documents == 1 for p in pieces)
    assert (len(pieces) == 1) == (limit >= batch.num_tokens)


def test_small_batches_are_left_alone() -> None:
    small, large = of_lengths(10, 10), of_lengths(100, 100)
    assert faults.cut([small, large], None) == [small, large]
    assert faults.cut([small, large], 100)[0] is small
    assert sizes(faults.cut([small, large], 100)) == [20, 100, 100]


def test_the_next_limit_cuts_the_largest_that_can_be_cut() -> None:
    assert faults.smaller([of_lengths(10, 10), of_lengths(60, 30), of_lengths(500)]) == 45
    assert faults.smaller([of_lengths(500)]) is None


def test_what_says_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert faults.is_out_of_memory(found.value)
    assert faults.is_out_of_memory(MemoryError())
    assert faults.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert faults.is_out_of_memory(RuntimeError("std::bad_alloc"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not faults.is_out_of_memory(other.value)


def test_earlier_limits_are_those_of_the_steps_to_come(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step, limit in ((3, 900), (8, 450), (8, 225), (8, 450), (9, 100)):
            log.write("out_of_memory", step=step, max_tokens=limit)
    assert faults.limits_after(path, 0) == {3: 900, 8: 225, 9: 100}
    assert faults.limits_after(path, 8) == {9: 100}


def test_a_spike_stands_out_of_noise_that_does_not() -> None:
    draw = np.random.default_rng(0)
    recent: list[float] = []
    told = 0
    for step in range(2000):
        loss = 2.0 * math.exp(-step / 500) + 1.0 + float(draw.normal(0, 0.15))
        told += faults.is_spike(loss, recent)
        recent = faults.remember(loss, recent)
    assert told == 0 and len(recent) == faults.WINDOW
    assert faults.is_spike(recent[-1] + 2.0, recent)


def test_a_steep_fall_hides_no_spike() -> None:
    recent = [6.0 * 0.9**n for n in range(30)]
    assert faults.is_spike(recent[-1] + 1.2, recent) and not faults.is_spike(recent[-1] * 0.9, recent)


def test_spikes_do_not_hide_the_next_one() -> None:
    recent = [1.0 + 0.01 * (n % 5) for n in range(50)] + [30.0] * 5
    assert faults.is_spike(5.0, recent)
    assert not faults.is_spike(1.05, recent)


def test_nothing_is_known_at_the_beginning_and_dips_are_no_spikes() -> None:
    assert not faults.is_spike(1e9, [1.0] * (faults.FEWEST - 1))
    assert not faults.is_spike(-1e9, [1.0] * faults.FEWEST)
    assert not faults.is_spike(1.0 + faults.SMALLEST_JUMP / 2, [1.0] * faults.FEWEST)


def test_the_worst_row_comes_first() -> None:
    parts = faults.documents([of_lengths(3, 4), of_lengths(5)])
    found = faults.worst_first(parts, [1.0, 9.0, math.nan])
    assert [item.row for item in found] == [100, 101, 100]
    assert math.isnan(found[0].value) and [item.value for item in found[1:]] == [9.0, 1.0]
    assert faults.rows_text(found, most=2) == "row 100 (nan), row 101 (9) and 1 more"
