"""tunesmith verify parity: what an endpoint computes is what was trained.

Rows that the run has not trained on go to the endpoint and through the training side: its template, its base
and its adapter, in float32. Compared are the prompts' token ids, the log-probabilities of the expected
answers, greedy continuations and how they end; one more row is as long as the run's context, so that a prompt
which the server cuts is seen. Each difference is told with its likely reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient, NetError
from tunesmith.core.progress import say
from tunesmith.core.run_folder import open_run
from tunesmith.core.store_cache import local_path
from tunesmith.model.hardware import pick_device, set_threads
from tunesmith.model.template import encode_prompt
from tunesmith.workflows.eval_rows import EvalRow, held_out_rows, read_rows
from tunesmith.workflows.open_model import OpenModel, open_model
from tunesmith.workflows.parity_sides import Served, Trained, served_side, trained_side
from tunesmith.workflows.run_facts import run_recipe

# Of the mean difference of log-probabilities: float32 differs by 1e-5, bf16 by about 0.02.
TOLERANCE = 0.1
# Log-probability by which the likeliest token must lead, for another one to be a fault and not rounding.
CLEAR_LEAD = 0.2
AT_ONCE = 4


@dataclass(frozen=True)
class Finding:
    """place: the row; check: prompt_ids, logprobs, answer, stop or length; why: what is wrong, for people."""

    place: str
    check: str
    why: str


@dataclass(frozen=True)
class Parity:
    """checked: how many rows each check was made on; skipped: checks that this server does not allow."""

    model: str
    url: str
    rows: int
    checked: dict[str, int]
    skipped: dict[str, str]
    logprob_difference: float | None
    findings: list[Finding] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        return {"equal": self.equal} | asdict(self)


def verify_parity(
    run: str,
    url: str,
    *,
    api_key: str | None = None,
    model: str | None = None,
    data: Path | None = None,
    rows: int = 8,
    new_tokens: int = 32,
) -> Parity:
    """Compare the endpoint at `url` with the run. Raises UserError for a run or rows that cannot be used, and
    for an endpoint that is not there or has no such model."""
    folder = open_run(Path(local_path(run)))
    recipe = run_recipe(folder)
    set_threads("auto")
    opened = open_model(
        str(folder.path),
        dtype=torch.float32,
        device=pick_device("auto"),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    # Room for the answer, which the prompt of a row does not count.
    most = _trained_length(recipe, opened)
    if data is None:
        found = held_out_rows(recipe.data, opened.tokenizer, count=rows, max_length=most)
    else:
        read = read_rows(data, opened.tokenizer, system=recipe.data.system, max_rows=rows, max_length=most)
        found = [row for row in read.rows if row.expected is not None]
    if not found:
        raise UserError(f"--data {data}: no row ends in an answer", hint="give rows with an answer")
    found = [*found, _long_row(opened.tokenizer, found[0], most - new_tokens)]
    say(f"{len(found)} rows through the training side")
    trained = trained_side(opened, found, new_tokens)
    say(f"{len(found)} rows to {url}")
    name, served = asyncio.run(_ask_all(url, api_key, model, opened.tokenizer, found, trained, new_tokens))
    return compare(name, url, opened.tokenizer, trained, served)


def _trained_length(recipe: Any, opened: OpenModel) -> int:
    length = recipe.data.max_length
    return opened.context_length if length == "auto" else min(int(length), opened.context_length)


def _long_row(tokenizer: Any, like: EvalRow, most: int) -> EvalRow:
    """A row like another one whose question is repeated until its prompt has nearly `most` tokens."""
    *before, last = like.messages
    unit, base = str(last["content"]) + "\n", len(like.prompt)
    size = max(1, len(tokenizer(unit).input_ids))
    times = 1 + max(0, (most - base) // size)
    while True:
        messages = [*before, {**last, "content": (unit * times).rstrip("\n")}]
        prompt = encode_prompt(tokenizer, messages, like.tools)
        if len(prompt) <= most or times == 1:
            return EvalRow(
                "the longest prompt", prompt, [], prompt=prompt, messages=messages, tools=like.tools
            )
        times = max(1, min(times - 1, int(times * most / len(prompt))))


async def _ask_all(
    url: str,
    api_key: str | None,
    model: str | None,
    tokenizer: Any,
    rows: Sequence[EvalRow],
    trained: Sequence[Trained],
    new_tokens: int,
) -> tuple[str, list[Served]]:
    client, turns = (
        EventClient(url.removesuffix("/").removesuffix("/v1"), api_key=api_key),
        asyncio.Semaphore(AT_ONCE),
    )
    try:
        name = await _model_name(client, url, model)

        async def one(row: EvalRow, side: Trained) -> Served:
            async with turns:
                return await served_side(client, name, row, side, new_tokens)

        return name, list(await asyncio.gather(*(one(*pair) for pair in zip(rows, trained, strict=True))))
    finally:
        await client.close()


async def _model_name(client: EventClient, url: str, model: str | None) -> str:
    try:
        names = [str(card["id"]) for card in (await client.get("/v1/models"))["data"]]
    except NetError as error:
        raise UserError(f"--url {url}: {error.what}", hint="is the endpoint up, and the key right?") from None
    if model is not None and model not in names:
        raise UserError(f"--model {model}: {url} has {', '.join(names) or 'no model'}")
    if not names:
        raise UserError(f"--url {url}: it has no model")
    return model or names[0]


# -- comparing --------------------------------------------------------------------------------------------


def compare(
    name: str, url: str, tokenizer: Any, trained: Sequence[Trained], served: Sequence[Served]
) -> Parity:
    """What of both sides is not the same."""
    findings: list[Finding] = []
    checked = dict.fromkeys(("prompt_ids", "length", "logprobs", "answer", "stop"), 0)
    gaps: list[float] = []
    for ours, theirs in zip(trained, served, strict=True):
        for check, fault in _faults(tokenizer, ours, theirs, gaps):
            checked[check] += 1
            if fault:
                findings.append(Finding(ours.place, check, fault))
    skipped = {check: reason for theirs in served for check, reason in theirs.skipped.items()}
    return Parity(name, url, len(trained), checked, skipped, mean(gaps) if gaps else None, findings)


def _faults(tokenizer: Any, ours: Trained, theirs: Served, gaps: list[float]) -> list[tuple[str, str | None]]:
    """(check, what is wrong or None) of every check that could be made."""
    found: list[tuple[str, str | None]] = []
    if theirs.failure is not None:
        return [("answer", theirs.failure)]
    if theirs.prompt_ids is not None:
        found.append(("prompt_ids", prompt_fault(tokenizer, ours.prompt, theirs.prompt_ids)))
    if theirs.prompt_tokens is not None:
        found.append(("length", _length_fault(ours, theirs)))
    if theirs.logprobs is not None and ours.logprobs:
        gaps.append(difference(ours.logprobs, theirs.logprobs))
        found.append(("logprobs", logprob_fault(ours, theirs.logprobs)))
    found.append(("answer", answer_fault(tokenizer, ours, theirs)))
    if ours.stopped:
        found.append(("stop", stop_fault(tokenizer, ours, theirs)))
    return found


def prompt_fault(tokenizer: Any, ours: Sequence[int], theirs: Sequence[int]) -> str | None:
    """Why the endpoint's prompt is not the one of the training."""
    if list(ours) == list(theirs):
        return None
    bos = tokenizer.bos_token_id
    if bos is not None and list(theirs) == [bos, *ours]:
        more = "a second" if ours and ours[0] == bos else "a"
        return f"the endpoint puts {more} {tokenizer.bos_token!r} before the prompt, as training did not"
    if bos is not None and [bos, *theirs] == list(ours):
        return f"the endpoint leaves out the {tokenizer.bos_token!r} with which training began"
    if len(theirs) < len(ours) and (
        list(ours[-len(theirs) :]) == list(theirs) or list(ours[: len(theirs)]) == list(theirs)
    ):
        return f"the endpoint cuts the prompt: {len(theirs)} of {len(ours)} tokens"
    at = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    there, here = (tokenizer.decode(ids[at : at + 4]) for ids in (theirs, ours))
    return f"another template: at token {at} the endpoint has {there!r} where training has {here!r}"


