"""The vLLM driver against recorded behaviour (recorded_vllm.py is not vLLM), and the plan's arithmetic."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.serve import recorded_vllm as recorded
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.net import EventClient
from tunesmith.model.grammar import GrammarSpec
from tunesmith.model.limits import Limits
from tunesmith.model.requests import SamplingParams, TokenEvent
from tunesmith.serve.engine import Ask, EngineBusy, EngineError
from tunesmith.serve.http_engine import HttpEngine
from tunesmith.serve.vllm_engine import GIB, VllmDriver, VllmPlan, lora_rank, plan_vllm

PROGRAM = [sys.executable, str(recorded.__file__)]
PLAN = VllmPlan(64, 4, max_lora_rank=16)


def make(tmp_path: Path, plan: VllmPlan = PLAN, *, extra: tuple[str, ...] = (), **more: int) -> HttpEngine:
    driver = VllmDriver(PROGRAM, tmp_path, plan, extra=extra)
    log = tmp_path / "vllm.log"
    return HttpEngine(driver, probe=[1], limits=Limits(64, 1000), log=log, max_concurrent=4, **more)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpEngine]:
    made = make(tmp_path_factory.mktemp("vllm"))
    made.start()
    yield made
    made.close(grace_s=0)


async def events(engine: HttpEngine, *asks: Ask) -> list[list[TokenEvent]]:
    got: list[list[TokenEvent]] = [[] for _ in asks]
    async for batch in engine.submit(asks):
        for index, event in batch:
            got[index].append(event)
    return got


def expected(token: int, count: int, model: str = recorded.BASE) -> list[int]:
    found = []
    for _ in range(count):
        token = recorded.next_token(token, model)
        found.append(token)
    return found


def test_tokens_come_with_one_end_each(engine: HttpEngine) -> None:
    ends = expected(7, 9)
    asks = [
        Ask([7], SamplingParams(max_new_tokens=9)),
        Ask([7], SamplingParams(max_new_tokens=9, stop_ids=(ends[3],))),
        Ask([7], SamplingParams(max_new_tokens=0)),
    ]
    plain, stopped, nothing = asyncio.run(events(engine, *asks))
    assert [event.token_id for event in plain] == ends
    assert [event.finish_reason for event in plain] == [None] * 8 + ["length"]
    assert [event.token_id for event in stopped] == ends[:4] and stopped[-1].finish_reason == "stop"
    assert [(event.token_id, event.finish_reason) for event in nothing] == [(None, "length")]


def test_logprobs_of_answer_and_prompt(engine: HttpEngine) -> None:
    ask = Ask([5, 6, 8], SamplingParams(max_new_tokens=3, logprobs=2, prompt_logprobs=1))
    (found,) = asyncio.run(events(engine, ask))
    first = found[0].logprobs
    assert first is not None and first.token_id == expected(8, 1)[0] and first.logprob == -1.5
    assert first.top == ((first.token_id, -1.5), (first.token_id + 1, -2.0))
    prompt = found[0].prompt_logprobs
    assert prompt is not None and [one.token_id for one in prompt] == [6, 8]
    assert len(prompt[0].top) == 1 and found[1].prompt_logprobs is None
    (streamed,) = asyncio.run(events(engine, Ask([8], SamplingParams(max_new_tokens=3, logprobs=0))))
    assert [event.logprobs.top for event in streamed if event.logprobs] == [()] * 3


def test_everything_asked_is_sent(engine: HttpEngine) -> None:
    params = SamplingParams(
        max_new_tokens=1, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop_ids=(2,), presence_penalty=0.1,
        frequency_penalty=0.2, logit_bias={4: 1.5}, grammar=GrammarSpec("regex", "[0-9]+"),
    )  # fmt: skip

    async def sent() -> dict[str, object]:
        await events(engine, Ask([1, 2], params))
        client = EventClient(engine._url, api_key=engine._key)
        seen = await client.get("/seen")
        await client.close()
        return dict(seen[-1])

    body = asyncio.run(sent())
    wanted = {
        "model": "base", "prompt": [1, 2], "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3,
        "stop_token_ids": [2], "ignore_eos": True, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repetition_penalty": 1.0, "logit_bias": {"4": 1.5}, "structured_outputs": {"regex": "[0-9]+"},
        "return_token_ids": True, "stream": True,
    }  # fmt: skip
    assert {name: body[name] for name in wanted} == wanted


def adapter(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8} | config))
    return folder


def test_adapters_come_and_go(engine: HttpEngine, tmp_path: Path) -> None:
    async def run() -> None:
        await engine.load_adapter("tuned", adapter(tmp_path / "a"))
        await engine.load_adapter("tuned", adapter(tmp_path / "b"))
        assert engine.status().adapters == ("tuned",)
        params = SamplingParams(max_new_tokens=4)
        tuned, base = await events(engine, Ask([7], params, "tuned"), Ask([7], params))
        assert [event.token_id for event in tuned] == expected(7, 4, "tuned")
        assert [event.token_id for event in base] == expected(7, 4)
        await engine.unload_adapter("tuned")
        assert engine.status().adapters == ()
        with pytest.raises(UserError, match="no adapter 'tuned' is loaded"):
            engine.submit([Ask([7], params, "tuned")])
        with pytest.raises(UserError, match="no adapter 'tuned' is loaded"):
            await engine.unload_adapter("tuned")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("config", "why"),
    [({"r": 64}, "rank 64 is above the 16"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
)
def test_adapters_that_vllm_refuses(
    config: dict[str, object], why: str, engine: HttpEngine, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why):
        asyncio.run(engine.load_adapter("bad", adapter(tmp_path / "bad", **config)))
    with pytest.raises(UserError, match="holds no adapter_config"):
        asyncio.run(engine.load_adapter("bad", tmp_path))
    with pytest.raises(UserError, match="cannot be called 'base'"):
        asyncio.run(engine.load_adapter("base", tmp_path / "bad"))


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    """The recorded model adds the length of the adapter's name modulo 1000."""
    name, folder = "x" * recorded.VOCAB, adapter(tmp_path / "a")
    driver = VllmDriver(PROGRAM, tmp_path, PLAN, adapters_at_start={name: folder})
    log = tmp_path / "log"
    engine = HttpEngine(driver, probe=[1], limits=Limits(64, 1000), log=log, max_concurrent=4)
    with pytest.raises(UserError, match="answers as the base model does"):
        engine.start()
    assert not engine.status().alive
    engine = make(tmp_path)
    engine.start()
    try:
        with pytest.raises(UserError, match="answers as the base model does"):
            asyncio.run(engine.load_adapter(name, folder))
        assert engine.status().adapters == ()
    finally:
        engine.close(grace_s=0)


