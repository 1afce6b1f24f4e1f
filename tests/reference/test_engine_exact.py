"""Whatever else a generator computes, and however short its cache: the answer is the one of transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.greedy import greedy
from tests.tiny_models import FAMILIES, VOCAB, make, prompts_of
from tests.traffic import Answer, Arrival, random_arrivals, related_prompts, run
from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.generate import Generator, generate
from tunesmith.model.grammar import Grammars, GrammarSpec
from tunesmith.model.requests import SamplingParams

# Room for one or two of the longest requests below: with more of them running, some must give way.
SHORT = 176


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make()


def generator(model: Any, *, kernels: bool = True, **options: Any) -> Generator:
    """kernels False: attention by torch's operations, as on a machine without a compiler."""
    made = Generator(copy.deepcopy(model), **options)
    if not kernels:
        made._cache.kernels = None
    return made


def assert_greedy(model: Any, arrivals: list[Arrival], answers: list[Answer]) -> None:
    for arrival, answer in zip(arrivals, answers, strict=True):
        expected = greedy(model, arrival.prompt, arrival.params.max_new_tokens, pad_token_id=0)
        if answer.finish_reason == "cancelled":
            expected = expected[: len(answer.ids)]
        assert answer.ids == expected


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_traffic_in_a_short_cache_equals_transformers(family: str, kernels: bool) -> None:
    plain = make(family)
    prompts = related_prompts(24, seed=list(FAMILIES).index(family), vocabulary=VOCAB, longest=90)
    arrivals = random_arrivals(prompts, seed=1, new_tokens=(1, 40), cancelled=0.2)
    mine = generator(plain, kernels=kernels, max_concurrent=6, prefill_tokens=32, cache_tokens=SHORT)
    answers = run(mine, arrivals)
    assert_greedy(plain, arrivals, answers)
    assert mine.preempted > 0
    assert mine.cached_tokens > 0
    assert "cancelled" in {answer.finish_reason for answer in answers}


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_lengths_far_apart_in_one_batch_equal_transformers(model: PreTrainedModel, kernels: bool) -> None:
    lengths = (1, 1000, 16, 17, 300, 2, 310, 64, 290, 1001)
    arrivals = [Arrival(0, prompt, SamplingParams(max_new_tokens=12)) for prompt in prompts_of(*lengths)]
    answers = run(generator(model, kernels=kernels, max_concurrent=16), arrivals)
    assert_greedy(model, arrivals, answers)


def sampled(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            max_new_tokens=30,
            temperature=0.5 + number % 4 / 4,
            top_p=1 - number % 3 / 10,
            seed=number,
            frequency_penalty=number % 2 / 2,
            repetition_penalty=1 + number % 3 / 10,
        )
        for number in range(count)
    ]


def test_sampled_answers_do_not_depend_on_preemption_or_cached_pages(model: PreTrainedModel) -> None:
    prompts = related_prompts(16, seed=3, vocabulary=VOCAB, longest=60)
    arrivals = [
        Arrival(at, prompt, params)
        for at, (prompt, params) in enumerate(zip(prompts, sampled(16), strict=True))
    ]
    roomy, short = (generator(model, max_concurrent=8, cache_tokens=size) for size in (8192, SHORT))
    expected = [generate(copy.deepcopy(model), [a.prompt], a.params)[0].ids for a in arrivals]
    assert [answer.ids for answer in run(roomy, arrivals)] == expected
    assert [answer.ids for answer in run(short, arrivals)] == expected
    assert short.preempted > 0 == roomy.preempted


