"""What an answer must look like: from the fields of requests to a grammar."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from tunesmith.core.errors import UserError
from tunesmith.model.grammar import GrammarSpec, check
from tunesmith.serve.errors import ApiError, one_line
from tunesmith.serve.schema import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from tunesmith.serve.tool_grammar import ToolPlan, plan_tools


def structured_grammar(asked: StructuredOutputs | None) -> GrammarSpec | None:
    """The grammar of vLLM's `structured_outputs`. Raises ApiError for one that does not compile."""
    if asked is None:
        return None
    given = {name: value for name in _MAKERS if (value := getattr(asked, name)) is not None}
    if len(given) != 1:
        raise ApiError(
            "structured_outputs: give exactly one of json, json_object, regex, choice, grammar",
            param="structured_outputs",
        )
    [(name, value)] = given.items()
    return checked(_MAKERS[name](value), "structured_outputs")


_MAKERS: dict[str, Callable[..., GrammarSpec]] = {
    "json_": GrammarSpec.schema,
    "json_object": lambda _: GrammarSpec("json_object"),
    "regex": lambda text: GrammarSpec("regex", text),
    "choice": GrammarSpec.one_of,
    "grammar": lambda text: GrammarSpec("lark", text),
}


def response_grammar(asked: ResponseFormat | None) -> GrammarSpec | None:
    """The grammar of OpenAI's `response_format`. Raises ApiError for a schema that does not compile."""
    if isinstance(asked, JsonObjectFormat):
        return GrammarSpec("json_object")
    if isinstance(asked, JsonSchemaFormat):
        schema = asked.json_schema.schema_
        spec = GrammarSpec("json_object") if schema is None else GrammarSpec.schema(schema)
        return checked(spec, "response_format")
    return None


def checked(spec: GrammarSpec, param: str) -> GrammarSpec:
    """`spec`, which compiles. Raises ApiError."""
    try:
        check(spec)
    except UserError as error:
        raise ApiError(f"{param}: {one_line(error)}", param=param, code="invalid_grammar") from None
    return spec


def chat_plan(body: ChatRequest, tokenizer: Any) -> tuple[ToolPlan | None, GrammarSpec | None]:
    """(How tools are called and read, None where none may be; the one grammar that the answer keeps to.)

    Beside tools that may be called, a format is what the answer keeps to that is no call. Raises ApiError for
    what is not possible.
    """
    param, spec = _format(body)
    plan = _tool_plan(body, tokenizer, spec, param)
    return plan, spec if plan is None else plan.grammar


def _format(body: ChatRequest) -> tuple[str, GrammarSpec | None]:
    """The field that says what the answer must look like, and what it says. Raises ApiError where two do."""
    formats = {
        "response_format": response_grammar(body.response_format),
        "structured_outputs": structured_grammar(body.structured_outputs),
    }
    given = [(name, spec) for name, spec in formats.items() if spec is not None]
    if len(given) > 1:
        raise ApiError("give either response_format or structured_outputs", param="structured_outputs")
    return given[0] if given else ("response_format", None)


def _tool_plan(
    body: ChatRequest, tokenizer: Any, answer: GrammarSpec | None, answer_param: str
) -> ToolPlan | None:
    choice = body.tool_choice
    try:
        plan = plan_tools(
            tokenizer,
            body.tools,
            tool_choice=choice.model_dump() if isinstance(choice, BaseModel) else choice,
            parallel=body.parallel_tool_calls,
            answer=answer,
        )
    except UserError as error:
        named = re.match(r"tool[a-z_.0-9\[\]]*", error.what)
        raise ApiError(one_line(error), param=named[0] if named else answer_param) from None
    if plan is not None and not (plan.is_native or plan.forced):
        raise ApiError(
            "tools: this model's chat template writes tool calls in no form that is known here, so they "
            "could not be told from text; give tool_choice 'required', a function, or 'none'",
            param="tools",
            code="tools_not_supported",
        )
    return plan
