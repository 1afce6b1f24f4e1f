"""The Responses API: items in, items out; the official client's types read every answer and event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.unit.model.chat_templates import CHATML_TOOLS
from tests.unit.serve.replay import Api

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "tiny", "input": "1 + 1?"}
ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": False}
SAYS_ADD = 'Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def api(smol: Path, *texts: str, **options: Any) -> Api:
    return Api(smol, texts, template=CHATML_TOOLS, **options)


def ask(here: Api, **more: Any) -> Response:
    answer = here.post(PATH, ASK | more)
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json(), strict=True)


def test_text(smol: Path) -> None:
    here = api(smol, "It is two.")
    made = ask(here, instructions="Be short.", metadata={"a": "b"}, temperature=0.5)
    assert (made.output_text, made.status, made.object) == ("It is two.", "completed", "response")
    assert (made.instructions, made.metadata, made.temperature, made.top_p) == (
        "Be short.", {"a": "b"}, 0.5, 1.0,
    )  # fmt: skip
    assert made.usage is not None
    assert made.usage.input_tokens == len(here.engine.asked[0].prompt)
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert "system\nBe short." in here.prompt()
    assert here.engine.asked[0].params.temperature == 0.5


def test_a_cut_answer_is_incomplete(smol: Path) -> None:
    made = ask(api(smol, "one two three four five"), max_output_tokens=2)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_function_calls_are_items(smol: Path) -> None:
    made = ask(api(smol, SAYS_ADD), tools=[ADD])
    message, call = made.output
    assert (message.type, made.output_text) == ("message", "Well.")
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("add", '{"a": 1}', "completed")
    assert call.call_id.startswith("call_")
    assert [tool.type for tool in made.tools] == ["function"]


def test_a_history_of_items_is_the_chat_that_it_tells(smol: Path) -> None:
    here = api(smol, "done")
    history = [
        {"role": "developer", "content": "Obey."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "add 7"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Well.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"a": 7}'},
        {"type": "function_call_output", "call_id": "c1", "output": "seven"},
    ]  # fmt: skip
    ask(here, input=history, tools=[ADD])
    prompt = here.prompt()
    for part in (
        "system\nObey.",
        "user\nadd 7<",
        'Well.<tool_call>{"name": "add", "arguments": {"a": 7}}</tool_call>',
        "tool\nseven",
    ):
        assert part in prompt
    assert prompt.count("<|im_start|>assistant") == 2


def test_events_tell_the_whole_response(smol: Path) -> None:
    here = api(smol, SAYS_ADD)
    events = [EVENT.validate_python(event) for event in here.events(PATH, ASK | {"tools": [ADD]})]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-1] == "response.completed"
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert (deltas, arguments) == ("Well.", '{"a": 1}')
    final = events[-1].response
    assert [item.type for item in final.output] == ["message", "function_call"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output
    assert final.usage.output_tokens > 0


def test_a_failing_engine_is_told_as_a_failed_response(smol: Path) -> None:
    events = api(smol, "one two three", fails_after=1).events(PATH, ASK)
    failed = EVENT.validate_python(events[-1])
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert "stopped" in failed.response.error.message


def test_log_probabilities_are_included_when_asked(smol: Path) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    made = ask(api(smol, "It is two."), **asked)
    [part] = made.output[0].content  # type: ignore[union-attr]
    tokens = part.logprobs or []  # type: ignore[union-attr]
    assert "".join(token.token for token in tokens) == "It is two."
    assert all(len(token.top_logprobs) == 1 for token in tokens)


def test_a_schema_is_kept_to(smol: Path) -> None:
    here = api(smol, "{}")
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    made = ask(here, text={"format": form})
    assert made.text is not None
    assert made.text.format is not None
    assert made.text.format.type == "json_schema"
    grammar = here.engine.asked[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == ("json_schema", '{"type": "object"}')


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": "word " * 2000}, "input"),
        ({"max_output_tokens": 1024}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}}, "text.format"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(smol: Path, more: dict[str, Any], param: str) -> None:
    here = api(smol, "never said")
    answer = here.post(PATH, ASK | more)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert here.engine.asked == []


def test_fields_that_ask_for_nothing_are_accepted(smol: Path) -> None:
    nothing = {
        "store": False,
        "previous_response_id": None,
        "reasoning": {"effort": None},
        "background": False,
    }
    ask(api(smol, "yes"), **nothing, include=["reasoning.encrypted_content"], truncation="disabled")
