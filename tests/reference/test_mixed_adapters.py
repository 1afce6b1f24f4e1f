"""Several adapters and the base in one batch: every answer is what transformers and peft give it alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.greedy import greedy
from tests.make_run import stir
from tests.reference.conftest import make_model
from tests.tiny_models import VOCAB
from tests.traffic import random_arrivals, run
from tunesmith.core.errors import UserError
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.generate import Generator
from tunesmith.model.load import load_model
from tunesmith.model.requests import SamplingParams
from tunesmith.model.served_weights import pack_weights
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.serve.engine import Ask
from tunesmith.serve.local_engine import LocalEngine, LocalStream

NEW_TOKENS = 12
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS, stop_ids=(2,))
SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "mixed": {
        "r": 5,
        "lora_alpha": 10,
        "target_modules": ["k_proj", "o_proj", "down_proj", "lm_head"],
        "rank_pattern": {"layers.1.mlp.down_proj": 9},
        "alpha_pattern": {"o_proj": 3},
    },
}
KINDS = ("llama-tied", "qwen2", "qwen3")


class Case:
    """A base, its adapters' folders, and the answers that each gives alone."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folders = {name: folder / name for name in (*SETTINGS, "small2")}
        for number, (name, path) in enumerate(self.folders.items()):
            self._write(path, SETTINGS[name.removesuffix("2")], number)
        self._alone: dict[str | None, Any] = {}

    def _write(self, path: Path, settings: dict[str, Any], seed: int) -> None:
        wrapped = get_peft_model(make_model(self.kind), LoraConfig(task_type="CAUSAL_LM", **settings))
        stir(wrapped, std=0.15, seed=seed, only="lora_")
        wrapped.save_pretrained(str(path))

    def alone(self, name: str | None, prompt: list[int]) -> list[int]:
        if name not in self._alone:
            model = make_model(self.kind)
            self._alone[name] = PeftModel.from_pretrained(model, str(self.folders[name])) if name else model
        return greedy(self._alone[name].eval(), prompt, NEW_TOKENS, pad_token_id=0)

    def generator(self, *, packed: bool = False, **options: Any) -> Generator:
        model = make_model(self.kind).eval()
        if packed:
            pack_weights(model, "fp32")
        return Generator(model, max_length=128, bank=AdapterBank(model), **options)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def make_prompts(count: int, *, seed: int) -> list[list[int]]:
    """Prompts of 3 to 70 tokens, every third with a beginning that others have too."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, VOCAB) for _ in range(40)]
    return [
        (shared if i % 3 == 0 else []) + [draw.randrange(3, VOCAB) for _ in range(draw.randrange(3, 31))]
        for i in range(count)
    ]


def test_the_adapters_answer_differently(case: Case) -> None:
    prompts, names = make_prompts(6, seed=5), (None, *case.folders)
    answers = {str([case.alone(name, prompt) for prompt in prompts]) for name in names}
    assert len(answers) == len(names)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("cache_tokens", [None, 200], ids=["roomy", "full"])
def test_mixed_batches_with_changes_in_between(case: Case, cache_tokens: int | None, packed: bool) -> None:
    """Requests arrive at any step; adapters come, go, and come anew under the name of others."""
    generator = case.generator(packed=packed, max_concurrent=7, prefill_tokens=24, cache_tokens=cache_tokens)
    bank, draw = generator.bank, random.Random(1)
    assert bank is not None
    bank.load("wide", case.folders["wide"])
    prompts = make_prompts(26, seed=2)
    asked: dict[int, tuple[str | None, list[int]]] = {}
    got: dict[int, list[int]] = {}
    meant: dict[str | None, str | None] = {None: None, "wide": "wide"}
    changes: dict[int, Callable[[], object]] = {
        6: lambda: bank.load("mixed", case.folders["mixed"]),
        10: lambda: bank.load("small", case.folders["small"]),
        20: lambda: None,
    }
    for number, prompt in enumerate(prompts):
        changes.get(number, lambda: None)()
        if number == 20:
            while generator.has_work:
                collect(generator, got)
            bank.unload("wide")
            bank.load("small", case.folders["small2"])
        meant = {None: None} | {name: name for name in bank.names}
        if number >= 20:
            meant["small"] = "small2"
        name = draw.choice(list(meant))
        # The same words with another adapter, whose keys must not be taken for this one's.
        asked[generator.add(prompt, PARAMS, adapter=name)] = (meant[name], prompt)
        asked[generator.add(prompt, PARAMS)] = (None, prompt)
        for _ in range(draw.randrange(4)):
            collect(generator, got)
    while generator.has_work:
        collect(generator, got)
    assert (generator.preempted > 0) is (cache_tokens is not None)
    assert generator.cached_tokens > 0
    for request, (name, prompt) in asked.items():
        assert got[request] == case.alone(name, prompt), (name, prompt)


def collect(generator: Generator, got: dict[int, list[int]]) -> None:
    for event in generator.step():
        if event.token_id is not None:
            got.setdefault(event.request_id, []).append(event.token_id)


async def answers_of(stream: LocalStream, count: int) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in range(count)]
    async for batch in stream:
        for index, event in batch:
            assert event.finish_reason != "error"
            if event.token_id is not None:
                got[index].append(event.token_id)
    return got


def test_an_engine_that_loads_and_unloads_while_it_answers(case: Case) -> None:
    async def run() -> None:
        engine = LocalEngine(case.generator(packed=True, max_concurrent=5))
        engine.start([5, 6, 7])
        await engine.load_adapter("wide", case.folders["wide"])
        await engine.load_adapter("small", case.folders["small"])
        prompts = make_prompts(12, seed=3)
        names = [None, "wide", "small"] * 4
        old = engine.submit([Ask(p, PARAMS, name) for p, name in zip(prompts, names, strict=True)])
        reading = asyncio.create_task(answers_of(old, 12))
        # Those above keep the adapters that they began with.
        await asyncio.gather(
            engine.load_adapter("small", case.folders["small2"]),
            engine.load_adapter("mixed", case.folders["mixed"]),
            leave(engine, "wide"),
        )
        new = engine.submit(
            [Ask(p, PARAMS, n) for p, n in zip(prompts, ["mixed", "small", None] * 4, strict=True)]
        )
        later = await answers_of(new, 12)
        for prompt, name, answer in zip(prompts, names, await reading, strict=True):
            assert answer == case.alone(name, prompt), (name, prompt)
        for prompt, name, answer in zip(prompts, ["mixed", "small2", None] * 4, later, strict=True):
            assert answer == case.alone(name, prompt), (name, prompt)
        await asyncio.to_thread(engine.close, grace_s=5)

    asyncio.run(run())


async def leave(engine: LocalEngine, name: str) -> None:
    """Unload; from the first moment on nobody new gets the adapter."""
    going = asyncio.create_task(engine.unload_adapter(name))
    await asyncio.sleep(0)
    with pytest.raises(UserError, match=f"no adapter '{name}' is loaded") as caught:
        engine.submit([Ask([5, 6], PARAMS, name)])
    assert "small" in str(caught.value.hint)
    await going


def test_embeddings_are_those_of_the_adapter(case: Case) -> None:
    async def run() -> list[list[list[float]]]:
        engine = LocalEngine(case.generator(packed=True))
        engine.start([5, 6, 7])
        await engine.load_adapter("wide", case.folders["wide"])
        busy = engine.submit([Ask(prompts[0], PARAMS, "wide")])
        found = await asyncio.gather(engine.embed(prompts), engine.embed(prompts, "wide"))
        await answers_of(busy, 1)
        await asyncio.to_thread(engine.close, grace_s=5)
        return list(found)

    prompts = make_prompts(3, seed=4)
    for name, found in zip((None, "wide"), asyncio.run(run()), strict=True):
        model = make_model(case.kind).eval()
        inner = PeftModel.from_pretrained(model, str(case.folders[name])).eval() if name else model
        for prompt, vector in zip(prompts, found, strict=True):
            with torch.inference_mode():
                hidden = inner.get_decoder()(torch.tensor([prompt])).last_hidden_state[0].mean(0)
            torch.testing.assert_close(torch.tensor(vector), hidden / hidden.norm(), rtol=0, atol=1e-5)


REAL: dict[str, dict[str, Any]] = {
    "everywhere": {"r": 4, "target_modules": "all-linear"},
    "outer": {"r": 11, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "inner": {
        "r": 16,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj": 2},
    },
}
BEGINNINGS = (
    "Below is an instruction that describes a task. Write a response that completes the request.\n\n",
    "You are a helpful assistant who answers in one short sentence and never asks back.\nQuestion: ",
    "",
)
TASKS = (
    "Name the capital of France and the river that flows through it.",
    "What is 17 times 3?",
    "Write a short poem about the sea at night.",
    "def fibonacci(n):",
    "Explain why the sky is blue to a child.",
    "List three fruits that are yellow:",
    "Once upon a time there was a small dragon who",
    "Translate to French: the cat sleeps under the table.",
)


def real_prompts(smol: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(smol)
    return [tokenizer(beginning + task).input_ids for task in TASKS for beginning in BEGINNINGS]


def tuned_model(smol: Path, folder: Path) -> PeftModel:
    """The real model with the adapters of REAL, all noise of a scale that changes answers; saved in `folder`."""
    model: Any = load_model(smol, dtype=torch.float32, device=torch.device("cpu")).eval()
    model.generation_config.eos_token_id = None  # the model would end many answers at once
    for seed, (name, settings) in enumerate(REAL.items()):
        config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **settings)
        model = get_peft_model(model, config, name) if not seed else model
        if seed:
            model.add_adapter(name, config)
        stir(model, std=0.05, seed=seed, only=f".{name}.")
    model.save_pretrained(str(folder))
    return model.eval()


def alone(tuned: PeftModel, name: str | None, prompt: list[int], count: int) -> list[int]:
    if name is None:
        with tuned.disable_adapter():
            return greedy(tuned, prompt, count)
    tuned.set_adapter(name)
    return greedy(tuned, prompt, count)


def likeliest(tuned: PeftModel, name: str | None, prompt: list[int], answer: list[int]) -> list[int]:
    """By peft's own logits, the likeliest token at each place of an answer: that of greedy search, if all are."""
    if not answer:
        return []
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    if name is not None:
        tuned.set_adapter(name)
    with torch.inference_mode(), tuned.disable_adapter() if name is None else nullcontext():
        return tuned(ids, logits_to_keep=len(answer)).logits[0].argmax(-1).tolist()


