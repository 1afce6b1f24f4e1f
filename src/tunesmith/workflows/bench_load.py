"""Load on an OpenAI-compatible server: streamed requests, closed or open loop, and what each one met.

Closed loop: so many clients, each with one request at a time. Open loop: requests come at their own times, at
a mean rate (a Poisson process), whether or not earlier ones are answered: that is what users do, and where a
queue shows.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from tunesmith.core.net import EventClient, NetError
from tunesmith.workflows.bench_rows import alpaca_rows

CHARACTERS_A_TOKEN = 4.5
QUANTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How every request of a load is made.

    extra: fields beside prompt and length, such as ignore_eos for servers that know it; count: tokens of a
    text, for servers that do not tell how many they sent (without it, each piece of text counts as one).
    """

    model: str
    endpoint: Literal["completions", "chat"] = "completions"
    new_tokens: int = 128
    extra: dict[str, Any] = field(default_factory=dict)
    count: Callable[[str], int] | None = None

    def path(self) -> str:
        return "/v1/completions" if self.endpoint == "completions" else "/v1/chat/completions"

    def body(self, prompt: str) -> dict[str, Any]:
        chat = self.endpoint == "chat"
        given = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        rest = {"model": self.model, "max_tokens": self.new_tokens, "temperature": 0, "stream": True}
        return given | rest | {"stream_options": {"include_usage": True}} | self.extra

    def tokens_of(self, met: Met) -> int:
        """Of what has come, also before the server has told how many there are."""
        return self.count(met.text) if self.count and met.text else len(met.chunks)


@dataclass
class Met:
    """What one request met; seconds on the clock of the load.

    chunks: when each piece of text came; cut: the level's time was up before the answer was whole.
    """

    began: float
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: str | None = None
    cut: bool = False
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load: closed loop at a concurrency, or open loop at requests a second."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.concurrency} clients" if self.rate is None else f"{self.rate:g} requests/s"


def make_prompts(count: int, tokens: tuple[int, int], seed: int) -> list[str]:
    """English-like texts of about `tokens` (fewest, most) tokens; the same ones for the same seed."""
    draw = random.Random(seed)
    texts = _texts(seed)
    found = []
    for _ in range(count):
        wanted = round(draw.randint(*tokens) * CHARACTERS_A_TOKEN)
        text = next(texts)
        while len(text) < wanted:
            text += " " + next(texts)
        found.append(text[:wanted].rsplit(" ", 1)[0])
    return found


def _texts(seed: int) -> Iterator[str]:
    for row in alpaca_rows(1 << 60, seed):
        yield " ".join(filter(None, row.values()))


async def run_level(
    client: EventClient,
    asked: Asked,
    level: Level,
    prompts: Sequence[str],
    seed: int,
    *,
    limit_s: float | None = None,
) -> list[Met]:
    """Send every prompt once; what each request met, in the order of the prompts.

    limit_s: when so many seconds are over, answers that are not whole are cut and no more requests are sent.
    """
    began = time.perf_counter()
    end = began + (limit_s or math.inf)
    if level.rate is None:
        turns = asyncio.Semaphore(level.concurrency or 1)

        async def in_turn(prompt: str) -> Met:
            async with turns:
                return await _ask(client, asked, prompt, end)

        return list(await asyncio.gather(*(in_turn(prompt) for prompt in prompts)))
    draw, at = random.Random(seed), began
    tasks = []
    for prompt in prompts:
        tasks.append(_ask_at(client, asked, prompt, at, end))
        at += draw.expovariate(level.rate)
    return list(await asyncio.gather(*tasks))


async def _ask_at(client: EventClient, asked: Asked, prompt: str, moment: float, end: float) -> Met:
    await asyncio.sleep(max(0.0, min(moment, end) - time.perf_counter()))
    return await _ask(client, asked, prompt, end)


async def _ask(client: EventClient, asked: Asked, prompt: str, end: float) -> Met:
    met = Met(time.perf_counter())
    if met.began < end:
        await _receive(client, asked, prompt, met, end)
    else:
        met.cut = True
    met.ended = time.perf_counter()
    if met.failure is None and not met.output_tokens:
        met.output_tokens = asked.tokens_of(met)
    return met


async def _receive(client: EventClient, asked: Asked, prompt: str, met: Met, end: float) -> None:
    try:
        async with asyncio.timeout(None if math.isinf(end) else end - met.began):
            async for data in client.events(asked.path(), asked.body(prompt)):
                _note(met, data)
    except NetError as error:
        met.failure = error.what
    except TimeoutError:
        met.cut = True


def _note(met: Met, data: str) -> None:
    if data == "[DONE]":
        return
    try:
        found = json.loads(data)
        if error := found.get("error"):
            met.failure = str(error.get("message", error) if isinstance(error, dict) else error)
        for choice in found.get("choices") or ():
            if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                met.chunks.append(time.perf_counter())
                met.text += text
        if usage := found.get("usage"):
            met.prompt_tokens, met.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    except (ValueError, TypeError, AttributeError, KeyError):
        met.failure = f"an event is not one of OpenAI's: {data[:100]}"


# -- figures ----------------------------------------------------------------------------------------------


def figures(level: Level, mets: Sequence[Met]) -> dict[str, Any]:
    """Of one load: rates over the time from the first request to the last answer, and times in seconds.

    first_token_s: from asking to the first text; between_tokens_s: from one piece of text to the next;
    whole_s: from asking to the end. Each has p50, p95 and p99. Answers that were cut are neither failed nor
    in whole_s; what had come of them counts, and `unfinished` says how many there are.
    """
    good = [met for met in mets if met.failure is None]
    whole = [met for met in good if not met.cut]
    wall_s = max(met.ended for met in mets) - min(met.began for met in mets)
    output_tokens = sum(met.output_tokens for met in good)
    between = [later - earlier for met in good for earlier, later in pairwise(met.chunks)]
    return {
        "mode": "closed" if level.rate is None else "open",
        "concurrency": level.concurrency,
        "rate": level.rate,
        "requests": len(mets),
        "failed": len(mets) - len(good),
        "unfinished": len(good) - len(whole),
        "failures": sorted({met.failure for met in mets if met.failure})[:5],
        "prompt_tokens": sum(met.prompt_tokens for met in good),
        "output_tokens": output_tokens,
        "wall_s": wall_s,
        "tokens_per_s": output_tokens / wall_s,
        "requests_per_s": len(whole) / wall_s,
        "first_token_s": percentiles([met.chunks[0] - met.began for met in good if met.chunks]),
        "between_tokens_s": percentiles(between),
        "whole_s": percentiles([met.ended - met.began for met in whole]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99, interpolated linearly; None for no values."""
    if not values:
        return None
    if len(values) == 1:
        return {f"p{q}": values[0] for q in QUANTILES}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{q}": cuts[q - 1] for q in QUANTILES}
