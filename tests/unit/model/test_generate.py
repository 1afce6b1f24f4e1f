"""The generator against transformers' own generate(), in float32, on random models of several families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedModel

from tests.greedy import greedy
from tests.tiny_models import FAMILIES, VOCAB, make, prompts_of
from tunesmith.core.errors import UserError
from tunesmith.model.generate import Generation, Generator, check_logits, generate
from tunesmith.model.requests import SamplingParams


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make()


def reference(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    return greedy(model, prompt, new_tokens, pad_token_id=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str) -> None:
    plain = make(family)
    prompts = prompts_of(1, 2, 7, 40, 90)
    got = generate(copy.deepcopy(plain), prompts, SamplingParams(max_new_tokens=20), max_concurrent=3)
    assert [g.ids for g in got] == [reference(plain, p, 20) for p in prompts]
    assert {g.finish_reason for g in got} == {"length"}


def test_peft_model_equals_transformers(model: PreTrainedModel) -> None:
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    tuned.eval()
    prompts = prompts_of(5, 30)
    expected = [reference(tuned, p, 16) for p in prompts]
    assert expected != [reference(model, p, 16) for p in prompts]
    got = generate(tuned, prompts, SamplingParams(max_new_tokens=16))
    assert [g.ids for g in got] == expected


@pytest.mark.parametrize("prefill_tokens", [5, 64, 4096])
def test_chunked_prefill_changes_nothing(model: PreTrainedModel, prefill_tokens: int) -> None:
    prompts = prompts_of(130, 3, 61, 64, 1)
    generator = Generator(copy.deepcopy(model), max_concurrent=4, prefill_tokens=prefill_tokens)
    ids = [generator.add(p, SamplingParams(max_new_tokens=10)) for p in prompts]
    got: dict[int, list[int]] = {i: [] for i in ids}
    while generator.has_work:
        for event in generator.step():
            assert event.token_id is not None
            got[event.request_id].append(event.token_id)
    assert list(got.values()) == [reference(model, p, 10) for p in prompts]


def test_a_long_prompt_does_not_stall_others(model: PreTrainedModel) -> None:
    generator = Generator(copy.deepcopy(model), prefill_tokens=50)
    short = generator.add(prompts_of(5)[0], SamplingParams(max_new_tokens=40))
    generator.step()
    long = generator.add(prompts_of(1000)[0], SamplingParams(max_new_tokens=1))
    steps = [[e.request_id for e in generator.step()] for _ in range(20)]
    assert all(short in step for step in steps)
    assert [long in step for step in steps].index(True) == 19


def test_unequal_lengths_equal_transformers(model: PreTrainedModel) -> None:
    """Sequences that grow over many pages, while others come and go beside them."""
    prompts = prompts_of(508, 20, 517, 492, 3)
    lengths = [12, 5, 30, 40, 25]
    params = [SamplingParams(max_new_tokens=n) for n in lengths]
    got = generate(copy.deepcopy(model), prompts, params, max_concurrent=3)
    assert [g.ids for g in got] == [reference(model, p, n) for p, n in zip(prompts, lengths, strict=True)]


def test_batch_of_32_equals_single_answers(model: PreTrainedModel) -> None:
    mine = copy.deepcopy(model)
    prompts = prompts_of(*range(3, 99, 3))
    params = [
        SamplingParams(max_new_tokens=5 + i % 9, temperature=i % 3 / 2, top_p=1 - i % 4 / 10, seed=i)
        for i in range(32)
    ]
    together = generate(mine, prompts, params, max_concurrent=32)
    alone = [generate(mine, [p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert [g.ids for g in together] == [g.ids for g in alone]


def test_cancelling_and_mixed_ends_leave_the_others_right(model: PreTrainedModel) -> None:
    generator = Generator(copy.deepcopy(model), max_concurrent=3, prefill_tokens=16)
    prompts = prompts_of(20, 30, 40, 10, 25)
    ids = [generator.add(p, SamplingParams(max_new_tokens=12)) for p in prompts]
    got: dict[int, list[int]] = {i: [] for i in ids}
    ends: dict[int, str] = {}
    for number in range(200):
        if number == 4:
            generator.cancel(ids[0])
            generator.cancel(ids[4])
            generator.cancel(999)
        for event in generator.step():
            if event.token_id is not None:
                got[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                assert event.request_id not in ends
                ends[event.request_id] = event.finish_reason
    assert not generator.has_work
    assert ends == dict(zip(ids, ["cancelled", "length", "length", "length", "cancelled"], strict=True))
    for i in (1, 2, 3):
        assert got[ids[i]] == reference(model, prompts[i], 12)


def test_stop_ids_end_the_answer_and_are_not_in_it(model: PreTrainedModel) -> None:
    prompt = prompts_of(9)[0]
    whole = reference(model, prompt, 12)
    stop = next(token for token in whole[3:] if token not in whole[:3])
    [got] = generate(copy.deepcopy(model), [prompt], SamplingParams(max_new_tokens=12, stop_ids=(stop, 1)))
    at = whole.index(stop)
    assert (got.ids, got.finish_reason, got.stop_id) == (whole[:at], "stop", stop)


def test_logprobs_and_prompt_logprobs_equal_the_models(model: PreTrainedModel) -> None:
    prompt = prompts_of(150)[0]
    params = SamplingParams(max_new_tokens=6, logprobs=3, prompt_logprobs=1, logit_bias={7: 5.0})
    [got] = generate(copy.deepcopy(model), [prompt, prompt], params)[:1]
    ids = torch.tensor([prompt + got.ids])
    with torch.inference_mode():
        table = model(ids).logits[0].log_softmax(-1)
    assert got.prompt_logprobs is not None
    found = [*got.prompt_logprobs, *got.logprobs]
    assert [f.token_id for f in found] == ids[0, 1:].tolist()
    expected = table[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([f.logprob for f in found]), expected, atol=1e-4, rtol=0)
    assert {len(f.top) for f in got.logprobs} == {3}
    assert {len(f.top) for f in got.prompt_logprobs} == {1}
    top = table[len(prompt) - 1].topk(3)
    assert [token for token, _ in got.logprobs[0].top] == top.indices.tolist()


def test_prompt_alone(model: PreTrainedModel) -> None:
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    [got] = generate(copy.deepcopy(model), prompts_of(6), params)
    assert (got.ids, got.finish_reason) == ([], "length")
    assert got.prompt_logprobs is not None
    assert len(got.prompt_logprobs) == 5


def test_the_context_ends_an_answer(model: PreTrainedModel) -> None:
    prompt = prompts_of(20)[0]
    params = SamplingParams(max_new_tokens=500)
    [got] = generate(copy.deepcopy(model), [prompt], params, max_length=30)
    assert got.ids == reference(model, prompt, 10)


@pytest.mark.parametrize(
    ("prompt", "what"), [([], "no tokens"), ([5] * 31, "31 tokens"), ([5, VOCAB], "vocabulary"), ([-1], "-1")]
)
def test_bad_prompts_are_refused(model: PreTrainedModel, prompt: list[int], what: str) -> None:
    with pytest.raises(UserError, match=what):
        generate(copy.deepcopy(model), [prompt], SamplingParams(), max_length=30)


def test_a_model_in_training_is_left_as_it_was(model: PreTrainedModel) -> None:
    mine = copy.deepcopy(model)
    mine.train()
    mine.model.layers[0].eval()
    modes = {name: module.training for name, module in mine.named_modules()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    [got] = generate(mine, prompts_of(8), SamplingParams(max_new_tokens=5, temperature=1.0, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in mine.named_modules()} == modes
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in mine.parameters())
    loss = mine(torch.tensor([[*got.ids, 5]])).logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in mine.parameters())


def test_logits_that_are_not_finite_end_that_request_alone(model: PreTrainedModel) -> None:
    mine = copy.deepcopy(model)
    with torch.no_grad():
        mine.get_input_embeddings().weight[9] = float("nan")
    prompts = [[5, 9, 6], *prompts_of(5, 6)]
    prompts = [prompts[0], *[[t if t != 9 else 10 for t in p] for p in prompts[1:]]]
    got = generate(mine, [*prompts, prompts[1]], SamplingParams(max_new_tokens=8), max_concurrent=2)
    assert got[0] == Generation([], "error")
    assert [g.ids for g in got[1:]] == [reference(model, p, 8) for p in [*prompts[1:], prompts[1]]]


def test_check_logits_passes_a_good_model_and_finds_a_scaled_one(model: PreTrainedModel) -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    check_logits(copy.deepcopy(model), [5, 6, 7])
    scaled = Scaled(model.config)
    scaled.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="differ"):
        check_logits(scaled.eval(), [5, 6, 7])
