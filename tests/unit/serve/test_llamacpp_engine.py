"""llama.cpp's real server behind our protocol, where one is installed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.model.generate import generate
from tunesmith.model.grammar import GrammarSpec
from tunesmith.model.limits import Limits
from tunesmith.model.load import load_model
from tunesmith.model.requests import SamplingParams
from tunesmith.model.sampling import logprobs_of
from tunesmith.serve.engine import Ask, EngineError
from tunesmith.serve.http_engine import HttpEngine
from tunesmith.serve.llamacpp_engine import LlamaCppDriver, _parts, _slashed
from tunesmith.serve.text import Detokenizer
from tunesmith.workflows.engines import llama_server
from tunesmith.workflows.export_gguf import export_gguf

LENGTH = 512


def program() -> list[str]:
    try:
        return llama_server()
    except UserError as error:
        pytest.skip(str(error))


def make(gguf: Path, tokenizer_folder: Path, log: Path, **more: object) -> HttpEngine:
    detokenizer = Detokenizer(AutoTokenizer.from_pretrained(tokenizer_folder))
    driver = LlamaCppDriver(program(), gguf, detokenizer, LENGTH, slots=3, threads=1, **more)  # type: ignore[arg-type]
    limits = Limits(LENGTH, len(detokenizer.tokenizer))
    return HttpEngine(driver, probe=[5, 6, 7], limits=limits, log=log, max_concurrent=3)


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program()
    done = export_gguf(str(tiny), quant="f32", output=tmp_path_factory.mktemp("gguf") / "tiny")
    return next(done.folder.glob("*.gguf"))


@pytest.fixture(scope="module")
def engine(gguf: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpEngine]:
    made = make(gguf, tiny, tmp_path_factory.mktemp("log") / "server.log")
    made.start()
    yield made
    made.close(grace_s=0)
    assert not made.status().alive and made._process.poll() is not None


def answers(engine: HttpEngine, asks: list[Ask]) -> list[tuple[list[int], str, list[object]]]:
    async def run() -> list[tuple[list[int], str, list[object]]]:
        got: list[tuple[list[int], list[str], list[object]]] = [([], [], []) for _ in asks]
        async for batch in engine.submit(asks):
            for index, event in batch:
                if event.token_id is not None:
                    got[index][0].append(event.token_id)
                    got[index][2].append(event.logprobs)
                if event.finish_reason is not None:
                    got[index][1].append(event.finish_reason)
        assert all(len(ends) == 1 for _, ends, _ in got)
        return [(ids, ends[0], logprobs) for ids, ends, logprobs in got]

    return asyncio.run(run())


def test_greedy_answers_equal_ours(engine: HttpEngine, tiny: Path) -> None:
    chance = random.Random(3)
    prompts = [[chance.randrange(17, 49152) for _ in range(chance.randint(1, 40))] for _ in range(8)]
    params = SamplingParams(max_new_tokens=24)
    expected = generate(load_model(tiny, dtype=torch.float32, device="cpu"), prompts, params)
    got = answers(engine, [Ask(prompt, params) for prompt in prompts])
    assert [(ids, end) for ids, end, _ in got] == [(one.ids, "length") for one in expected]
    assert engine.status().generated_tokens >= 8 * 24 and engine.status().running == 0


def test_stop_ids_end_the_answer(engine: HttpEngine, tiny: Path) -> None:
    prompt = [100, 200, 300]
    free = answers(engine, [Ask(prompt, SamplingParams(max_new_tokens=8))])[0][0]
    stop = free[4]
    ids, end, _ = answers(engine, [Ask(prompt, SamplingParams(max_new_tokens=8, stop_ids=(stop,)))])[0]
    assert (ids, end) == (free[: free.index(stop) + 1], "stop")
    assert answers(engine, [Ask(prompt, SamplingParams(max_new_tokens=0))])[0][:2] == ([], "length")


def test_characters_of_several_tokens_lose_none(engine: HttpEngine, tiny: Path) -> None:
    """llama-server's stream names only the last token of a character; a bias makes such characters."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    cat = tokenizer("🐱", add_special_tokens=False).input_ids
    assert len(cat) == 3
    bias = dict.fromkeys(cat, 60.0)
    for count in (6, 7, 8, 24):
        params = SamplingParams(max_new_tokens=count, logit_bias=bias, logprobs=3)
        model = load_model(tiny, dtype=torch.float32, device="cpu")
        expected = generate(model, [[400, 500]], params)[0]
        ids, end, logprobs = answers(engine, [Ask([400, 500], params)])[0]
        assert (ids, end) == (expected.ids, "length")
        for found, wanted in zip(logprobs, expected.logprobs, strict=True):
            assert found.token_id == wanted.token_id
            assert found.logprob == pytest.approx(wanted.logprob, abs=2e-3)
            assert [i for i, _ in found.top] == [i for i, _ in wanted.top]


