from __future__ import annotations

from dataclasses import fields, replace

import pytest

from tunesmith.data.counts import FileCounts
from tunesmith.plan.warnings import REMEDIES, Course, of_data, warnings_of

GOOD = Course(
    preference=False,
    adapters=True,
    lr=2e-4,
    highest_lr=2e-4,
    warmup_steps=9,
    steps=300,
    passes=3.0,
    save_every=60,
    packing=True,
    train_rows=4000,
    eval_rows=200,
    longest=1800,
    max_length=2048,
    tokens=590_000,
    micro_batches=300,
    room=2048,
    loses_updates=False,
)


def told(**changes: object) -> list[str]:
    return [f"{found.what} | {found.remedy}" for found in warnings_of(replace(GOOD, **changes))]  # type: ignore[arg-type]


def test_nothing_is_said_of_a_sound_run() -> None:
    assert told() == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"eval_rows": 4, "train_rows": 396},
            "4 rows are held out: by chance alone their loss is off by about 50%",
        ),
        ({"passes": 12.0}, "every row is learned 12.0 times"),
        ({"tokens": 300_000}, "packs are 49% full"),
        ({"packing": False, "tokens": 30_000, "longest": 1800}, "has 100 tokens on average where 2,048 fit"),
        (
            {"packing": False, "longest": 300, "tokens": 600_000},
            "data.max_length is 2,048 and the longest row has 300",
        ),
        ({"highest_lr": 2e-10}, "never reaches train.lr 0.0002: the highest of any step is 2e-10"),
        (
            {"warmup_steps": 500},
            "the warm-up takes 500 of 300 steps: train.lr 0.0002 is reached at the last step",
        ),
        ({"warmup_steps": 200}, "the warm-up takes 200 of 300 steps: 100 steps are left"),
        ({"lr": 0.1, "highest_lr": 0.1}, "for adapters 1e-05 to 0.001 is usual, and the loss may diverge"),
        ({"adapters": False}, "for all weights 1e-06 to 0.0001 is usual"),
        ({"preference": True, "lr": 1e-8, "highest_lr": 1e-8}, "nothing may be learned"),
        ({"save_every": 500}, "train.save_every is 500 and the run has 300 steps"),
        ({"loses_updates": True}, "bf16-pure without stochastic rounding"),
    ],
)
def test_each_fault_is_told_once_with_its_figure_and_a_remedy(changes: dict[str, object], what: str) -> None:
    (found,) = told(**changes)
    assert what in found and found.partition(" | ")[2]


def test_the_remedies_name_values_that_mend_it() -> None:
    assert "0.05 for 20 rows" in told(eval_rows=4, train_rows=396)[0]
    assert "to 75 steps for 3 passes" in told(passes=12.0)[0]
    assert "--set train.save_every=60" in told(save_every=500)[0]
    assert "--set data.max_length=320" in told(packing=False, longest=300, tokens=600_000)[0]
    assert told(warmup_steps=9, save_every=60) == []


def test_short_runs_are_not_blamed_for_their_warm_up_or_their_saves() -> None:
    assert told(steps=4, warmup_steps=2, save_every=10) == []


def test_every_note_on_the_data_has_a_remedy() -> None:
    ones = {field.name: 1 for field in fields(FileCounts) if field.type == "int"}
    counts = FileCounts(**{"file": "a.jsonl", "format": "text", "weight": 1.0, "used_for": "train"} | ones)  # type: ignore[arg-type]
    notes = counts.notes()
    assert len(notes) == 10
    assert all(warning.remedy for warning in of_data(notes))
    used = {part for note in notes for part in REMEDIES if part in note}
    assert len(used) == len(notes)
    assert of_data(["something new"])[0].remedy == ""
