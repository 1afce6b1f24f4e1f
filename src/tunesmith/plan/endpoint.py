"""How many replicas an endpoint needs: requests that come at random, and wait while all places are taken.

A replica answers a fixed number of requests at once; with one queue before all of them their places are the
servers of an M/M/c queue (Erlang 1917; Kleinrock, Queueing Systems, vol. 1, 1975, section 3.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Demand:
    """requests_per_day: of all users; peak: of the busiest hour over the mean; prompt_tokens, answer_tokens:
    of the mean request."""

    requests_per_day: float
    prompt_tokens: float
    answer_tokens: float
    peak: float = 2.0

    @property
    def per_s(self) -> float:
        """Requests that come in a second of the busiest hour."""
        return self.requests_per_day * self.peak / DAY_S


@dataclass(frozen=True, kw_only=True)
class Replica:
    """places: requests that are answered at once; prompt_tokens_per_s: read; answer_tokens_per_s: written for
    all of them together when all places are taken."""

    places: int
    prompt_tokens_per_s: float
    answer_tokens_per_s: float

    def seconds(self, demand: Demand) -> float:
        """That a request holds its place, all others taken."""
        written = demand.answer_tokens * self.places / self.answer_tokens_per_s
        return demand.prompt_tokens / self.prompt_tokens_per_s + written


def waits(servers: int, load: float) -> float:
    """Probability that a request must wait (Erlang C). load: requests that come in the time that one takes.

    1.0 where the servers cannot keep up. Erlang B is taken step by step, which no factorial overflows.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def waits_longer(servers: int, load: float, times: float) -> float:
    """Probability that a request waits longer than `times` what one takes."""
    return waits(servers, load) * math.exp(-max(0.0, servers - load) * times)


def mean_wait_s(servers: int, load: float, service_s: float) -> float:
    """Infinite where the servers cannot keep up."""
    return math.inf if load >= servers else waits(servers, load) * service_s / (servers - load)


def replicas_for(demand: Demand, replica: Replica, *, wait_s: float, late_share: float) -> int:
    """The fewest replicas with which no more than `late_share` of the requests wait longer than wait_s.

    Raises ValueError for a share that is not between 0 and 1.
    """
    if not 0 < late_share < 1:
        raise ValueError(f"late_share {late_share}")
    service_s = replica.seconds(demand)
    load = demand.per_s * service_s
    count = max(1, math.ceil(load / replica.places))
    while waits_longer(count * replica.places, load, wait_s / service_s) > late_share:
        count += 1
    return count
