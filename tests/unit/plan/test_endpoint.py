"""Cases computed by hand."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from tunesmith.plan.endpoint import Demand, Replica, mean_wait_s, replicas_for, waits, waits_longer


def test_one_server_is_busy_as_often_as_it_is_loaded() -> None:
    # M/M/1: a request waits with the probability of a busy server, rho / (1 - rho) services long.
    assert waits(1, 0.5) == pytest.approx(0.5)
    assert mean_wait_s(1, 0.5, 4.0) == pytest.approx(4.0)


def test_two_servers() -> None:
    # Load 1 on two: (1/2 * 2) / (1 + 1 + 1/2 * 2) = 1/3; the wait is 1/3 of a service over one spare server.
    assert waits(2, 1.0) == pytest.approx(1 / 3)
    assert mean_wait_s(2, 1.0, 6.0) == pytest.approx(2.0)
    assert waits_longer(2, 1.0, 0.5) == pytest.approx(math.exp(-0.5) / 3)


def test_what_cannot_keep_up_waits_for_ever() -> None:
    assert waits(2, 2.0) == 1.0 and waits_longer(2, 3.0, 5) == 1.0
    assert mean_wait_s(2, 2.0, 1.0) == math.inf


def test_many_servers_do_not_overflow() -> None:
    assert 0 < waits(5000, 4900) < 1


def test_places_of_replicas_are_servers() -> None:
    # 86,400 requests a day at twice the mean: two a second. 100 tokens at 100/s, then 10 for each of 2
    # places at 20/s: 2 s. Load 4.
    demand = Demand(requests_per_day=86_400, prompt_tokens=100, answer_tokens=10)
    replica = Replica(places=2, prompt_tokens_per_s=100, answer_tokens_per_s=20)
    assert demand.per_s == pytest.approx(2)
    assert replica.seconds(demand) == pytest.approx(2)
    # Four servers of load 4 never catch up; with six, Erlang C is 0.2848 (Erlang B 0.1172), times e^-2 for 2 s.
    assert waits(6, 4.0) == pytest.approx(0.2848, abs=1e-4)
    assert replicas_for(demand, replica, wait_s=2.0, late_share=0.04) == 3
    assert replicas_for(demand, replica, wait_s=2.0, late_share=0.03) == 4
    with pytest.raises(ValueError, match="late_share"):
        replicas_for(demand, replica, wait_s=1.0, late_share=0.0)


def test_the_formula_is_what_a_queue_does() -> None:
    draw, free, now, late = random.Random(0), [0.0] * 4, 0.0, 0
    for _ in range(40_000):
        now += draw.expovariate(3.0)
        began = max(now, heapq.heappop(free))
        late += began - now > 0.5
        heapq.heappush(free, began + draw.expovariate(1.0))
    assert late / 40_000 == pytest.approx(waits_longer(4, 3.0, 0.5), abs=0.02)