def test_an_answer_with_a_grammar_goes_on_where_it_was(tiny: Path) -> None:
    """The grammar's place, like the random numbers, is the request's own and outlives its pages."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    grammars = Grammars(tokenizer, model.config.vocab_size, [tokenizer.eos_token_id])
    spec = GrammarSpec("regex", "([a-z]{3} [0-9]{2}, ){12}end")
    prompts = related_prompts(6, seed=5, vocabulary=1000, longest=40)
    stop_ids = (tokenizer.eos_token_id,)
    arrivals = [
        Arrival(
            number,
            prompt,
            SamplingParams(max_new_tokens=100, temperature=1.0, seed=number, grammar=spec, stop_ids=stop_ids),
        )
        for number, prompt in enumerate(prompts)
    ]
    roomy, short = (
        generator(model, max_concurrent=6, cache_tokens=size, grammars=grammars) for size in (8192, SHORT)
    )
    expected = run(roomy, arrivals)
    got = run(short, arrivals)
    assert [answer.ids for answer in got] == [answer.ids for answer in expected]
    assert short.preempted > 0
    assert {answer.finish_reason for answer in got} == {"stop"}
    for answer in got:
        assert tokenizer.decode(answer.ids, skip_special_tokens=True).endswith("end")


def test_prompt_logprobs_are_complete_whatever_the_cache_knows(model: PreTrainedModel) -> None:
    """The second prompt loses its pages halfway; the third begins as the second, whose pages are known."""
    elder, prompt = prompts_of(30, 100)
    wanted = SamplingParams(max_new_tokens=20, prompt_logprobs=2)
    arrivals = [
        Arrival(0, elder, SamplingParams(max_new_tokens=70)),
        Arrival(1, prompt, wanted),
        Arrival(90, [*prompt, 5, 6], wanted),
    ]
    mine = generator(model, prefill_tokens=4, cache_tokens=160)
    answers = run(mine, arrivals)
    assert_greedy(model, arrivals, answers)
    assert (mine.preempted, mine.cached_tokens) == (1, 0)
    for arrival, answer in zip(arrivals[1:], answers[1:], strict=True):
        [found] = [e.prompt_logprobs for e in answer.events if e.prompt_logprobs is not None]
        assert [f.token_id for f in found] == arrival.prompt[1:]
        with torch.inference_mode():
            table = model(torch.tensor([arrival.prompt])).logits[0].log_softmax(-1)
        expected = table[:-1].gather(1, torch.tensor(arrival.prompt)[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([f.logprob for f in found]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_pages_of_a_broken_request_spoil_no_other(model: PreTrainedModel, kernels: bool) -> None:
    """NaN of failed and of cancelled requests lies in pages that others then take for themselves."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[9] = math.nan
    good = [[t if t != 9 else 10 for t in prompt] for prompt in prompts_of(20, 3, 40, 17, 33, 8)]
    params = SamplingParams(max_new_tokens=20)
    bad = [Arrival(at, [9] * 70, params) for at in (0, 6, 12)]
    arrivals = [*bad, *(Arrival(at, prompt, params) for at, prompt in enumerate(good))]
    mine = generator(broken, kernels=kernels, max_concurrent=3, prefill_tokens=16, cache_tokens=128)
    unfinished = mine.add([9] * 100, params)
    mine.step()
    mine.cancel(unfinished)
    assert [event.finish_reason for event in mine.step()] == ["cancelled"]
    answers = run(mine, sorted(arrivals, key=lambda arrival: arrival.at))
    ends = sorted(str(answer.finish_reason) for answer in answers)
    assert ends == ["error"] * 3 + ["length"] * 6
    for arrival, answer in zip(sorted(arrivals, key=lambda arrival: arrival.at), answers, strict=True):
        if answer.finish_reason == "length":
            assert answer.ids == greedy(model, arrival.prompt, 20, pad_token_id=0)


def test_a_failed_prompt_is_not_kept_as_a_beginning_for_others(model: PreTrainedModel) -> None:
    mine = generator(model, max_concurrent=1)
    embeddings: Any = attention.unwrapped(mine.model).get_input_embeddings()
    [prompt] = prompts_of(50)
    before = embeddings.weight[prompt[0]].clone()
    with torch.no_grad():
        embeddings.weight[prompt[0]] = math.nan
    arrivals = [Arrival(0, prompt, SamplingParams(max_new_tokens=5))]
    assert run(mine, arrivals)[0].finish_reason == "error"
    with torch.no_grad():
        embeddings.weight[prompt[0]] = before
    assert_greedy(model, arrivals, run(mine, arrivals))
    assert mine.cached_tokens == 0


