"""Rows as single data sets write them: Guanaco's text, turns with input and output, MOSS's chats."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.data.dialogue import Cells, Dialogue, RowError, dialogue, exchange, shown, text
from tunesmith.model.messages import Message

# Each part of a MOSS turn is `<|Name|>: text<eoh>` and the like.
MOSS_PART = re.compile(r"^<\|[^|>]*\|>:\s?(.*?)(<eo[a-z]>)?\s*$", re.DOTALL)
MOSS_THOUGHTS = ("Inner Thoughts", "Commands")


def guanaco(cells: Cells) -> Dialogue:
    """`### Human: …### Assistant: …` in the column text; a last question without an answer is left out."""
    messages: list[Message] = []
    for part in cells.text("text").split("###"):
        speaker, colon, said = part.strip().partition(":")
        if colon and speaker in ("Human", "Assistant"):
            messages.append({"role": "user" if speaker == "Human" else "assistant", "content": said.strip()})
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    return dialogue(cells, messages, None)


def turns(cells: Cells) -> Dialogue:
    """A list of {"input", "output"} with "system" in the first; "output_with_loss": false is not learned."""
    messages: list[Message] = []
    for number, turn in enumerate(cells.items("conversation")):
        if not isinstance(turn, dict):
            raise RowError(f"{shown(turn)} is not a turn with input and output")
        system = text(turn.get("system"), "system")
        if system and number:
            raise RowError("a system message stands in a later turn; only the first may have one")
        messages += [{"role": "system", "content": system}] if system else []
        question, answer = exchange(text(turn.get("input"), "input"), text(turn.get("output"), "output"))
        if turn.get("output_with_loss", True) is False:
            answer["weight"] = 0
        messages += [question, answer] if question["content"] or number == 0 else [answer]
    return dialogue(cells, messages, None)


def moss(cells: Cells) -> Dialogue:
    """MOSS-003: meta_instruction and chat {"turn_1": {"Human", …, "MOSS"}}, its marks taken off.

    In a turn with tool results, thoughts and commands are one answer, the results come back as the user's,
    and MOSS's words are the next answer.
    """
    chat = cells.needed("chat")
    if not isinstance(chat, dict):
        raise RowError(f"'chat' is {shown(chat)}, not an object with turns")
    meta = cells.optional_text("meta_instruction")
    messages: list[Message] = [{"role": "system", "content": meta}] if meta else []
    for number in range(1, len(chat) + 1):
        messages += _moss_turn(chat.get(f"turn_{number}"))
    return dialogue(cells, messages, None)


def _moss_turn(turn: Any) -> list[Message]:
    if not isinstance(turn, dict):
        raise RowError(f"{shown(turn)} is not a turn of a MOSS chat")
    said = {name: _unmarked(text(value, name)) for name, value in turn.items()}
    asked = {"role": "user", "content": said.get("Human", "")}
    answer = {"role": "assistant", "content": said.get("MOSS", "")}
    results = said.get("Tool Responses", "")
    if results in ("", "None"):
        return [asked, answer]
    thoughts = "\n".join(f"{name}: {said[name]}" for name in MOSS_THOUGHTS if said.get(name))
    return [asked, {"role": "assistant", "content": thoughts}, {"role": "user", "content": results}, answer]


def _unmarked(part: str) -> str:
    found = MOSS_PART.match(part)
    return (found.group(1) if found else part).strip()
