"""tunesmith bench serve: load on an endpoint, or on a server started for it; a table, a picture, figures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient, NetError
from tunesmith.core.paths import write_json
from tunesmith.core.progress import say
from tunesmith.core.units import GIB
from tunesmith.workflows.bench_load import Asked, Level, figures, make_prompts, run_level
from tunesmith.workflows.bench_measure import family
from tunesmith.workflows.bench_serve_report import curves_svg, table
from tunesmith.workflows.endpoint import serving

WARM_UP = 2
WATCH_S = 1.0  # each look takes 16 ms for a process of 1.2 GiB, from what is measured
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """target: the URL of a server, or what `tunesmith serve` takes; rates: requests a second, open loop.

    requests: of each level in turn, or one number for all, which means at least two for every client;
    limit_s: the most seconds of a level; prompt_tokens: (fewest, most), about; count: tokens of a text, for
    servers that do not tell how many they sent.
    """

    target: str
    model: str | None = None
    api_key: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    concurrency: tuple[int, ...] = (1, 8, 32)
    rates: tuple[float, ...] = ()
    requests: tuple[int, ...] = (8,)
    limit_s: float | None = None
    new_tokens: int = 128
    prompt_tokens: tuple[int, int] = (60, 300)
    ignore_eos: bool = True
    seed: int = 0
    output: Path = Path("bench-serve")
    serve_args: tuple[str, ...] = ()
    count: Callable[[str], int] | None = None

    def levels(self) -> list[tuple[Level, int]]:
        """Each level and its number of requests. Raises UserError when there are not as many of both."""
        levels = [
            *(Level(concurrency=count) for count in self.concurrency),
            *(Level(rate=rate) for rate in self.rates),
        ]
        if not levels:
            raise UserError("there is no load to measure", hint="give --concurrency or --rate")
        if len(self.requests) == 1:
            return [(level, max(self.requests[0], 2 * (level.concurrency or 0))) for level in levels]
        if len(self.requests) != len(levels):
            raise UserError(
                f"--requests {','.join(map(str, self.requests))}: are {len(self.requests)} numbers for "
                f"{len(levels)} levels",
                hint="give one number, or one for each of --concurrency and --rate",
            )
        return list(zip(levels, self.requests, strict=True))


@dataclass
class PeakMemory:
    """The most that processes and their children held together. A page that several of them share counts once
    (PSS, proportional set size)."""

    bytes: int = 0

    def look(self, *pids: int) -> None:
        self.bytes = max(self.bytes, sum(_pss(one) for pid in pids for one in family(pid)))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def bench_serve(options: LoadOptions) -> dict[str, Any]:
    """Measure every level; the figures, and files results.json and latency.svg in the output folder, where
    the log of a server that was started goes too.

    Raises UserError for a server that is not there or has no such model, and when every request fails.
    """
    options.levels()
    if options.target.startswith(("http://", "https://")):
        found = measure(options.target.removesuffix("/").removesuffix("/v1"), options)
    else:
        found = _measure_own(options)
    found["table"] = table([found])
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "results.json", found)
    (options.output / "latency.svg").write_text(curves_svg([found]), encoding="utf-8")
    return found


def _measure_own(options: LoadOptions) -> Row:
    began, log = time.perf_counter(), options.output / "server.log"
    with serving(options.target, log=log, args=options.serve_args) as endpoint:
        ready_s = time.perf_counter() - began
        with watched(endpoint.pid) as peak:
            found = measure(endpoint.url, replace(options, api_key=endpoint.api_key))
    return found | {"ready_s": ready_s, "peak_gib": peak.bytes / GIB}


@contextmanager
def watched(*pids: int) -> Iterator[PeakMemory]:
    """Look at the processes and their children once a second while the block runs."""
    done, peak = threading.Event(), PeakMemory()

    def look() -> None:
        while not done.wait(WATCH_S):
            peak.look(*pids)

    watcher = threading.Thread(target=look, name="bench-watch", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.look(*pids)


def measure(url: str, options: LoadOptions, tell: Callable[[str], None] = say) -> dict[str, Any]:
    """Every level on the server at `url`, one after the other, after a warm-up."""
    return asyncio.run(_measure(url, options, tell))


async def _measure(url: str, options: LoadOptions, tell: Callable[[str], None]) -> dict[str, Any]:
    client = EventClient(url, api_key=options.api_key)
    try:
        asked = await _asked(client, url, options)
        warm = Level(concurrency=WARM_UP)
        await run_level(client, asked, warm, make_prompts(WARM_UP, (60, 60), -1), 0, limit_s=options.limit_s)
        rows = []
        for number, (level, count) in enumerate(options.levels()):
            prompts = make_prompts(count, options.prompt_tokens, options.seed + number)
            mets = await run_level(client, asked, level, prompts, options.seed, limit_s=options.limit_s)
            rows.append(figures(level, mets))
            _check(url, level, rows[-1])
            tell(f"{level.name}: {rows[-1]['tokens_per_s']:.1f} tokens/s")
    finally:
        await client.close()
    return {"system": options.target, "model": asked.model, "new_tokens": asked.new_tokens, "levels": rows}


async def _asked(client: EventClient, url: str, options: LoadOptions) -> Asked:
    """Raises UserError for a model that the server does not have."""
    names = await _model_names(client, url)
    model = options.model or (names[0] if names else None)
    if model is None or (options.model and names and options.model not in names):
        raise UserError(
            f"--model {options.model}: {url} has {', '.join(names) or 'no model'}",
            hint="give --model one of its names",
        )
    return Asked(
        model=model,
        endpoint=options.endpoint,
        new_tokens=options.new_tokens,
        extra={"ignore_eos": True} if options.ignore_eos else {},
        count=options.count,
    )


async def _model_names(client: EventClient, url: str) -> list[str]:
    """Raises UserError when no OpenAI-compatible server answers at `url`, or none without a key."""
    try:
        found = await client.get("/v1/models")
        return [str(card["id"]) for card in found.get("data") or ()]
    except NetError as error:
        if error.status in (401, 403):
            raise UserError(error.what, hint="give the server's key: --api-key") from None
        raise UserError(error.what, hint="is an OpenAI-compatible server up at this address?") from None
    except (AttributeError, TypeError, KeyError):
        raise UserError(f"{url}/v1/models: the answer is not a list of models") from None


def _check(url: str, level: Level, row: Row) -> None:
    if row["failed"] == row["requests"]:
        raise UserError(
            f"{url}: every request of {level.name} failed: {row['failures'][0]}",
            hint="look at the server's log; for a server that does not know ignore_eos, --no-ignore-eos",
        )
