"""The two sides of `verify parity`: what the trained model says of a row, and what an endpoint says of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunesmith.core.net import EventClient, NetError
from tunesmith.model import attention
from tunesmith.model.batch import IGNORE, join
from tunesmith.model.generate import generate
from tunesmith.model.requests import SamplingParams
from tunesmith.model.scoring import token_losses
from tunesmith.model.template import stop_token_ids
from tunesmith.workflows.eval_rows import EvalRow
from tunesmith.workflows.open_model import OpenModel

NOT_THERE = (404, 405, 501)


@dataclass(frozen=True)
class Trained:
    """A row on the training side.

    ids: the whole row; places: of its supervised tokens, whose logprobs follow, by the trained model and its
    base (None without an adapter); answer: greedy, without the stop token that ended it (stop_id); leads: by
    how much the likeliest token leads the second at each of its places.
    """

    place: str
    prompt: list[int]
    ids: list[int]
    places: list[int]
    logprobs: list[float]
    base_logprobs: list[float] | None
    answer: list[int]
    leads: list[float]
    stop_id: int | None

    @property
    def stopped(self) -> bool:
        return self.stop_id is not None


@dataclass
class Served:
    """The same by an endpoint; None for what it does not tell, with the reason in `skipped`."""

    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    logprobs: list[float] | None = None
    text: str = ""
    finish_reason: str | None = None
    failure: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)


def trained_side(opened: OpenModel, rows: Sequence[EvalRow], new_tokens: int) -> list[Trained]:
    """Every row through the model: log-probabilities of the supervised tokens, and a greedy answer."""
    attention.install(opened.model)
    stop_ids = stop_token_ids(opened.tokenizer, getattr(opened.model, "generation_config", None))
    params = SamplingParams(max_new_tokens=new_tokens, stop_ids=stop_ids, logprobs=2)
    answers = generate(
        opened.model, [row.prompt for row in rows], params, max_length=opened.context_length, max_concurrent=4
    )
    tuned = [_logprobs(opened.model, row) for row in rows]
    has_adapter = hasattr(opened.model, "disable_adapter")
    with opened.model.disable_adapter() if has_adapter else nullcontext():
        base = [_logprobs(opened.model, row)[1] if has_adapter else None for row in rows]
    return [
        Trained(
            row.place,
            row.prompt,
            row.ids,
            places,
            logprobs,
            base[number],
            answers[number].ids,
            [_lead(found.top) for found in answers[number].logprobs],
            answers[number].stop_id,
        )
        for number, (row, (places, logprobs)) in enumerate(zip(rows, tuned, strict=True))
    ]


def _lead(top: Sequence[tuple[int, float]]) -> float:
    return top[0][1] - top[1][1] if len(top) > 1 else float("inf")


def _logprobs(model: Any, row: EvalRow) -> tuple[list[int], list[float]]:
    """(places, log-probabilities) of a row's supervised tokens."""
    if not any(label != IGNORE for label in row.labels):
        return [], []
    losses, places = token_losses(model, join([(np.array(row.ids), np.array(row.labels))]))
    return places.tolist(), (-losses).tolist()


async def served_side(
    client: EventClient, model: str, row: EvalRow, trained: Trained, new_tokens: int
) -> Served:
    """Ask an endpoint for all that it tells of a row."""
    found = Served()
    try:
        found.prompt_ids = await _prompt_ids(client, model, row, found)
        await _answer(client, model, row, found, new_tokens)
        if trained.places:
            found.logprobs = await _answer_logprobs(client, model, trained, found)
    except NetError as error:
        found.failure = error.what
    return found


def _asked(row: EvalRow) -> dict[str, Any]:
    return {"messages": row.messages} | ({"tools": row.tools} if row.tools else {})


async def _prompt_ids(client: EventClient, model: str, row: EvalRow, found: Served) -> list[int] | None:
    try:
        answer = await client.post("/tokenize", {"model": model} | _asked(row))
        return [int(token) for token in answer["tokens"]]
    except NetError as error:
        if error.status not in NOT_THERE:
            raise
        found.skipped["prompt_ids"] = "the endpoint has no /tokenize"
        return None


async def _answer(client: EventClient, model: str, row: EvalRow, found: Served, new_tokens: int) -> None:
    body = {"model": model, "max_tokens": new_tokens, "temperature": 0} | _asked(row)
    answer = await client.post("/v1/chat/completions", body)
    choice = answer["choices"][0]
    found.text, found.finish_reason = choice["message"].get("content") or "", choice["finish_reason"]
    found.prompt_tokens = (answer.get("usage") or {}).get("prompt_tokens")


async def _answer_logprobs(
    client: EventClient, model: str, trained: Trained, found: Served
) -> list[float] | None:
    """Of the row's supervised tokens, by an echo of the whole row's token ids."""
    body = {
        "model": model,
        "prompt": trained.ids,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    }
    try:
        choice = (await client.post("/v1/completions", body))["choices"][0]
        values = choice["logprobs"]["token_logprobs"]
        return [float(values[place]) for place in trained.places]
    except NetError as error:
        if error.status is None or error.status >= 500:
            raise
        found.skipped["logprobs"] = f"the endpoint refuses echo with logprobs: {error.what}"
    except (KeyError, TypeError, IndexError):
        found.skipped["logprobs"] = "the endpoint gives no log-probabilities of an echoed prompt"
    return None