def test_a_refused_request_is_the_users_an_aborted_one_is_not(engine: HttpEngine) -> None:
    with pytest.raises(UserError, match="maximum context length"):
        asyncio.run(events(engine, Ask([1] * 60, SamplingParams(max_new_tokens=10))))
    with pytest.raises(EngineError, match="abort"):
        asyncio.run(events(engine, Ask([999], SamplingParams(max_new_tokens=3))))
    with pytest.raises(UserError, match="-100 to 100"):
        asyncio.run(events(engine, Ask([1], SamplingParams(logit_bias={1: 500.0}))))
    assert engine.status().running == 0


def test_cancel_closes_the_connection_and_a_full_line_is_busy(tmp_path: Path) -> None:
    engine = make(tmp_path, extra=("--delay-s", "0.05"), max_waiting=1)
    engine.start()

    async def run() -> None:
        params = SamplingParams(max_new_tokens=60)
        stream = engine.submit([Ask([1], params)] * 5)
        await asyncio.sleep(0.1)
        assert (engine.status().running, engine.status().waiting) == (4, 1)
        with pytest.raises(EngineBusy):
            engine.submit([Ask([1], params)])
        async for _ in stream:
            stream.cancel()
        await asyncio.sleep(0.1)
        assert engine.status().running == 0 and engine.status().cancelled == 5

    try:
        asyncio.run(run())
    finally:
        engine.close(grace_s=0)