def test_bytes_that_are_no_characters_are_counted(engine: HttpEngine, tiny: Path) -> None:
    detokenizer = Detokenizer(AutoTokenizer.from_pretrained(tiny))
    heads = [n for n in range(17, 400) if detokenizer.piece(n)[1][0] >= 0xE0][:4]
    bias = dict.fromkeys(heads, 60.0)
    greedy = SamplingParams(max_new_tokens=9, logit_bias=bias)
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    assert answers(engine, [Ask([50], greedy)])[0][0] == generate(model, [[50]], greedy)[0].ids
    drawn = SamplingParams(max_new_tokens=9, logit_bias=bias, temperature=1.0, seed=1)
    ids, end, _ = answers(engine, [Ask([50], drawn)])[0]
    assert (len(ids), end) == (9, "length")


def test_logprobs_are_the_models(engine: HttpEngine, tiny: Path) -> None:
    prompt = [900, 901, 902]
    ids, _, logprobs = answers(engine, [Ask(prompt, SamplingParams(max_new_tokens=5, logprobs=4))])[0]
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    for found, wanted in zip(logprobs, logprobs_of(logits, ids, 4), strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=2e-3)
        assert [i for i, _ in found.top] == [i for i, _ in wanted.top]


def test_repetition_penalty_is_ours(engine: HttpEngine, tiny: Path) -> None:
    params = SamplingParams(max_new_tokens=16, repetition_penalty=1.3)
    expected = generate(load_model(tiny, dtype=torch.float32, device="cpu"), [[7, 7, 9]], params)[0]
    assert answers(engine, [Ask([7, 7, 9], params)])[0][0] == expected.ids
    with pytest.raises(UserError, match="another order"):
        answers(engine, [Ask([7], SamplingParams(repetition_penalty=1.3, logit_bias={5: 1.0}))])


def test_seeds_repeat_and_differ(engine: HttpEngine) -> None:
    def once(seed: int | None) -> list[int]:
        params = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
        return answers(engine, [Ask([7, 8, 9], params)])[0][0]

    assert once(5) == once(5) != once(6)
    assert once(None) != once(None)


def test_json_schema_and_choice(engine: HttpEngine, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    for grammar, good in (
        (GrammarSpec("json_schema", json.dumps(schema)), lambda text: json.loads(text)["a"] in ("x", "y")),
        (GrammarSpec("choice", '["yes/no", "a \\"b\\""]'), lambda text: text in ("yes/no", 'a "b"')),
    ):
        params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=1, grammar=grammar, stop_ids=(2, 0))
        ids, end, _ = answers(engine, [Ask([300], params)])[0]
        assert end == "stop" and good(tokenizer.decode(ids, skip_special_tokens=True)), tokenizer.decode(ids)


def test_regex_where_the_build_has_llguidance(engine: HttpEngine, tiny: Path) -> None:
    params = SamplingParams(
        max_new_tokens=20, grammar=GrammarSpec("regex", r"[0-9]{2}/[0-9]{2}"), stop_ids=(2, 0)
    )
    if not engine._driver._knows_llguidance:
        with pytest.raises(UserError, match="without llguidance"):
            answers(engine, [Ask([300], params)])
        return
    ids, end, _ = answers(engine, [Ask([300], params)])[0]
    text = AutoTokenizer.from_pretrained(tiny).decode(ids, skip_special_tokens=True)
    assert end == "stop" and len(text) == 5 and text[2] == "/" and (text[:2] + text[3:]).isdigit()


