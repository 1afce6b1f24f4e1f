"""Jobs in copies of this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial

import pytest

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.forks import side_by_side


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [0, 1, 2, 5])
def test_every_job_is_done_once(processes: int) -> None:
    found = dict(side_by_side([partial(square, number) for number in range(7)], processes))
    assert {number: value for number, (value, _) in found.items()} == {n: n * n for n in range(7)}
    assert (os.getpid() in {pid for _, pid in found.values()}) is (processes < 2)


def test_what_a_job_raises_is_raised_here_and_no_process_is_left() -> None:
    def fail() -> None:
        raise UserError("no such card", hint="take another")

    with pytest.raises(UserError, match="no such card") as caught:
        list(side_by_side([fail, fail], 2))
    assert caught.value.hint == "take another"
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_told() -> None:
    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TunesmithError, match="killed"):
        list(side_by_side([end, end], 2))


def test_leaving_early_ends_the_others() -> None:
    jobs = [partial(square, 3), signal.pause]
    assert next(side_by_side(jobs, 2))[0] == 0
    assert multiprocessing.active_children() == []