def test_a_crash_ends_answers_and_brings_it_back_with_its_adapters(tmp_path: Path) -> None:
    engine = make(tmp_path, extra=("--delay-s", "0.05"))
    engine.start()

    async def crash() -> None:
        await engine.load_adapter("tuned", adapter(tmp_path / "a"))
        with pytest.raises(EngineError, match="did not answer"):
            async for _ in engine.submit([Ask([1], SamplingParams(max_new_tokens=60))]):
                os.kill(engine.pid or 0, signal.SIGKILL)

    try:
        asyncio.run(crash())
        end = time.monotonic() + 60
        while not (engine.status().restarts and engine.status().ready) and time.monotonic() < end:
            time.sleep(0.02)
        assert engine.status().restarts == 1
        (found,) = asyncio.run(events(engine, Ask([7], SamplingParams(max_new_tokens=2), "tuned")))
        assert [event.token_id for event in found] == expected(7, 2, "tuned")
    finally:
        engine.close(grace_s=0)
    assert not engine.status().alive


def test_a_program_that_does_not_start_says_why(tmp_path: Path) -> None:
    driver = VllmDriver(PROGRAM, tmp_path / "nothing", PLAN)
    engine = HttpEngine(driver, probe=[1], limits=Limits(64, 1000), log=tmp_path / "log", max_concurrent=4)
    with pytest.raises(TunesmithError, match=r"ended with code 1:\n[\s\S]*is not a local folder"):
        engine.start()
    with pytest.raises(EngineError, match="is not a local folder"):
        asyncio.run(events(engine, Ask([1], SamplingParams())))


def test_the_key_is_no_argument(tmp_path: Path) -> None:
    command = VllmDriver(["vllm"], tmp_path, PLAN).command(8123, "secret")
    assert not any("secret" in argument for argument in command.args)
    assert command.env["VLLM_API_KEY"] == "secret" and command.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    text = " ".join(command.args)
    assert text.startswith(f"vllm serve {tmp_path} --host 127.0.0.1 --port 8123")
    assert "--generation-config vllm" in text and "--enable-lora --max-lora-rank 16" in text
    image = VllmDriver([], tmp_path, PLAN, container="vllm/vllm-openai:v0.32.0").command(8123, "secret")
    text = " ".join(image.args)
    assert "--publish 127.0.0.1:8123:8000" in text and "--env VLLM_API_KEY" in text
    assert f"--volume {tmp_path}:{tmp_path}:ro" in text and "secret" not in text


def test_the_plan_fits_the_card() -> None:
    args = {"weight_bytes": 3 * GIB, "kv_bytes_per_token": 2**17, "max_length": 4090, "max_concurrent": 8}
    plan = plan_vllm(**args, gpu_bytes=24 * GIB)
    assert plan.gpu_memory_utilization == 0.4166  # (3 + 3 + 8 * 0.5) / 24, rounded down; blocks of 16 tokens
    known = plan_vllm(**args, gpu_bytes=24 * GIB, other_bytes=GIB)
    assert known.gpu_memory_utilization == 0.3333  # (3 + 1 + 8 * 0.5) / 24
    full = plan_vllm(**args | {"max_concurrent": 500}, gpu_bytes=24 * GIB)
    assert full.gpu_memory_utilization in (0.9199, 0.92)
    assert full.max_lora_rank is None and "--enable-lora" not in full.args()
    with pytest.raises(
        UserError, match=r"3\.0 GiB of work space .* need 6\.5 GiB; of the card 6\.2 GiB"
    ) as error:
        plan_vllm(**args, gpu_bytes=24 * GIB, free_gpu_bytes=int(6.2 * GIB))
    assert "--max-length 1632" in str(error.value)  # 0.2 GiB are 1638 tokens, and 102 blocks
    on_cpu = plan_vllm(**args, max_lora_rank=32)
    assert (on_cpu.gpu_memory_utilization, on_cpu.kv_cache_gib, on_cpu.max_lora_rank) == (None, 4, 32)
    assert lora_rank(16) == 16 and lora_rank(17) == 32
    with pytest.raises(UserError, match="rank 900"):
        lora_rank(900)
