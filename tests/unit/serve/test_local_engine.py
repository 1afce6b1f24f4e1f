"""The engine's thread: streams, cancelling, failing, ending."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tunesmith.core.errors import UserError
from tunesmith.model.generate import Generator, generate
from tunesmith.model.load import load_model
from tunesmith.model.sampling import SamplingParams
from tunesmith.serve.engine import EngineBusy, EngineError
from tunesmith.serve.local_engine import LocalEngine, LocalStream

WARM_UP = [5, 6, 7]


def make(folder: Path, **options: int) -> LocalEngine:
    generator = Generator(load_model(folder, dtype=torch.float32, device="cpu"), max_concurrent=4)
    engine = LocalEngine(generator, **options)
    assert not engine.status().alive
    engine.start(WARM_UP)
    return engine


async def until(condition: object) -> None:
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


async def tokens_of(stream: LocalStream, count: int) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in range(count)]
    async for batch in stream:
        for index, event in batch:
            if event.token_id is not None:
                got[index].append(event.token_id)
    return got


def test_answers_equal_the_generators(tiny: Path) -> None:
    prompts = [[7 * i + j for j in range(3 + i)] for i in range(9)]
    params = SamplingParams(max_new_tokens=12)

    async def run() -> list[list[int]]:
        engine = make(tiny)
        await until(lambda: engine.status().ready)
        both = (
            engine.submit([(p, params) for p in prompts[:5]]),
            engine.submit([(p, params) for p in prompts[5:]]),
        )
        got = await asyncio.gather(tokens_of(both[0], 5), tokens_of(both[1], 4))
        assert engine.status().finished == 9
        await asyncio.to_thread(engine.close, grace_s=1)
        assert not engine.status().alive
        with pytest.raises(EngineError, match="shutting down"):
            engine.submit([(prompts[0], params)])
        return got[0] + got[1]

    expected = generate(load_model(tiny, dtype=torch.float32, device="cpu"), prompts, params)
    assert asyncio.run(run()) == [g.ids for g in expected]


def test_cancel_ends_one_or_all(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        endless = SamplingParams(max_new_tokens=1000)
        stream = engine.submit(
            [([5, 6], endless), ([7, 8], endless), ([9], SamplingParams(max_new_tokens=3))]
        )
        finished = set()
        async for batch in stream:
            for index, event in batch:
                if event.finish_reason is not None:
                    finished.add(index)
                    stream.cancel(0)
                    stream.cancel()
        assert finished == {2}
        await until(lambda: engine.status().running == 0)
        assert engine.status().cancelled == 2
        await asyncio.to_thread(engine.close, grace_s=0)

    asyncio.run(run())


def test_bad_requests_and_a_full_line_are_refused_at_once(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny, max_waiting=2)
        for prompt, params in (([], SamplingParams()), ([1], SamplingParams(logit_bias={10**6: 1}))):
            with pytest.raises(UserError):
                engine.submit([(prompt, params)])
        with pytest.raises(EngineBusy):
            engine.submit([([5], SamplingParams())] * 3)
        assert engine.status().alive
        await asyncio.to_thread(engine.close, grace_s=0)

    asyncio.run(run())


def test_a_dead_engine_says_so_to_everyone(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        await until(lambda: engine.status().ready)
        stream = engine.submit([([5, 6], SamplingParams(max_new_tokens=900))])
        with torch.inference_mode():
            # A layer of a wrong size, as a stand-in for whatever may break in the model.
            engine._generator.model.model.norm = torch.nn.Linear(3, 3)  # type: ignore[union-attr,assignment]
        with pytest.raises(EngineError, match="the engine stopped"):
            await tokens_of(stream, 1)
        status = engine.status()
        assert (status.alive, status.ready) == (False, False)
        assert "mat1" in str(status.failure)
        with pytest.raises(EngineError, match="the engine stopped"):
            engine.submit([([5], SamplingParams())])

    asyncio.run(run())


def test_close_gives_running_requests_their_grace_and_then_ends_them(tiny: Path) -> None:
    async def run(grace_s: float, tokens: int) -> list[list[int]]:
        engine = make(tiny)
        await until(lambda: engine.status().ready)
        stream = engine.submit([([5, 6], SamplingParams(max_new_tokens=tokens))])
        closing = asyncio.create_task(asyncio.to_thread(engine.close, grace_s=grace_s))
        try:
            return await tokens_of(stream, 1)
        finally:
            await closing

    assert len(asyncio.run(run(30.0, 20))[0]) == 20
    with pytest.raises(EngineError, match="shutting down"):
        asyncio.run(run(0.0, 1000))
