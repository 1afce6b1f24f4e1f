"""An engine in another process: answers, errors, ends."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve import counting_engine
from tests.unit.serve.counting_engine import DIE, HANG, REFUSE
from tunesmith.core.errors import UserError
from tunesmith.model.requests import SamplingParams
from tunesmith.serve.engine import AnswerStream, Ask, EngineBusy, EngineError
from tunesmith.serve.process_engine import ProcessEngine

COMMAND = [sys.executable, str(counting_engine.__file__)]


def make(**description: Any) -> ProcessEngine:
    return ProcessEngine(COMMAND, {"max_concurrent": 2} | description, max_waiting=20)


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessEngine]:
    """One that no test breaks."""
    engine = make()
    engine.start()
    yield engine
    engine.close(grace_s=0)


@pytest.fixture
def own() -> Iterator[ProcessEngine]:
    engine = make()
    engine.start()
    yield engine
    engine.close(grace_s=0)


def ask(*prompt: int, tokens: int = 3, adapter: str | None = None) -> Ask:
    return Ask(prompt, SamplingParams(max_new_tokens=tokens), adapter)


async def tokens_of(stream: AnswerStream) -> dict[int, list[int | None]]:
    got: dict[int, list[int | None]] = {}
    async for batch in stream:
        for index, event in batch:
            got.setdefault(index, []).append(event.token_id)
    return got


async def until(condition: Callable[[], object]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


def is_gone(pid: int) -> bool:
    """Not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


def test_answers_come_with_all_that_is_said_of_them(engine: ProcessEngine) -> None:
    async def run() -> None:
        events = []
        stream = engine.submit([ask(5, tokens=2)])
        async for batch in stream:
            events += [event for _, event in batch]
        assert [(e.token_id, e.finish_reason) for e in events] == [(6, None), (7, "length")]
        assert events[0].prompt_logprobs == (events[0].logprobs,)
        assert events[1].logprobs is not None
        assert events[1].logprobs.top == ((1, -0.5), (2, -1.5))

    asyncio.run(run())


def test_many_streams_on_two_loops_at_once(engine: ProcessEngine) -> None:
    async def one(first: int) -> None:
        streams = [engine.submit([ask(first + i), ask(first + i + 1, tokens=4)]) for i in range(4)]
        for i, stream in enumerate(streams):
            start = first + i
            assert await tokens_of(stream) == {
                0: [start + 1, start + 2, start + 3],
                1: [start + 2, start + 3, start + 4, start + 5],
            }

    async def both() -> None:
        await asyncio.gather(one(10), asyncio.to_thread(lambda: asyncio.run(one(500))))

    asyncio.run(both())
    assert engine.status().running == engine.status().waiting == 0


def test_cancelling_ends_one_or_all(engine: ProcessEngine) -> None:
    before = engine.status().cancelled

    async def run() -> None:
        stream = engine.submit([ask(1, tokens=900), ask(2, tokens=900), ask(3, tokens=2)])
        finished = set()
        async for batch in stream:
            for index, event in batch:
                if event.finish_reason:
                    finished.add(index)
                    stream.cancel(0)
                    assert engine.status().running + engine.status().waiting == 1
                    stream.cancel()
        assert finished == {2}
        assert engine.status().running + engine.status().waiting == 0
        await until(lambda: engine.status().cancelled == before + 2)

    asyncio.run(run())


def test_bad_asks_are_refused_at_once(engine: ProcessEngine) -> None:
    async def run() -> None:
        bad = [
            ask(),
            ask(1000),
            ask(-1),
            ask(*[1] * 1001),
            ask(1, adapter="nothing"),
            Ask([1], SamplingParams(logit_bias={1000: 1.0})),
        ]
        for one in bad:
            with pytest.raises(UserError):
                engine.submit([one])
        with pytest.raises(EngineBusy):
            engine.submit([ask(1)] * 23)

    asyncio.run(run())


def test_what_only_the_other_side_can_refuse_is_a_user_error_too(engine: ProcessEngine) -> None:
    async def run() -> None:
        with pytest.raises(UserError, match="does not like this") as refused:
            await tokens_of(engine.submit([ask(REFUSE)]))
        assert refused.value.hint == "ask for something else"
        assert await tokens_of(engine.submit([ask(1, tokens=1)])) == {0: [2]}

    asyncio.run(run())


