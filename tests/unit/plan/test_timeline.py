from __future__ import annotations

import pytest

from tunesmith.plan.allocator import round_block
from tunesmith.plan.timeline import Mark, Record, Timeline


def record(
    num_bytes: int, made: int, freed: int | None, category: str = "temporaries", **more: str
) -> Record:
    return Record(num_bytes, made, freed, category, "", "", "made by hand", **more)  # type: ignore[arg-type]


# Weights of 100 bytes throughout; forward makes 40 and 60, of which 40 is freed before backward makes 70.
STEP = Timeline(
    [
        record(100, 1, None, "weights"),
        record(40, 2, 4, "activations"),
        record(60, 3, 7, "logits and loss"),
        record(70, 5, 6),
    ],
    [Mark(2, "forward", ""), Mark(5, "backward", "layer 0")],
)


def test_the_fullest_moment_of_each_phase_and_what_it_holds() -> None:
    peaks = STEP.peaks()
    assert {key: moment.num_bytes for key, moment in peaks.items()} == {
        ("load", ""): 100,
        ("forward", ""): 200,
        ("backward", "layer 0"): 230,
    }
    assert peaks["forward", ""].parts == {"weights": 100, "activations": 40, "logits and loss": 60}
    assert STEP.peak() == peaks["backward", "layer 0"]
    assert STEP.peak().parts == {"weights": 100, "logits and loss": 60, "temporaries": 70}


def test_a_phase_that_allocates_nothing_holds_what_was_there() -> None:
    quiet = Timeline([record(9, 1, None)], [Mark(2, "forward", ""), Mark(2, "update", "")])
    assert quiet.peaks()["update", ""].num_bytes == 9


def test_blocks_of_a_card_are_whole_512_bytes() -> None:
    assert [round_block(size) for size in (1, 512, 513, 1024)] == [512, 512, 1024, 1024]
    assert STEP.peak(round_block).num_bytes == 3 * 512


def test_host_memory_is_counted_by_itself() -> None:
    both = Timeline([record(8, 1, None), record(30, 2, None, place="pinned")], [])
    assert both.peak().num_bytes == 8
    assert both.peaks(place="pinned")["load", ""].num_bytes == 30
    assert both.peaks(place="host") == {}


def test_the_largest_at_the_peak_are_listed_by_kind() -> None:
    assert STEP.largest(count=2) == [
        (100, "weights: made by hand", 1),
        (70, "temporaries: made by hand", 1),
    ]


def test_nothing_allocated_has_no_peak() -> None:
    with pytest.raises(ValueError):
        Timeline([], []).peak()
