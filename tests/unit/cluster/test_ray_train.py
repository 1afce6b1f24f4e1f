"""What is asked of Ray before a cluster is there."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tunesmith.cluster import ray_train
from tunesmith.cluster.ray_train import Ledger, Workers, connected, is_ray, workers_of
from tunesmith.core.errors import UserError
from tunesmith.core.net import free_port


@pytest.mark.parametrize(
    ("text", "expected"), [("1", (1, 1)), ("4", (4, 4)), ("2:8", (2, 8)), (" 3:3 ", (3, 3))]
)
def test_workers(text: str, expected: tuple[int, int]) -> None:
    assert workers_of(text) == expected


@pytest.mark.parametrize("text", ["0", "", "two", "-1", "8:2", "0:4", "2:", "1:2:3", "1.5"])
def test_what_is_no_number_of_workers(text: str) -> None:
    with pytest.raises(UserError, match="is not a number of workers") as caught:
        workers_of(text)
    assert "2:8" in str(caught.value.hint)


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "10.0.0.5:6379"])
def test_an_address_of_ray(address: str) -> None:
    assert is_ray(address)


@pytest.mark.parametrize(
    "address", ["cluster.yaml", "./auto", "ray", "ray://head", "http://head:8265", "a/b:1"]
)
def test_what_is_no_address_of_ray(address: str) -> None:
    assert not is_ray(address)


def test_the_ledger_keeps_what_came_first() -> None:
    ledger = Ledger()
    assert ledger.fault() is None
    assert ledger.first(None) is None
    assert ledger.first("later") is None
    ledger.give_up({"what": "the cause"})
    ledger.give_up({"what": "its effect on others"})
    assert ledger.fault() == {"what": "the cause"}


def test_workers_in_words() -> None:
    assert Workers(1, 1).text == "1 worker with a CPU each"
    assert Workers(2, 8, gpu=True).text == "2 to 8 workers with a GPU each"


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_listens_is_told_at_once(form: str) -> None:
    address = form.format(free_port())
    with pytest.raises(UserError, match="cannot reach a Ray cluster") as caught, connected(address):
        raise AssertionError("connected")
    assert address in caught.value.what and "refused" in caught.value.what


def test_ctrl_c_is_handed_on_once_and_a_second_one_ends() -> None:
    handed_on: list[int] = []
    again, over = threading.Event(), threading.Event()

    def train() -> str:
        for wait in (again, over):
            os.kill(os.getpid(), signal.SIGINT)
            assert wait.wait(30)
        return "saved"

    def asked(number: int) -> None:
        handed_on.append(number)
        again.set()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ray_train._in_thread(train, asked)
    over.set()
    assert handed_on == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is before


def test_what_was_asked_to_stop_may_still_end_well_or_fail() -> None:
    handed_on = threading.Event()

    def train() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        assert handed_on.wait(30)
        return "saved"

    assert ray_train._in_thread(train, lambda number: handed_on.set()) == "saved"
    with pytest.raises(ZeroDivisionError):
        ray_train._in_thread(lambda: 1 / 0, print)
