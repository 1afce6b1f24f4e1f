"""tunesmith bench serve: load on an endpoint, or on a server started for it; a table, a picture, figures."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient
from tunesmith.core.paths import write_json
from tunesmith.core.progress import say
from tunesmith.core.units import GIB
from tunesmith.workflows.bench_load import Asked, Level, figures, make_prompts, run_level
from tunesmith.workflows.bench_measure import Usage
from tunesmith.workflows.bench_serve_report import curves_svg, table
from tunesmith.workflows.endpoint import serving

WARM_UP = 2
WATCH_S = 0.1


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """target: the URL of a server, or what `tunesmith serve` takes; rates: requests a second, open loop;
    requests: of each level, at least two for every client; prompt_tokens: (fewest, most), about."""

    target: str
    model: str | None = None
    api_key: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    concurrency: tuple[int, ...] = (1, 8, 32)
    rates: tuple[float, ...] = ()
    requests: int = 8
    new_tokens: int = 128
    prompt_tokens: tuple[int, int] = (60, 300)
    ignore_eos: bool = True
    seed: int = 0
    output: Path = Path("bench-serve")
    serve_args: tuple[str, ...] = ()


def bench_serve(options: LoadOptions) -> dict[str, Any]:
    """Measure every level; the figures, and files results.json and latency.svg in the output folder.

    Raises UserError for a server that is not there or has no such model, and when every request fails.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    if options.target.startswith(("http://", "https://")):
        found = measure(options.target.removesuffix("/").removesuffix("/v1"), options)
    else:
        found = _measure_own(options)
    found["table"] = table([found])
    write_json(options.output / "results.json", found)
    (options.output / "latency.svg").write_text(curves_svg([found]), encoding="utf-8")
    return found


def _measure_own(options: LoadOptions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        began = time.perf_counter()
        with serving(options.target, log=Path(folder) / "server.log", args=options.serve_args) as endpoint:
            ready_s = time.perf_counter() - began
            usage, asking = Usage(), LoadOptions(**{**vars(options), "api_key": endpoint.api_key})
            with watched(endpoint.pid, usage):
                found = measure(endpoint.url, asking)
    return found | {"ready_s": ready_s, "peak_gib": usage.peak_bytes / GIB}


@contextmanager
def watched(pid: int, usage: Usage) -> Iterator[None]:
    """Look at a process and its children ten times a second while the block runs."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(WATCH_S):
            usage.look(pid)

    watcher = threading.Thread(target=look, name="bench-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        usage.look(pid)


def measure(url: str, options: LoadOptions, tell: Callable[[str], None] = say) -> dict[str, Any]:
    """Every level on the server at `url`, one after the other, after a warm-up."""
    return asyncio.run(_measure(url, options, tell))


async def _measure(url: str, options: LoadOptions, tell: Callable[[str], None]) -> dict[str, Any]:
    client = EventClient(url, api_key=options.api_key)
    try:
        asked = await _asked(client, url, options)
        await run_level(client, asked, Level(concurrency=WARM_UP), make_prompts(WARM_UP, (60, 60), -1), 0)
        rows = []
        for number, level in enumerate(_levels(options)):
            count = max(options.requests, 2 * (level.concurrency or 0))
            prompts = make_prompts(count, options.prompt_tokens, options.seed + number)
            rows.append(figures(level, await run_level(client, asked, level, prompts, options.seed)))
            _check(url, level, rows[-1])
            tell(f"{level.name}: {rows[-1]['tokens_per_s']:.1f} tokens/s")
    finally:
        await client.close()
    return {"system": options.target, "model": asked.model, "new_tokens": asked.new_tokens, "levels": rows}


async def _asked(client: EventClient, url: str, options: LoadOptions) -> Asked:
    """Raises UserError for a model that the server does not have."""
    names = [str(card["id"]) for card in (await client.get("/v1/models")).get("data") or ()]
    model = options.model or (names[0] if names else None)
    if model is None or (options.model and names and options.model not in names):
        raise UserError(
            f"--model {options.model}: {url} has {', '.join(names) or 'no model'}",
            hint="give --model one of its names",
        )
    extra = {"ignore_eos": True} if options.ignore_eos else {}
    return Asked(model=model, endpoint=options.endpoint, new_tokens=options.new_tokens, extra=extra)


def _levels(options: LoadOptions) -> list[Level]:
    closed: Sequence[Level] = [Level(concurrency=count) for count in options.concurrency]
    return [*closed, *(Level(rate=rate) for rate in options.rates)]


def _check(url: str, level: Level, row: dict[str, Any]) -> None:
    if row["failed"] == row["requests"]:
        raise UserError(
            f"{url}: every request of {level.name} failed: {row['failures'][0]}",
            hint="look at the server's log; for a server that does not know ignore_eos, --no-ignore-eos",
        )