def test_a_request_larger_than_the_cache_is_refused_and_counters_say_what_happened(
    model: PreTrainedModel,
) -> None:
    mine = generator(model, cache_tokens=60)
    assert (mine.cache_capacity, mine.cache_tokens_used) == (64, 0)
    [prompt] = prompts_of(50)
    with pytest.raises(UserError, match="room for 64"):
        mine.add(prompt, SamplingParams(max_new_tokens=16))
    for cached in (0, 48):
        mine.add(prompt, SamplingParams(max_new_tokens=15))
        [first] = mine.step()
        assert (first.cached_tokens, mine.cache_tokens_used) == (cached, 64)
        while mine.has_work:
            [event] = mine.step()
            assert event.cached_tokens == 0
    assert (mine.prompt_tokens, mine.cached_tokens, mine.preempted) == (100, 48, 0)


def test_embeddings_are_the_mean_of_transformers_final_states(model: PreTrainedModel) -> None:
    prompts = prompts_of(1, 30, 200)
    got = torch.tensor(generator(model).embed(prompts))
    for prompt, found in zip(prompts, got, strict=True):
        with torch.inference_mode():
            hidden = model.model(torch.tensor([prompt])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="no tokens"):
        generator(model).embed([[]])


@pytest.mark.slow
def test_varied_prompts_of_a_real_model_equal_transformers(smol: Path, whole: bool) -> None:
    """Each token of each answer is the likeliest by transformers' own logits for what precedes it.

    Of 29 prompts; with --whole, of 200.
    """
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    prompts = varied_prompts(AutoTokenizer.from_pretrained(smol))[:: 1 if whole else 7]
    arrivals = random_arrivals(prompts, seed=7, new_tokens=(1, 5), cancelled=0.1, every=1)
    for number in range(0, len(prompts), 50):
        for arrival in arrivals[number : number + 4]:
            arrival.params, arrival.until = SamplingParams(max_new_tokens=36), None
    mine = generator(model, max_concurrent=12, prefill_tokens=64, cache_tokens=128)
    answers = run(mine, arrivals)
    assert mine.preempted > 0
    assert mine.cached_tokens > 0
    assert len({tuple(answer.ids) for answer in answers}) > len(prompts) / 2
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(
                torch.tensor([[*prompt, *answer.ids[:-1]]]), logits_to_keep=len(answer.ids)
            ).logits[0]
        assert answer.ids == logits.argmax(-1).tolist()
    for arrival, answer in list(zip(arrivals, answers, strict=True))[::15]:
        # transformers ends at a stop token, which is none of ours.
        expected = greedy(model, arrival.prompt, arrival.params.max_new_tokens)[: len(answer.ids)]
        assert answer.ids[: len(expected)] == expected


def varied_prompts(tokenizer: Any) -> list[list[int]]:
    """200 short prompts of several kinds; many begin with the same 17 to 40 tokens."""
    openings = (
        "",
        "You are a helpful assistant who answers every question in one short sentence, politely. ",
        "def main():\n    # This function reads the numbers from a file and prints their sum.\n    ",
        "Translate to French, word by word, and keep the order of the words as it was: ",
    )
    things = (
        "the moon",
        "a river",
        "7 apples",
        "tea",
        "Paris",
        "x = 3",
        "an old clock",
        "snow",
        "music",
        "¿qué?",
    )
    asks = ("What is {}?", "{} and", "Write about {}:", "I like {} because", "{}")
    return [tokenizer(o + ask.format(thing)).input_ids for o in openings for thing in things for ask in asks]
