"""Sampling under a grammar, with min_p and with a repetition penalty."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.core.errors import UserError
from tunesmith.model.grammar import Grammars, GrammarSpec
from tunesmith.model.requests import SamplingParams
from tunesmith.model.sampling import BROKEN, NOTHING_ALLOWED, RowState, sample

VOCAB = 49152
EOS, OTHER_END = 2, 0
PROBS = [0.05, 0.4, 0.1, 0.25, 0.2]


@pytest.fixture(scope="module")
def grammars(smol_tokenizer: PreTrainedTokenizerBase) -> Grammars:
    return Grammars(smol_tokenizer, VOCAB, (EOS, OTHER_END))


def bound(pattern: str, **more: object) -> SamplingParams:
    spec = GrammarSpec("regex", pattern)
    return SamplingParams(grammar=spec, **{"stop_ids": (EOS, OTHER_END), "seed": 0, **more})  # type: ignore[arg-type]


def token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    (found,) = tokenizer(text, add_special_tokens=False).input_ids
    return int(found)


def test_greedy_takes_the_likeliest_of_what_is_allowed(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    digits = [token(smol_tokenizer, str(d)) for d in range(10)]
    expected = digits[int(logits[0, digits].argmax())]
    before = logits.clone()
    assert sample(logits, [RowState(bound("[0-9]{3}"), grammars)]) == [expected]
    assert torch.equal(logits[0, digits], before[0, digits])
    assert (logits[0] > -math.inf).sum() == len(digits)


def test_a_drawn_token_follows_the_distribution_of_what_is_allowed(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    a, b = token(smol_tokenizer, "a"), token(smol_tokenizer, "b")
    logits = torch.zeros(1, VOCAB)
    logits[0, a] = math.log(3)
    row = RowState(bound("a|b", temperature=1.0), grammars)
    seen = Counter(sample(logits.clone(), [row])[0] for _ in range(800))
    assert set(seen) == {a, b}
    assert abs(seen[a] / 800 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 800)


def test_top_k_counts_only_what_is_allowed(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    a, b = token(smol_tokenizer, "a"), token(smol_tokenizer, "b")
    logits = torch.linspace(5, 0, VOCAB)[None].clone()
    row = RowState(bound("a|b", temperature=1.0, top_k=1), grammars)
    assert sample(logits, [row]) == [min(a, b)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_grammar_are_as_if_the_others_were_not_there(
    temperature: float, grammars: Grammars
) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2))
    free = [SamplingParams(temperature=temperature, top_p=0.9, seed=i, logit_bias={i: 3.0}) for i in range(6)]
    alone = sample(logits.clone(), [RowState(p) for p in free])
    mixed = [RowState(free[i]) if i % 2 else RowState(bound("[0-9]+"), grammars) for i in range(6)]
    together = logits.clone()
    got = sample(together, mixed)
    assert [got[i] for i in (1, 3, 5)] == [alone[i] for i in (1, 3, 5)]
    assert (together[1::2] > -math.inf).all()
    assert len(set(got[::2]) - set(alone[::2])) > 0


def test_a_row_under_a_grammar_draws_the_same_in_any_batch(grammars: Grammars) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))
    params = [bound("[0-9a-f]{8}", temperature=1.0, seed=i) for i in range(5)]
    together = sample(logits.clone(), [RowState(p, grammars) for p in params])
    alone = [sample(logits[i : i + 1].clone(), [RowState(p, grammars)])[0] for i, p in enumerate(params)]
    assert together == alone


def test_the_answer_ends_where_nothing_can_follow(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    row = RowState(bound("ab"), grammars)
    row.count(token(smol_tokenizer, "a"))
    assert not row.ended
    row.count(token(smol_tokenizer, "b"))
    assert row.ended


def test_only_stop_tokens_of_the_request_are_allowed(grammars: Grammars) -> None:
    everything = torch.zeros(1, VOCAB)
    everything[0, [EOS, OTHER_END]] = torch.tensor([5.0, 9.0])
    assert sample(everything.clone(), [RowState(bound("x?"), grammars)]) == [OTHER_END]
    assert sample(everything.clone(), [RowState(bound("x?", stop_ids=(EOS,)), grammars)]) == [EOS]
    # Without a stop token the answer goes on while it can.
    assert sample(everything.clone(), [RowState(bound("x?", stop_ids=()), grammars)])[0] > EOS
    assert sample(everything.clone(), [RowState(bound("", stop_ids=()), grammars)]) == [NOTHING_ALLOWED]


def test_a_further_stop_token_of_the_request_waits_for_the_end_too(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    comma = token(smol_tokenizer, ",")
    logits = torch.zeros(1, VOCAB)
    logits[0, comma] = 9.0
    row = RowState(bound("a,?b?", stop_ids=(comma,)), grammars)
    assert sample(logits.clone(), [row]) == [token(smol_tokenizer, "a")]
    row.count(token(smol_tokenizer, "a"))
    assert sample(logits.clone(), [row]) == [comma]


def test_ignoring_stop_tokens_ends_at_the_grammars_end(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 9.0
    row = RowState(bound("[0-9]{2,4}", stop_ids=()), grammars)
    answer = []
    while not row.ended:
        answer += sample(logits.clone(), [row])
        row.count(answer[-1])
    assert smol_tokenizer.decode(answer).isdigit()
    assert len(smol_tokenizer.decode(answer)) == 4


def test_a_grammar_that_was_left_is_broken(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    row = RowState(bound("[0-9]+"), grammars)
    row.count(token(smol_tokenizer, "a"))
    assert not row.ended
    assert sample(torch.zeros(1, VOCAB), [row]) == [BROKEN]


def test_logits_that_are_not_finite_are_broken_under_a_grammar_too(grammars: Grammars) -> None:
    logits = torch.full((2, VOCAB), math.nan)
    logits[1] = 0.0
    got = sample(logits, [RowState(bound("[0-9]+"), grammars), RowState(SamplingParams())])
    assert got == [BROKEN, 0]


def test_a_grammar_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="grammar"):
        RowState(bound("a"))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"min_p": 0.49}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"min_p": 1.0}, [0, 1.0, 0, 0, 0]),
        # Of the temperature's distribution, not of the model's: squared, 0.25 is 0.39 of the likeliest.
        ({"min_p": 0.45, "temperature": 0.5}, [0, 1.0, 0, 0, 0]),
        ({"min_p": 0.3, "top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"min_p": 0.6, "top_p": 0.9}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ],
)
def test_min_p(params: dict[str, float], expected: list[float]) -> None:
    draws = 2000
    row = RowState(SamplingParams(**{"seed": 1, "temperature": 1.0, **params}))  # type: ignore[arg-type]
    logits = torch.tensor([PROBS]).log()
    seen = Counter(sample(logits.clone(), [row])[0] for _ in range(draws))
    for index, probability in enumerate(expected):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(seen[index] / draws - probability) <= 4 * deviation


def test_min_p_of_one_row_does_not_touch_the_others() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(4))
    free = SamplingParams(temperature=1.0, seed=3)
    alone = sample(logits[1:].clone(), [RowState(free)])
    narrow = RowState(SamplingParams(temperature=1.0, seed=3, min_p=0.9))
    assert sample(logits.clone(), [narrow, RowState(free)])[1:] == alone


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(5))
    prompt, answer = [3, 7, 7], [11, 3]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits.clone())
    row = RowState(SamplingParams(repetition_penalty=1.3), prompt=prompt)
    for one in answer:
        row.count(one)
    ours = logits.clone()
    row.change(ours[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_repetition_penalty_comes_before_the_other_penalties() -> None:
    row = RowState(
        SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 0.5}), prompt=[0]
    )
    row.count(1)
    logits = torch.tensor([4.0, -2.0, 1.0])
    row.change(logits)
    assert logits.tolist() == [4 / 2 + 0.5, -2 * 2 - 1.0, 1.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
    ],
)
def test_impossible_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_equal_probabilities_are_chosen_among_alike_in_any_batch() -> None:
    """In bf16 many logits are equal, and which of them top_k keeps must not depend on the other rows."""
    noise = torch.Generator().manual_seed(6)
    logits = (torch.randn(24, 5000, generator=noise) * 2).bfloat16()
    kinds = [(0, 0.9), (40, 1.0), (1000, 0.5), (300, 0.9), (0, 0.999)]
    params = [
        SamplingParams(temperature=2.0, seed=i, top_k=k, top_p=p)
        for i, (k, p) in zip(range(24), kinds * 5, strict=False)
    ]
    together = sample(logits.clone(), [RowState(p) for p in params])
    alone = [sample(logits[i : i + 1].clone(), [RowState(p)])[0] for i, p in enumerate(params)]
    assert together == alone
