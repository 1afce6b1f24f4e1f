"""A request's own account: tokens and the times between them."""

from __future__ import annotations

import pytest

from tunesmith.serve import record as module
from tunesmith.serve.errors import ApiError
from tunesmith.serve.record import RequestRecord, record_of


def test_tokens_and_the_gaps_between_their_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.5, 11.0, 13.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    record = RequestRecord(started=10.0)
    record.prompted(7)
    record.prompted(1)
    for tokens in (2, 0, 1, 4):
        record.emitted(tokens)
    assert (record.first_token_s, record.gaps_s, record.last_token_s) == (0.5, [0.5, 2.0], 3.0)
    assert (record.prompt_tokens, record.completion_tokens) == (8, 7)
    assert record.total_tokens == 15


def test_models_that_a_key_may_use() -> None:
    anybody, few = RequestRecord(), RequestRecord(key_name="few", models=frozenset({"a"}))
    anybody.use("b", adapter="x")
    assert (anybody.model, anybody.adapter) == ("b", "x") and anybody.may_use("c")
    with pytest.raises(ApiError, match="'few' may not use the model 'b'") as error:
        few.use("b")
    assert error.value.status == 403 and few.model is None
    few.use("a")
    assert few.model == "a"


def test_without_a_guard_there_is_a_record_too() -> None:
    scope: dict[str, object] = {}
    record_of(scope).prompted(5)
    assert record_of(scope).prompt_tokens == 5
    assert record_of({}).prompt_tokens == 0