def test_a_real_model_with_adapters_of_other_ranks(smol: Path, tmp_path: Path) -> None:
    """Prompts that begin alike, at random times, some cancelled, in a cache too short for all."""
    tuned = tuned_model(smol, tmp_path)
    model: Any = load_model(smol, dtype=torch.float32, device=torch.device("cpu")).eval()
    pack_weights(model, "fp32")
    bank = AdapterBank(model)
    for name in REAL:
        bank.load(name, tmp_path / name)
    names = (None, *REAL)
    drawn = random_arrivals(real_prompts(smol), seed=6, new_tokens=(4, 20), cancelled=0.2, every=1)
    arrivals = [replace(arrival, adapter=names[(i % 3 + i // 6) % 4]) for i, arrival in enumerate(drawn)]
    mine = Generator(model, max_length=128, max_concurrent=8, prefill_tokens=32, cache_tokens=112, bank=bank)
    answers = run(mine, arrivals)
    assert mine.preempted > 0 and mine.cached_tokens > 0
    assert "cancelled" in {answer.finish_reason for answer in answers}
    for arrival, answer in zip(arrivals, answers, strict=True):
        if answer.finish_reason != "cancelled":
            assert len(answer.ids) == arrival.params.max_new_tokens
        assert answer.ids == likeliest(tuned, arrival.adapter, arrival.prompt, answer.ids)
    for arrival, answer in list(zip(arrivals, answers, strict=True))[::8]:
        expected = alone(tuned, arrival.adapter, arrival.prompt, len(answer.ids) or 1)
        assert answer.ids == expected[: len(answer.ids)], (arrival.adapter, arrival.prompt)
    prompt = arrivals[20].prompt
    assert len({tuple(alone(tuned, name, prompt, 20)) for name in names}) == len(names)
