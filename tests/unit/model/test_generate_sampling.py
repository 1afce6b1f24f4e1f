"""Sampling against distributions computed by hand."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from tunesmith.core.errors import UserError
from tunesmith.model.requests import SamplingParams
from tunesmith.model.sampling import RowState, logprobs_of, restrict, sample

PROBS = [0.05, 0.4, 0.1, 0.25, 0.2]


def test_restrict_by_hand() -> None:
    probs = torch.tensor([PROBS] * 6)
    got = restrict(probs, [0, 2, 0, 3, 0, 1], [1.0, 1.0, 0.6, 0.75, 0.66, 0.1])
    expected = [
        PROBS,
        [0, 0.4, 0, 0.25, 0],
        [0, 0.4, 0, 0.25, 0],
        # top_k 3 leaves 0.85, of which 0.75 is 0.6375: 0.4 and 0.25 reach it.
        [0, 0.4, 0, 0.25, 0],
        [0, 0.4, 0, 0.25, 0.2],
        [0, 0.4, 0, 0, 0],
    ]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_restrict_ties_keep_no_more_than_asked() -> None:
    got = restrict(torch.full((2, 4), 0.25), [2, 0], [1.0, 0.5])
    assert (got > 0).sum(-1).tolist() == [2, 2]


def test_restrict_of_a_flat_row_sorts_the_whole_vocabulary() -> None:
    vocab = 5000
    probs = torch.softmax(torch.linspace(0, 0.01, vocab), -1)[None]
    kept = (restrict(probs, [0], [0.9]) > 0)[0]
    order = probs[0].double().sort(descending=True)
    wanted = int((order.values.cumsum(0) - order.values < 0.9).sum())
    assert abs(int(kept.sum()) - wanted) <= 1
    assert kept[order.indices[: wanted - 1]].all()


def test_restrict_mixed_rows_equal_single_rows() -> None:
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(4, 3000) * 3, -1)
    top_k, top_p = [0, 7, 0, 1000], [0.3, 1.0, 0.999, 0.5]
    together = restrict(probs, top_k, top_p)
    for row in range(4):
        torch.testing.assert_close(
            together[row], restrict(probs[row : row + 1], [top_k[row]], [top_p[row]])[0]
        )


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, PROBS),
        ({"temperature": 0.5}, [p * p / sum(q * q for q in PROBS) for p in PROBS]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 1.0, "top_p": 0.5}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 1.0, "logit_bias": {0: math.log(9)}}, [0.45 / 1.4, *(p / 1.4 for p in PROBS[1:])]),
    ],
)
def test_frequencies_follow_the_distribution(params: dict[str, object], expected: list[float]) -> None:
    draws = 4000
    row = RowState(SamplingParams(seed=1, **params))  # type: ignore[arg-type]
    logits = torch.tensor([PROBS]).log()
    seen = Counter(sample(logits.clone(), [row])[0] for _ in range(draws))
    for token, probability in enumerate(expected):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(seen[token] / draws - probability) <= 4 * deviation


def test_greedy_takes_the_first_maximum_and_uses_no_randomness() -> None:
    row = RowState(SamplingParams(temperature=0, seed=5))
    before = row.random.getstate()
    assert sample(torch.tensor([[0.0, 2.0, 1.0]]), [row]) == [1]
    assert row.random.getstate() == before


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 1000)
    params = [SamplingParams(temperature=1.0 + i / 4, top_p=(0.7, 1.0)[i % 2], seed=i) for i in range(6)]
    together = sample(logits.clone(), [RowState(p) for p in params])
    alone = [sample(logits[i : i + 1].clone(), [RowState(p)])[0] for i, p in enumerate(params)]
    assert together == alone


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(3)
    state, python_state = torch.get_rng_state(), random.getstate()
    sample(torch.randn(2, 50), [RowState(SamplingParams(temperature=1.0, seed=s)) for s in (None, 4)])
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())
    assert python_state == random.getstate()


def test_penalties_count_the_answers_tokens() -> None:
    row = RowState(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 3.0}))
    for token in (1, 1, 2):
        row.count(token)
    logits = torch.zeros(4)
    row.change(logits)
    assert logits.tolist() == [0, -1.0, 3.0 - 0.75, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    logits = torch.tensor([[0.0, bad], [1.0, 0.0]])
    rows = [RowState(SamplingParams(temperature=1.0, seed=0)), RowState(SamplingParams())]
    assert sample(logits, rows) == [-1, 0]


def test_logprobs_are_of_the_models_distribution() -> None:
    found = logprobs_of(torch.tensor([PROBS, PROBS]).log() + 7, [0, 1], 2)
    assert found[0].logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert found[1].logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in found[0].top] == [1, 3]
    assert found[0].top[1][1] == pytest.approx(math.log(0.25), abs=1e-6)
    assert logprobs_of(torch.zeros(1, 3), [2], 0)[0].top == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"logprobs": 21},
        {"presence_penalty": 3},
        {"max_new_tokens": -1},
    ],
)
def test_impossible_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