def _length_fault(ours: Trained, theirs: Served) -> str | None:
    if theirs.prompt_tokens == len(ours.prompt):
        return None
    return (
        f"the endpoint read {theirs.prompt_tokens} tokens of a prompt that has {len(ours.prompt)} in training"
    )


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean absolute difference of log-probabilities."""
    return mean(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def logprob_fault(ours: Trained, theirs: Sequence[float]) -> str | None:
    """Why the endpoint's log-probabilities of the expected answer are not those of the trained model."""
    gap = difference(ours.logprobs, theirs)
    near_base = ours.base_logprobs is not None and difference(ours.base_logprobs, theirs) < 0.5 * gap
    if gap <= TOLERANCE and not near_base:
        return None
    told = f"the expected answer's log-probabilities differ by {gap:.3g} on average"
    if near_base:
        return f"{told}, and are those of the base model: the adapter is not applied"
    return f"{told} (bound {TOLERANCE:g}): other weights, or a prompt that is not read whole"


def answer_fault(tokenizer: Any, ours: Trained, theirs: Served) -> str | None:
    """Where a greedy answer leaves that of the training side although one token clearly leads."""
    wanted = tokenizer.decode(ours.answer, skip_special_tokens=True)
    if theirs.text == wanted or theirs.text.startswith(wanted):
        return None  # going on after the end is `stop_fault`'s matter
    at = 0
    while at < len(ours.answer) and theirs.text.startswith(
        tokenizer.decode(ours.answer[: at + 1], skip_special_tokens=True).rstrip("\ufffd")
    ):
        at += 1
    if at < len(ours.leads) and ours.leads[at] < CLEAR_LEAD:
        return None
    return f"the greedy answer is {_short(theirs.text)} where training's is {_short(wanted)}"


def stop_fault(tokenizer: Any, ours: Trained, theirs: Served) -> str | None:
    """Whether the endpoint goes on where the trained model ends its answer."""
    wanted = tokenizer.decode(ours.answer, skip_special_tokens=True)
    if not theirs.text.startswith(wanted) or (theirs.text == wanted and theirs.finish_reason == "stop"):
        return None
    end = tokenizer.decode([ours.stop_id]) if ours.stop_id is not None else "its end"
    rest = _short(theirs.text[len(wanted) :])
    return f"the answer goes on after {end!r}, where the endpoint does not stop; what comes is {rest}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
