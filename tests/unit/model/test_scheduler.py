"""The scheduler with a made-up model whose next token depends on all tokens before it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tests.page_counts import check_pool
from tunesmith.model.pages import PAGE, PagePool
from tunesmith.model.scheduler import Request, Scheduler


def next_token(tokens: list[int], root: bytes = b"") -> int:
    return hash((tuple(tokens), root)) % 1000


def answer(prompt: list[int], new_tokens: int, root: bytes = b"") -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(next_token(tokens, root))
    return tokens[len(prompt) :]


@dataclass
class Machine:
    """Runs requests as a generator would, and remembers what it has written into each slot of each page."""

    scheduler: Scheduler[Request]
    slots: dict[int, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    wanted: dict[int, int] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    computed: int = 0

    def add(self, number: int, prompt: list[int], new_tokens: int, root: bytes = b"") -> None:
        self.requests[number] = Request(number, list(prompt), len(prompt), root)
        self.wanted[number] = new_tokens
        self.scheduler.add(self.requests[number])

    def cancel(self, number: int) -> None:
        self.scheduler.remove(self.requests.pop(number))

    def step(self) -> list[tuple[int, int]]:
        planned = self.scheduler.plan()
        for request, count in planned:
            assert count >= 1
            self.write(request, count)
        counts = [count for _, count in planned]
        assert counts == sorted(counts, key=lambda count: count > 1)
        self.computed += sum(counts)
        self.scheduler.advance(planned)
        for request, _ in planned:
            if request.num_left == 0:
                request.tokens.append(next_token(request.tokens, request.root))
                if request.num_produced == self.wanted[request.id]:
                    self.answers[request.id] = request.tokens[request.num_prompt :]
                    self.scheduler.remove(request)
                    del self.requests[request.id]
        self.check()
        return [(request.id, count) for request, count in planned]

    def write(self, request: Request, count: int) -> None:
        """Every slot up to the new tokens' end must hold this sequence's own beginning: that is what it reads."""
        for at in range(request.computed + count):
            slot = request.pages[at // PAGE] * PAGE + at % PAGE
            mine = (request.root, tuple(request.tokens[: at + 1]))
            if at >= request.computed:
                assert slot not in self.shared(request), "a page that another uses is written"
                self.slots[slot] = mine
            assert self.slots[slot] == mine

    def shared(self, request: Request) -> set[int]:
        others = (other for other in self.scheduler.running if other is not request)
        return {page * PAGE + i for other in others for page in other.pages for i in range(PAGE)}

    def check(self) -> None:
        running = self.scheduler.running
        check_pool(self.scheduler.pool, [request.pages for request in running])
        assert [request.id for request in running] == sorted(request.id for request in running)
        waiting = [request.id for request in self.scheduler.waiting]
        assert waiting == sorted(waiting)
        assert all(not request.pages for request in self.scheduler.waiting)
        assert len(running) <= self.scheduler.max_concurrent

    def run(self) -> None:
        for _ in range(100_000):
            if not (self.scheduler.running or self.scheduler.waiting):
                return
            assert self.step(), "there is work, and nothing is done"
        raise AssertionError("it does not end")


def machine(num_pages: int, *, max_concurrent: int = 8, prefill_tokens: int = 64) -> Machine:
    pool = PagePool(num_pages)
    return Machine(Scheduler(pool, max_concurrent=max_concurrent, prefill_tokens=prefill_tokens))


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


def test_answers_go_first_then_prompts_in_chunks_of_the_budget() -> None:
    m = machine(100, prefill_tokens=50)
    m.add(0, tokens(10), 30)
    assert m.step() == [(0, 10)]
    m.add(1, tokens(120, 1), 5)
    m.add(2, tokens(20, 2), 5)
    assert m.step() == [(0, 1), (1, 50)]
    assert m.step() == [(0, 1), (1, 50)]
    assert m.step() == [(0, 1), (1, 20), (2, 20)]
    assert m.step() == [(0, 1), (1, 1), (2, 1)]


def test_no_more_run_than_asked_for_and_in_the_order_of_their_coming() -> None:
    m = machine(100, max_concurrent=2)
    for number in range(4):
        m.add(number, tokens(5, number), 3)
    assert [number for number, _ in m.step()] == [0, 1]
    m.run()
    assert list(m.answers) == [0, 1, 2, 3]


def test_a_known_beginning_is_not_computed_again() -> None:
    m = machine(100, prefill_tokens=1000)
    m.add(0, tokens(100), 4)
    m.run()
    before = m.computed
    m.add(1, tokens(100), 4)
    m.add(2, [*tokens(70), *tokens(30, 9)], 4)
    m.run()
    assert m.answers[1] == m.answers[0]
    # 96 of 100 tokens lie in full pages, and 64 of 70.
    assert m.computed - before == (100 - 96 + 3) + (100 - 64 + 3)
    assert (m.scheduler.prompt_tokens, m.scheduler.cached_tokens) == (300, 160)


def test_an_answer_is_a_beginning_too() -> None:
    m = machine(100)
    m.add(0, tokens(10), 60)
    m.run()
    m.add(1, [*tokens(10), *m.answers[0], 7], 2)
    m.run()
    assert m.scheduler.cached_tokens == 64


def test_a_prompt_of_full_pages_still_computes_its_last_token() -> None:
    m = machine(100)
    m.add(0, tokens(2 * PAGE), 3)
    m.add(1, tokens(2 * PAGE), 3)
    m.run()
    assert m.answers[1] == m.answers[0] == answer(tokens(2 * PAGE), 3)


def test_requests_that_begin_alike_at_the_same_time_compute_it_once() -> None:
    m = machine(100, prefill_tokens=40)
    for number in range(5):
        m.add(number, [*tokens(100), number], 2)
    m.run()
    assert m.computed == 101 + 4 * (101 - 96) + 5
    assert m.scheduler.cached_tokens == 4 * 96
    assert m.answers == {n: answer([*tokens(100), n], 2) for n in range(5)}


def test_another_root_shares_nothing() -> None:
    m = machine(100)
    for number, root in enumerate((b"", b"1 a", b"2 a", b"1 b")):
        m.add(number, tokens(50), 2, root)
        m.run()
    assert m.scheduler.cached_tokens == 0


def test_the_newest_gives_way_when_no_page_is_left_and_goes_on_later() -> None:
    m = machine(6, max_concurrent=3)
    for number in range(3):
        m.add(number, tokens(PAGE - 1, number), 2 * PAGE)
    m.run()
    assert m.scheduler.preempted > 0
    assert m.answers == {n: answer(tokens(PAGE - 1, n), 2 * PAGE) for n in range(3)}
    assert next(iter(m.answers)) == 0


def test_prompts_that_cannot_go_on_make_way_for_the_oldest() -> None:
    m = machine(12, prefill_tokens=PAGE)
    m.add(0, tokens(4 * PAGE, 1), 1)
    m.run()
    m.add(1, tokens(5 * PAGE), 1)
    m.add(2, [*tokens(4 * PAGE, 1), 5, 6], 1)
    assert m.step() == [(1, PAGE)]
    scheduler = m.scheduler
    assert [len(request.pages) for request in scheduler.running] == [1, 4]
    # Whatever else may hold the pages that they were promised.
    while scheduler.pool.take() is not None:
        pass
    assert [(request.id, count) for request, count in scheduler.plan()] == [(1, PAGE)]
    assert [request.id for request in scheduler.waiting] == [2]
    assert scheduler.preempted == 1


def test_a_request_that_runs_alone_may_fill_the_cache() -> None:
    m = machine(4)
    m.add(0, tokens(3 * PAGE), PAGE + 1)
    m.run()
    assert m.answers[0] == answer(tokens(3 * PAGE), PAGE + 1)
    assert m.scheduler.preempted == 0


def test_a_small_request_behind_a_refused_one_begins_when_that_is_gone() -> None:
    m = machine(8, max_concurrent=3)
    m.add(0, tokens(4 * PAGE), 20)
    m.add(1, tokens(6 * PAGE, 1), 2)
    m.add(2, tokens(5, 2), 2)
    assert m.step() == [(0, 4 * PAGE)]
    m.cancel(1)
    assert m.step() == [(0, 1), (2, 5)]


class Watched(Request):
    """A request that must not take more than this many tokens from cached pages."""

    def num_reusable(self) -> int:
        return 20


def test_a_request_takes_no_more_from_the_cache_than_it_may() -> None:
    scheduler: Scheduler[Request] = Scheduler(PagePool(20), max_concurrent=2, prefill_tokens=1000)
    for number in range(2):
        request = Watched(number, tokens(100), 100)
        scheduler.add(request)
        [(_, count)] = scheduler.plan()
        assert count == (100, 84)[number]
        scheduler.advance([(request, count)])
        scheduler.remove(request)


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_gives_every_answer_and_returns_every_page(seed: int) -> None:
    draw = random.Random(seed)
    m = machine(
        draw.choice([7, 12, 30]), max_concurrent=draw.choice([1, 3, 6]), prefill_tokens=draw.choice([5, 40])
    )
    asked: dict[int, tuple[list[int], int, bytes]] = {}
    for number in range(60):
        stem = tokens(draw.randrange(40), draw.randrange(3))
        prompt = [*stem, *tokens(draw.randrange(1, 30), number)]
        room = m.scheduler.pool.num_pages * PAGE - len(prompt) + 1
        asked[number] = (prompt, draw.randrange(1, min(room, 60)), draw.choice([b"", b"1 a"]))
        m.add(number, *asked[number])
        for _ in range(draw.randrange(12)):
            m.step()
        if draw.random() < 0.2 and m.requests:
            gone = draw.choice(list(m.requests))
            m.cancel(gone)
            del asked[gone]
    m.run()
    assert m.answers == {number: answer(*ask) for number, ask in asked.items()}
    assert m.scheduler.pool.num_used == 0
