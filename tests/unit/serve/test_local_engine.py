"""The engine's thread: streams, cancelling, failing, ending."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tests.make_run import stir
from tunesmith.core.errors import UserError
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import attach_lora, save_adapter
from tunesmith.model.generate import Generator, generate
from tunesmith.model.load import load_model
from tunesmith.model.requests import SamplingParams
from tunesmith.serve.engine import Ask, EngineBusy, EngineError
from tunesmith.serve.local_engine import LocalEngine, LocalStream

WARM_UP = [5, 6, 7]


def make(folder: Path, *, has_bank: bool = False, **options: int) -> LocalEngine:
    model = load_model(folder, dtype=torch.float32, device="cpu")
    generator = Generator(model, max_concurrent=4, bank=AdapterBank(model) if has_bank else None)
    engine = LocalEngine(generator, **options)
    assert not engine.status().ready
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
            engine.submit([Ask(p, params) for p in prompts[:5]]),
            engine.submit([Ask(p, params) for p in prompts[5:]]),
        )
        got = await asyncio.gather(tokens_of(both[0], 5), tokens_of(both[1], 4))
        assert engine.status().finished == 9
        await asyncio.to_thread(engine.close, grace_s=1)
        assert not engine.status().alive
        with pytest.raises(EngineError, match="shutting down"):
            engine.submit([Ask(prompts[0], params)])
        return got[0] + got[1]

    expected = generate(load_model(tiny, dtype=torch.float32, device="cpu"), prompts, params)
    assert asyncio.run(run()) == [g.ids for g in expected]


def test_cancel_ends_one_or_all(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        endless = SamplingParams(max_new_tokens=1000)
        stream = engine.submit(
            [Ask([5, 6], endless), Ask([7, 8], endless), Ask([9], SamplingParams(max_new_tokens=3))]
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
                engine.submit([Ask(prompt, params)])
        with pytest.raises(EngineBusy):
            engine.submit([Ask([5], SamplingParams())] * 3)
        assert engine.status().alive
        await asyncio.to_thread(engine.close, grace_s=0)

    asyncio.run(run())


def test_a_dead_engine_says_so_to_everyone(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        await until(lambda: engine.status().ready)
        stream = engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=900))])
        with torch.inference_mode():
            # A layer of a wrong kind, as a stand-in for whatever may break in the model.
            engine._generator.model.model.embed_tokens = torch.nn.Linear(3, 3)  # type: ignore[union-attr,assignment]
        with pytest.raises(EngineError, match="the engine stopped"):
            await tokens_of(stream, 1)
        status = engine.status()
        assert (status.alive, status.ready) == (False, False)
        assert "RuntimeError: " in str(status.failure)
        with pytest.raises(EngineError, match="the engine stopped"):
            engine.submit([Ask([5], SamplingParams())])

    asyncio.run(run())


def test_close_gives_running_requests_their_grace_and_then_ends_them(tiny: Path) -> None:
    async def run(grace_s: float, tokens: int) -> list[list[int]]:
        engine = make(tiny)
        await until(lambda: engine.status().ready)
        stream = engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=tokens))])
        closing = asyncio.create_task(asyncio.to_thread(engine.close, grace_s=grace_s))
        try:
            return await tokens_of(stream, 1)
        finally:
            await closing

    assert len(asyncio.run(run(30.0, 20))[0]) == 20
    with pytest.raises(EngineError, match="shutting down"):
        asyncio.run(run(0.0, 1000))


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    wrapped = attach_lora(
        load_model(tiny, dtype=torch.float32, device="cpu"),
        rank=4, alpha=8.0, dropout=0.0, targets="all-linear", rslora=False, seed=3,
    )  # fmt: skip
    stir(wrapped, std=0.2, seed=0, only="lora_B")
    save_adapter(wrapped, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_come_and_go_and_bad_ones_change_nothing(tiny: Path, adapter: Path) -> None:
    async def run() -> None:
        engine = make(tiny, has_bank=True)
        await engine.load_adapter("one", adapter)
        await engine.load_adapter("two", adapter)
        assert engine.status().adapters == ("one", "two")
        (adapter / "adapter_model.safetensors").write_bytes(b"no weights")
        with pytest.raises(UserError, match="damaged"):
            await engine.load_adapter("one", adapter)
        before = await tokens_of(engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=9), "one")]), 1)
        assert len(before[0]) == 9
        await engine.unload_adapter("two")
        for name in ("two", "three"):
            with pytest.raises(UserError, match=f"no adapter '{name}' is loaded") as caught:
                await engine.unload_adapter(name)
            assert caught.value.hint == "loaded: one"
            with pytest.raises(UserError, match=f"no adapter '{name}'"):
                engine.submit([Ask([5], SamplingParams(), name)])
            with pytest.raises(UserError, match=f"no adapter '{name}'"):
                await engine.embed([[5]], name)
        assert engine.status().adapters == ("one",)
        await asyncio.to_thread(engine.close, grace_s=5)

    asyncio.run(run())


def test_unloading_waits_for_those_who_use_it(tiny: Path, adapter: Path) -> None:
    async def run() -> None:
        engine = make(tiny, has_bank=True)
        bank = engine._generator.bank
        assert bank is not None
        await engine.load_adapter("one", adapter)
        params = SamplingParams(max_new_tokens=60)
        streams = [engine.submit([Ask([5, i], params, "one")]) for i in range(3)]
        going = asyncio.create_task(engine.unload_adapter("one"))
        streams[1].cancel()
        first = await tokens_of(streams[0], 1)
        assert len(first[0]) == 60
        assert len((await tokens_of(streams[2], 1))[0]) == 60
        await going
        assert bank.names == () and engine.status().cancelled == 1
        # The name is free again, also for many in a row while the last is in use.
        for i in range(4):
            await engine.load_adapter("one", adapter)
            streams.append(engine.submit([Ask([5, i], params, "one")]))
        for stream in streams[3:]:
            assert len((await tokens_of(stream, 1))[0]) == 60
        await until(lambda: len(bank.names) == 1)
        assert engine.status().adapters == ("one",)
        await asyncio.to_thread(engine.close, grace_s=5)

    asyncio.run(run())


def test_an_engine_without_a_bank_takes_no_adapters(tiny: Path, adapter: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        with pytest.raises(UserError, match="takes no adapters"):
            await engine.load_adapter("one", adapter)
        with pytest.raises(UserError, match="no adapter 'one' is loaded"):
            await engine.unload_adapter("one")
        await asyncio.to_thread(engine.close, grace_s=0)

    asyncio.run(run())


def test_embeddings_between_steps(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        stream = engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=30))])
        found = await engine.embed([[5, 6, 7], [8]])
        assert [round(sum(x * x for x in vector), 4) for vector in found] == [1.0, 1.0]
        assert await engine.embed([]) == []
        with pytest.raises(UserError, match="not in the vocabulary"):
            await engine.embed([[5], [10**6]])
        with pytest.raises(UserError, match="no tokens"):
            await engine.embed([[]])
        gone = asyncio.create_task(engine.embed([[5]] * 200))
        await asyncio.sleep(0)
        gone.cancel()
        assert (await engine.embed([[5, 6, 7]]))[0] == pytest.approx(found[0], abs=1e-5)
        assert len((await tokens_of(stream, 1))[0]) == 30
        await asyncio.to_thread(engine.close, grace_s=5)

    asyncio.run(run())


def test_the_counters_tell_what_was_computed(tiny: Path) -> None:
    async def run() -> None:
        engine = make(tiny)
        await until(lambda: engine.status().ready)
        before = engine.status()
        prompt = list(range(10, 60))
        for _ in range(2):
            await tokens_of(engine.submit([Ask(prompt, SamplingParams(max_new_tokens=4))]), 1)
        after = engine.status()
        assert after.prompt_tokens - before.prompt_tokens == 100
        assert 0 < after.cached_tokens < 50 and after.cache_tokens == 0 < after.cache_capacity
        await asyncio.to_thread(engine.close, grace_s=0)

    asyncio.run(run())


def test_whoever_waits_for_an_engine_that_ends_is_told(tiny: Path, adapter: Path) -> None:
    """Also those whose wishes the engine's thread has not read yet."""

    async def run() -> None:
        engine = make(tiny, has_bank=True)
        await engine.load_adapter("one", adapter)
        endless = engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=1000), "one")])
        waiting = [
            asyncio.create_task(engine.unload_adapter("one")),
            asyncio.create_task(engine.embed([[5]] * 1000)),
        ]
        await asyncio.sleep(0)
        engine._commands.put(engine._stop)
        late = engine.submit([Ask([7], SamplingParams())])
        for stream in (endless, late):
            with pytest.raises(EngineError, match="shutting down"):
                await tokens_of(stream, 1)
        for call in waiting:
            with pytest.raises(EngineError, match="shutting down"):
                await call
        with pytest.raises(EngineError):
            await engine.load_adapter("two", adapter)

    asyncio.run(run())
