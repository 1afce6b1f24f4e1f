"""Requests that come to a generator over time, some of them cancelled."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from tests.page_counts import check_pool
from tunesmith.model.generate import Generator
from tunesmith.model.requests import SamplingParams, TokenEvent


@dataclass
class Arrival:
    """A request that comes at step `at`; `until`: at most so many tokens later it is cancelled."""

    at: int
    prompt: list[int]
    params: SamplingParams
    until: int | None = None
    adapter: str | None = None


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    events: list[TokenEvent] = field(default_factory=list)


def run(generator: Generator, arrivals: list[Arrival]) -> list[Answer]:
    """The answers in the order of `arrivals`. Checks the books of the cache after every step."""
    answers, index = [Answer() for _ in arrivals], {}
    coming = defaultdict(list)
    for number, arrival in enumerate(arrivals):
        coming[arrival.at].append(number)
    for step in range(100_000):
        for number in coming.pop(step, ()):
            arrival = arrivals[number]
            index[generator.add(arrival.prompt, arrival.params, adapter=arrival.adapter)] = number
        if not (coming or generator.has_work):
            break
        for event in generator.step():
            number = index[event.request_id]
            _take(answers[number], event)
            until = arrivals[number].until
            if until is not None and event.finish_reason is None and len(answers[number].ids) >= until:
                generator.cancel(event.request_id)
        scheduler = generator._scheduler
        check_pool(scheduler.pool, [request.pages for request in scheduler.running])
    assert generator.cache_tokens_used == 0
    return answers


def _take(answer: Answer, event: TokenEvent) -> None:
    assert answer.finish_reason is None, "an event after the last"
    answer.events.append(event)
    answer.finish_reason = event.finish_reason
    if event.token_id is not None:
        answer.ids.append(event.token_id)


def random_arrivals(
    prompts: list[list[int]], *, seed: int, new_tokens: tuple[int, int], cancelled: float, every: int = 2
) -> list[Arrival]:
    """Greedy requests that come at random steps, `every` on average, a share of them cancelled on their way."""
    draw = random.Random(seed)
    arrivals, at = [], 0
    for prompt in prompts:
        at += draw.randint(0, 2 * every)
        count = draw.randint(*new_tokens)
        until = draw.randint(1, count) if draw.random() < cancelled else None
        arrivals.append(Arrival(at, prompt, SamplingParams(max_new_tokens=count), until))
    return arrivals


def related_prompts(count: int, *, seed: int, vocabulary: int, longest: int) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, half of which begin like others."""
    draw = random.Random(seed)
    stems = [[draw.randrange(3, vocabulary) for _ in range(longest)] for _ in range(3)]
    prompts = []
    for _ in range(count):
        length = draw.randint(1, longest)
        shared = draw.randint(length // 2, length) if draw.random() < 0.5 else 0
        own = [draw.randrange(3, vocabulary) for _ in range(length - shared)]
        prompts.append([*draw.choice(stems)[:shared], *own])
    return prompts
