"""The rows of an evaluation: read, rendered with the model's own template, and counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import UserError
from tunesmith.data.dialogue import Dialogue, RowError
from tunesmith.data.prepare import malformed, peek, system_of
from tunesmith.data.readers import BadRow, RowFile, open_source
from tunesmith.model.batch import IGNORE, Batch, join
from tunesmith.model.messages import Message
from tunesmith.model.template import encode_dialogue, encode_prompt, encode_text
from tunesmith.recipe.schema import Data, Source

PLACE = "--data"
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class EvalRow:
    """One row: token ids with labels for the loss; prompt and expected answer where it ends in one.

    messages: what was asked before the expected answer, with the tools that the row offers.
    """

    place: str
    ids: list[int]
    labels: list[int]
    question: str = ""
    prompt: list[int] = field(default_factory=list)
    expected: str | None = None
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass
class EvalRows:
    """Rows to evaluate, and how many were left out and why; `format` names how they are written."""

    rows: list[EvalRow]
    format: str
    skipped: dict[str, int]


def read_rows(
    data: Path | str | Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    data_format: str = "auto",
    columns: dict[str, str] | None = None,
    system: str | None = None,
    max_rows: int | None = None,
    max_length: int,
) -> EvalRows:
    """Read and render rows: a file, folder or hub id, or rows as plain dictionaries.

    system: for rows that have no system message. Rows that are empty, longer than max_length tokens or
    without a supervised token are left out and counted. Raises UserError for data that cannot be read,
    rows that are not of the format, a template that refuses them, and when no row is left.
    """
    source = Source.model_validate({"path": str(data), "format": data_format, "columns": columns or {}})
    files = open_source(source, PLACE) if isinstance(data, (str, Path)) else [_in_memory(data)]
    found = EvalRows([], "", {"empty": 0, "too_long": 0, "unsupervised": 0})
    for place, dialogue, name in itertools.islice(_dialogues(files, source), max_rows):
        found.format = name
        _add(found, place, dialogue.with_system(system), tokenizer, max_length)
    if not found.rows:
        raise UserError(
            f"{PLACE} {source.path}: no row can be evaluated: {_skipped_text(found.skipped)}",
            hint="give rows that have an answer, within the model's context",
        )
    return found


def held_out_rows(data: Data, tokenizer: Any, *, count: int, max_length: int) -> list[EvalRow]:
    """Up to `count` rows with an answer that a run with this `data` has not trained on.

    Where it holds out none, rows that it has trained on. Rows longer than max_length are left out. Raises
    UserError where the data is not there any more, or has no such row.
    """
    fraction = 1.0 if data.eval_sources else data.eval_fraction or 1.0
    found, place = EvalRows([], "", {"empty": 0, "too_long": 0, "unsupervised": 0}), "data.sources"
    for source in data.eval_sources or data.sources:
        for name, dialogue, _ in _dialogues(open_source(source, place), source):
            if fraction == 1.0 or dialogue.is_held_out(fraction):
                _add(found, name, dialogue.with_system(system_of(source, data)), tokenizer, max_length)
            if sum(row.expected is not None for row in found.rows) >= count:
                break
    rows = [row for row in found.rows if row.expected is not None][:count]
    if not rows:
        raise UserError(
            f"{place}: no held-out row has an answer: {_skipped_text(found.skipped)}",
            hint="give rows with --data",
        )
    return rows


def _in_memory(rows: Sequence[dict[str, Any]]) -> RowFile:
    return RowFile("rows", "row", 0, lambda: enumerate(rows, start=1), lambda: "")


def _dialogues(files: list[RowFile], source: Source) -> Iterator[tuple[str, Dialogue, str]]:
    """(place, conversation, format) of every row. Raises UserError that names the first bad ones."""
    for file in files:
        shape, rows = peek(file, source, PLACE)
        faults: list[tuple[int, str]] = []
        for number, row in rows:
            try:
                if isinstance(row, BadRow):
                    raise RowError(row.why)
                yield f"{file.name}: {file.unit} {number}", shape.parse(row), shape.format
            except RowError as error:
                faults.append((number, str(error)))
                if len(faults) == SHOWN_FAULTS:
                    break
        if faults:
            raise malformed(file, shape, faults, number)


def _add(found: EvalRows, place: str, dialogue: Dialogue, tokenizer: Any, max_length: int) -> None:
    if dialogue.is_empty:
        found.skipped["empty"] += 1
        return
    try:
        row = _encode(place, dialogue, tokenizer)
    except UserError as error:
        raise UserError(f"{place}: {error.what}", hint=error.hint) from None
    if len(row.ids) > max_length:
        found.skipped["too_long"] += 1
    elif not row.num_supervised:
        found.skipped["unsupervised"] += 1
    else:
        found.rows.append(row)


def _encode(place: str, dialogue: Dialogue, tokenizer: Any) -> EvalRow:
    if dialogue.text is not None:
        encoded = encode_text(tokenizer, dialogue.text)
        return EvalRow(place, encoded.ids, encoded.labels)
    messages = dialogue.messages
    encoded = encode_dialogue(tokenizer, messages, dialogue.tools)
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or len(messages) < 2:
        return EvalRow(place, encoded.ids, encoded.labels)
    prompt = encode_prompt(tokenizer, messages[:-1], dialogue.tools)
    asked = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
    return EvalRow(
        place,
        encoded.ids,
        encoded.labels,
        asked,
        prompt,
        last["content"].strip(),
        messages[:-1],
        dialogue.tools,
    )


def packed(rows: list[EvalRow], max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """(row numbers, flat batch) of at most max_tokens tokens, longest rows first; a longer row is alone."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    group: list[int] = []
    size = 0
    for number in order:
        length = len(rows[number].ids)
        if group and size + length > max_tokens:
            yield group, _batch(rows, group)
            group, size = [], 0
        group.append(number)
        size += length
    if group:
        yield group, _batch(rows, group)


def _batch(rows: list[EvalRow], group: list[int]) -> Batch:
    return join([(np.array(rows[i].ids), np.array(rows[i].labels)) for i in group])


def _skipped_text(skipped: dict[str, int]) -> str:
    told = [f"{count} {name.replace('_', ' ')}" for name, count in skipped.items() if count]
    return ", ".join(told) or "there is none"
