"""What crosses from one process to the other arrives as it left."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from tunesmith.core.errors import MissingExtra, PlanRefused, TunesmithError, UserError
from tunesmith.model.grammar import GrammarSpec
from tunesmith.model.requests import Logprobs, SamplingParams, TokenEvent
from tunesmith.serve import wire
from tunesmith.serve.engine import Ask, EngineBusy, EngineError, EngineStatus


def through(**content: object) -> wire.Message:
    message = wire.read(io.BytesIO(wire.encode("x", **content)))
    assert message is not None
    return message


def test_events_and_their_logprobs() -> None:
    best = Logprobs(7, -0.25, ((7, -0.25), (9, -1.5)))
    events = [
        TokenEvent(1, 7, None, best, (best, best)),
        TokenEvent(2, None, "cancelled"),
        TokenEvent(3, 5, "stop", Logprobs(5, -1.0, ()), ()),
    ]
    found = through(events=events)["events"]
    assert [wire.event_from(values) for values in found] == events


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=4, seed=11, stop_ids=(2, 3)),
        SamplingParams(logprobs=2, prompt_logprobs=0, presence_penalty=1, logit_bias={5: 1.5, 9: -100.0}),
        SamplingParams(grammar=GrammarSpec("regex", r"[a-ü]+")),
    ],
)
def test_asks(params: SamplingParams) -> None:
    for ask in (Ask([1, 2, 3], params), Ask([4], params, "orders")):
        assert wire.ask_from(through(ask=wire.ask_to_plain(ask))["ask"]) == ask


def test_impossible_parameters_are_refused_on_arrival_too() -> None:
    with pytest.raises(UserError, match="temperature"):
        wire.params_from({"temperature": -1.0})


def test_status() -> None:
    status = EngineStatus(True, False, 1, 2, 3, 4, 5, failure="it fell", restarts=2, adapters=("a", "ü"))
    assert wire.status_from(through(status=wire.status_to_plain(status))["status"]) == status
    assert wire.status_from(wire.status_to_plain(replace(status, adapters=()))).adapters == ()


@pytest.mark.parametrize(
    "error",
    [
        UserError("wrong", hint="do it right"),
        PlanRefused("no"),
        TunesmithError("broken"),
        EngineBusy("later"),
        EngineError("gone"),
        FileNotFoundError(2, "No such file or directory", "/nothing"),
    ],
)
def test_errors_keep_class_and_words(error: Exception) -> None:
    found = wire.error_from(through(error=wire.error_to_plain(error))["error"])
    assert (type(found), str(found)) == (type(error), str(error))
    assert getattr(found, "hint", None) == getattr(error, "hint", None)


def test_an_error_with_a_sentence_of_its_own_keeps_it() -> None:
    found = wire.error_from(wire.error_to_plain(MissingExtra("msgpack", "serve")))
    assert isinstance(found, MissingExtra)
    assert found.as_dict() == MissingExtra("msgpack", "serve").as_dict()


def test_a_missing_module_keeps_its_name() -> None:
    found = wire.error_from(wire.error_to_plain(ModuleNotFoundError("No module", name="triton")))
    assert isinstance(found, ModuleNotFoundError)
    assert found.name == "triton"


def test_other_errors_say_what_they_were() -> None:
    found = wire.error_from(wire.error_to_plain(ZeroDivisionError("by zero")))
    assert isinstance(found, EngineError)
    assert str(found) == "ZeroDivisionError: by zero"


def test_a_frame_cut_short_is_the_end() -> None:
    whole = wire.encode("x", a=1)
    assert wire.read(io.BytesIO(whole)) == {"kind": "x", "a": 1}
    for cut in (0, 2, 4, len(whole) - 1):
        assert wire.read(io.BytesIO(whole[:cut])) is None


def test_only_plain_data_goes_through() -> None:
    with pytest.raises(TypeError, match="not plain data"):
        wire.encode("x", value=object())
