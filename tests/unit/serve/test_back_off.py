"""Pauses before a new start."""

from __future__ import annotations

from tunesmith.serve.back_off import BackOff


def test_pauses_double_and_begin_anew_after_a_long_life() -> None:
    back_off = BackOff(first_s=0.5, longest_s=3.0, settled_s=60.0)
    assert [back_off.next_pause_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    back_off.ended(lived_s=59.0)
    assert (back_off.failures, back_off.next_pause_s()) == (5, 3.0)
    back_off.ended(lived_s=61.0)
    assert (back_off.failures, back_off.next_pause_s()) == (0, 0.5)
