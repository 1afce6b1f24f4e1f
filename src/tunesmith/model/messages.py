"""Chat messages as every chat template expects them: the OpenAI shape, with the spellings made one.

A message is `{"role", "content"}` with role system, user, assistant or tool; an assistant may have
`tool_calls` (`arguments` as an object) and `reasoning_content`. Training rows and requests to the
endpoint both pass through here, so that one conversation has one spelling.
"""

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.errors import UserError

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def plain_messages(messages: Any) -> list[Message]:
    """The conversation in the one spelling. Raises UserError naming the message, the value and the fault."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages: {_shown(messages)} is not a list of messages")
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def plain_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions as `{"type": "function", "function": {...}}`; None when there are none."""
    tools = _from_json(tools) if isinstance(tools, str) else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f"tools: {_shown(tools)} is not a list of tool definitions")
    return [_plain_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _plain_tool(tool: Any, place: str) -> dict[str, Any]:
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{place}: {_shown(tool)} is not a tool definition: it has no function.name")
    return {"type": "function"} | tool


def _plain_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{place}: {_shown(message)} is not an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{place}.role: {_shown(role)} is not a role", hint=f"roles are {', '.join(ROLES)}")
    if len(message) == 2 and type(content := message.get("content")) is str:
        return {"role": ROLES[role], "content": content}
    plain: Message = {"role": ROLES[role], "content": _text(message.get("content"), f"{place}.content")}
    calls = message.get("tool_calls") or (
        [{"function": call}] if (call := message.get("function_call")) else []
    )
    if calls:
        plain["tool_calls"] = _plain_calls(calls, ROLES[role], place)
    elif message.get("content") is None:
        raise UserError(f"{place}.content: there is none")
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if reasoning is not None and ROLES[role] == "assistant":
        plain["reasoning_content"] = _text(reasoning, f"{place}.reasoning_content")
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            plain[key] = message[key]
    return plain


def _plain_calls(calls: Any, role: str, place: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise UserError(f"{place}.tool_calls: only the assistant calls tools, not the role '{role}'")
    if not isinstance(calls, list):
        raise UserError(f"{place}.tool_calls: {_shown(calls)} is not a list")
    return [_plain_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _plain_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{place}: {_shown(call)} has no function name")
    arguments = function.get("arguments")
    # Templates write `arguments | tojson`: a string would be quoted twice.
    parsed = _from_json(arguments) if isinstance(arguments, str) else arguments
    arguments = {} if arguments is None else (parsed if isinstance(parsed, dict) else arguments)
    plain = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return plain | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))
    raise UserError(f"{place}: {_shown(content)} is not text")


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError(
        f"{place}: {_shown(part)} is not a text part", hint="only text is supported, no images or audio"
    )


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