def test_what_it_cannot_do_is_refused(engine: HttpEngine, tmp_path: Path) -> None:
    async def run() -> None:
        for params, why in (
            (SamplingParams(prompt_logprobs=1), "log-probabilities of the prompt"),
            (SamplingParams(presence_penalty=0.5), "counts the prompt's tokens"),
        ):
            with pytest.raises(UserError, match=why):
                engine.submit([Ask([1], params)])
        with pytest.raises(UserError, match="no adapter 'nobody' is loaded"):
            engine.submit([Ask([1], SamplingParams(), "nobody")])
        with pytest.raises(UserError, match="vocabulary"):
            engine.submit([Ask([10**6], SamplingParams())])
        with pytest.raises(UserError, match="at the start"):
            await engine.load_adapter("a", tmp_path)
        with pytest.raises(UserError, match="embeddings"):
            await engine.embed([[1]])

    asyncio.run(run())


def test_cancelled_answers_free_their_slots(engine: HttpEngine) -> None:
    async def run() -> None:
        endless = SamplingParams(max_new_tokens=LENGTH - 10)
        stream = engine.submit([Ask([5, 6], endless)] * 3)
        async for _ in stream:
            stream.cancel()
        short = engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=2))])
        async with asyncio.timeout(60):
            async for _ in short:
                pass
        assert engine.status().running == 0

    before = engine.status().cancelled
    asyncio.run(run())
    assert engine.status().cancelled == before + 3


def test_a_killed_server_is_started_again(gguf: Path, tiny: Path, tmp_path: Path) -> None:
    engine = make(gguf, tiny, tmp_path / "log")
    engine.start()
    try:

        async def run() -> None:
            stream = engine.submit([Ask([5, 6], SamplingParams(max_new_tokens=LENGTH - 10))])
            with pytest.raises(EngineError, match="did not answer"):
                async for _ in stream:
                    os.kill(engine.pid, signal.SIGKILL)

        asyncio.run(run())
        end = time.monotonic() + 60
        while not (engine.status().ready and engine.status().restarts) and time.monotonic() < end:
            time.sleep(0.05)
        assert engine.status().restarts == 1 and engine.status().alive
        assert len(answers(engine, [Ask([5, 6], SamplingParams(max_new_tokens=3))])[0][0]) == 3
    finally:
        threading.Thread(target=lambda: engine.close(grace_s=0)).run()
    with pytest.raises(EngineError, match="shutting down"):
        answers(engine, [Ask([5, 6], SamplingParams())])


def test_a_file_that_does_not_load_says_why(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    engine = make(tmp_path / "bad.gguf", tiny, tmp_path / "log")
    with pytest.raises(TunesmithError, match="llama-server"):
        engine.start()
    assert not engine.status().alive
    engine.close(grace_s=0)


def test_some_token_shows_as_no_character(tiny: Path) -> None:
    """SmolLM2's vocabulary has no token for the byte 0xFF."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    driver = LlamaCppDriver(["llama-server"], tiny, Detokenizer(tokenizer), LENGTH)
    assert b"\xff" not in driver._by_bytes
    assert tokenizer.decode([driver._no_character]) == "\ufffd"


def test_bytes_are_split_into_as_many_tokens_as_there_were() -> None:
    table = {b"a": 1, b"ab": 2, b"b": 3, b"c": 4}
    assert _parts(b"abc", 2, table) == [2, 4]
    assert _parts(b"abc", 3, table) == [1, 3, 4]
    assert _parts(b"abc", 1, table) is None and _parts(b"", 0, table) == []


def test_slashes_in_patterns() -> None:
    assert _slashed("a/b") == r"a\/b" and _slashed(r"a\/b") == r"a\/b" and _slashed(r"\\/") == r"\\\/"