def test_adapters_and_embeddings(engine: ProcessEngine, tmp_path: Path) -> None:
    async def run() -> None:
        await engine.load_adapter("first", tmp_path)
        await engine.load_adapter("second", tmp_path)
        assert engine.status().adapters == ("first", "second")
        assert await tokens_of(engine.submit([ask(1, tokens=1, adapter="second")])) == {0: [202]}
        with pytest.raises(UserError, match="does not fit"):
            await engine.load_adapter("third", tmp_path / "nothing")
        await engine.unload_adapter("first")
        with pytest.raises(UserError, match="no adapter 'first'"):
            await engine.unload_adapter("first")
        assert await engine.embed([[1, 2], [3]]) == [[2.0, 0.5], [1.0, 0.5]]
        with pytest.raises(UserError):
            await engine.embed([[]])
        with pytest.raises(EngineError, match="ValueError: a fault of its own"):
            await engine.embed([[1]], "broken")
        await engine.unload_adapter("second")

    asyncio.run(run())


def test_its_death_is_told_to_everyone_and_nothing_is_left(own: ProcessEngine) -> None:
    reason = "ended with code 3"

    async def run() -> None:
        waiting = asyncio.create_task(tokens_of(own.submit([ask(1, tokens=900)])))
        await until(lambda: own.status().generated_tokens > 0)
        own.submit([ask(DIE)])
        with pytest.raises(EngineError, match=reason):
            await waiting
        status = own.status()
        assert (status.alive, status.ready) == (False, False)
        assert reason in str(status.failure)
        with pytest.raises(EngineError, match=reason):
            own.submit([ask(1)])
        with pytest.raises(EngineError, match=reason):
            await own.embed([[1]])
        assert is_gone(own.pid or 0)

    asyncio.run(run())


def test_one_that_hangs_still_says_that_it_has_work_and_can_be_abandoned(own: ProcessEngine) -> None:
    async def run() -> None:
        stream = own.submit([ask(HANG)])
        await until(lambda: own.status().running == 1)
        own.abandon("it hung")
        with pytest.raises(EngineError, match="it hung"):
            await tokens_of(stream)
        await until(lambda: is_gone(own.pid or 0))

    asyncio.run(run())


def test_ctrl_c_is_for_the_parent_to_act_upon(engine: ProcessEngine) -> None:
    """On a terminal it reaches the foreground group: the engine is in one of its own."""
    assert engine.pid is not None
    assert os.getpgid(engine.pid) != os.getpgrp()


def test_close_lets_running_requests_finish(own: ProcessEngine) -> None:
    async def run() -> None:
        stream = own.submit([ask(1, tokens=50)])
        closing = asyncio.create_task(asyncio.to_thread(own.close, grace_s=30))
        await until(lambda: not own.status().ready)
        with pytest.raises(EngineError, match="shutting down"):
            own.submit([ask(1)])
        assert len((await tokens_of(stream))[0]) == 50
        await closing
        assert is_gone(own.pid or 0)

    asyncio.run(run())


def test_close_without_grace_ends_them(own: ProcessEngine) -> None:
    async def run() -> None:
        stream = own.submit([ask(1, tokens=900)])
        closing = asyncio.create_task(asyncio.to_thread(own.close, grace_s=0))
        with pytest.raises(EngineError, match="shutting down"):
            await tokens_of(stream)
        await closing
        assert is_gone(own.pid or 0)

    asyncio.run(run())


def test_what_does_not_load_is_the_same_error_here() -> None:
    engine = make(fault=True)
    with pytest.raises(UserError, match="no such model") as refused:
        engine.start()
    assert refused.value.hint == "give another"
    assert not engine.status().alive


def test_a_program_that_cannot_be_started_or_says_nothing() -> None:
    with pytest.raises(EngineError, match="No such file"):
        ProcessEngine(["/nothing/here"], {}).start()
    with pytest.raises(EngineError, match="ended with code 5"):
        ProcessEngine([sys.executable, "-c", "raise SystemExit(5)"], {}).start()


def test_close_while_it_loads_ends_the_start() -> None:
    engine = ProcessEngine([sys.executable, "-c", "import time; time.sleep(60)"], {})

    async def run() -> None:
        starting = asyncio.create_task(asyncio.to_thread(engine.start))
        await until(lambda: engine.pid is not None)
        begin = time.monotonic()
        await asyncio.to_thread(engine.close, grace_s=30)
        with pytest.raises(EngineError, match="shutting down"):
            await starting
        assert time.monotonic() - begin < 20

    asyncio.run(run())
    assert is_gone(engine.pid or 0)
