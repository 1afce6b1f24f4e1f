"""500 connections at once: slow readers, clients that leave in mid-stream, keys over their quota; then the
engine's process killed, and the server ended, under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import Cli
from tunesmith.core.net import EventClient
from tunesmith.workflows.endpoint import Endpoint, serving

# Half of those that are answered leave in mid-stream.
STREAMS, LEAVERS, SLOW, OVER_RATE, OVER_QUOTA = 210, 230, 20, 20, 20
KILLED, DRAINED, BEGUN = 100, 60, 8
NEW_TOKENS = 24
MODEL = "tiny"


@dataclass
class Outcome:
    """How a connection ended: "whole", "short", "left", "error", "cut", or the status of a refusal."""

    kind: str
    tokens: int = 0
    error: dict[str, Any] = field(default_factory=dict)


def request(key: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def body(number: int, tokens: int) -> dict[str, Any]:
    prompt = [11 + number % 300, 7, 19] * (3 + number % 20)
    rest = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"model": MODEL, "prompt": prompt} | rest


async def connection(
    url: str,
    key: str,
    number: int,
    *,
    leaves: bool = False,
    gate: asyncio.Event | None = None,
    tokens: int = NEW_TOKENS,
) -> Outcome:
    """leaves: after three tokens. gate: reads no further than the first token before it is open."""
    host, port = url.removeprefix("http://").split(":")
    limit = 2**10 if gate else 2**16
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    try:
        writer.write(request(key, body(number, tokens)))
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            rest = (await reader.read()).decode()
            return Outcome(
                str(status), error=json.loads(rest[rest.index("{") : rest.rindex("}") + 1])["error"]
            )
        return await _read(reader, leaves=leaves, gate=gate)
    finally:
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader, *, leaves: bool, gate: asyncio.Event | None) -> Outcome:
    tokens, finish = 0, None
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return Outcome("whole" if finish == "length" else "short", tokens)
        if line.startswith(b"data: "):
            found = json.loads(line[6:])
            if "error" in found:
                return Outcome("error", tokens, found["error"])
            tokens, finish = tokens + 1, found["choices"][0]["finish_reason"]
            if leaves and tokens == 3:
                return Outcome("left", tokens)
            if gate is not None:
                await gate.wait()
    return Outcome("cut", tokens)


async def settled(client: EventClient) -> dict[str, Any]:
    """The engine's state once nothing runs any more."""
    for _ in range(600):
        found: dict[str, Any] = await client.get("/ready")
        if not (found["running"] or found["waiting"] or found["cache_tokens"]):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"something runs on: {found}")


async def everybody(endpoint: Endpoint, over_rate: str, over_quota: str) -> list[Outcome]:
    """How each connection ended. Slow readers read on when all others have ended: they hold up nobody."""
    key, url, gate = endpoint.api_key, endpoint.url, asyncio.Event()
    slow = asyncio.gather(*(connection(url, key, n, gate=gate) for n in range(SLOW)))
    quick = [connection(url, key, n) for n in range(STREAMS)]
    quick += [connection(url, key, n, leaves=True) for n in range(LEAVERS)]
    quick += [connection(url, over_rate, n) for n in range(OVER_RATE)]
    quick += [connection(url, over_quota, n) for n in range(OVER_QUOTA)]
    ended = await asyncio.gather(*quick)
    assert not slow.done()
    gate.set()
    return ended + await slow


async def storm(endpoint: Endpoint, *spent: str) -> tuple[list[Outcome], list[float], dict[str, Any]]:
    """(how each connection ended, latencies of short requests meanwhile, the state afterwards)."""
    client = EventClient(endpoint.url, api_key=endpoint.api_key)
    first: dict[str, Any] = await client.get("/ready")
    running = asyncio.create_task(everybody(endpoint, *spent))
    waits: list[float] = []
    while not running.done():
        began = time.perf_counter()
        # What needs no engine: it must not wait for those that do.
        await client.post("/tokenize", {"model": MODEL, "prompt": "How long does this take?"})
        waits.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)
    outcomes = await running
    last = await settled(client)
    last["new_generated"] = last["generated_tokens"] - first["generated_tokens"]
    await client.close()
    return outcomes, waits, last


async def under_load(endpoint: Endpoint, count: int, tokens: int) -> list[asyncio.Task[Outcome]]:
    """Streams, some of which have begun while others are in line."""
    key, url = endpoint.api_key, endpoint.url
    tasks = [asyncio.create_task(connection(url, key, n, tokens=tokens)) for n in range(count)]
    client = EventClient(url, api_key=key)
    state: dict[str, Any] = {"running": 0}
    while state["running"] < BEGUN and not all(task.done() for task in tasks):
        await asyncio.sleep(0.02)
        state = await client.get("/ready")
    await client.close()
    return tasks


async def killed(endpoint: Endpoint) -> tuple[Counter[str], set[str]]:
    """How streams end whose engine is killed, and the codes of their errors; then a new one is whole."""
    tasks = await under_load(endpoint, KILLED, 200)
    for engine in warm.children(endpoint.pid):
        os.kill(engine, signal.SIGKILL)
    outcomes = await asyncio.gather(*tasks)
    for _ in range(1200):
        again = await connection(endpoint.url, endpoint.api_key, 1)
        if again.kind == "whole":
            break
        assert again.kind in ("503", "error"), again
        await asyncio.sleep(0.1)
    assert again.kind == "whole"
    return Counter(o.kind for o in outcomes), {o.error["code"] for o in outcomes if o.error}


async def drained(endpoint: Endpoint) -> tuple[Counter[str], Outcome]:
    """How streams end whose server is told to end, and how one that comes then."""
    tasks = await under_load(endpoint, DRAINED, 100)
    os.kill(endpoint.pid, signal.SIGTERM)
    late = Outcome("whole")
    while late.kind == "whole":  # the signal is on its way
        late = await connection(endpoint.url, endpoint.api_key, 1, tokens=1)
    outcomes = await asyncio.gather(*tasks)
    return Counter(o.kind for o in outcomes), late


@pytest.mark.slow
def test_500_connections_and_everyone_gets_an_answer(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    limits = {"rate": ("--rate", "1/day"), "quota": ("--tokens-per-day", "1")}
    spent = [
        cli.json("keys", "add", name, *more, "--file", str(file))["key"] for name, more in limits.items()
    ]
    args = ("--model-name", MODEL, "--keys-file", str(file), "--cache-tokens", "4096", "--grace", "300")
    with serving(str(tiny), log=tmp_path / "log", args=args) as endpoint:
        assert [asyncio.run(connection(endpoint.url, key, 0)).kind for key in spent] == ["whole"] * 2
        outcomes, waits, last = asyncio.run(storm(endpoint, *spent))
        again = asyncio.run(connection(endpoint.url, endpoint.api_key, 1))
        after_kill, codes = asyncio.run(killed(endpoint))
        at_end, late = asyncio.run(drained(endpoint))
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert kinds == {"whole": STREAMS + SLOW, "left": LEAVERS, "429": OVER_RATE + OVER_QUOTA}, kinds
    refused = Counter(outcome.error["code"] for outcome in outcomes if outcome.kind == "429")
    assert refused == {"rate_limit_exceeded": OVER_RATE, "insufficient_quota": OVER_QUOTA}
    assert again.kind == "whole"
    # Whoever left was computed no further than a few tokens on.
    assert last["new_generated"] < (STREAMS + SLOW + 1) * NEW_TOKENS + LEAVERS * NEW_TOKENS * 0.9
    assert last["cache_tokens"] == 0 and last["cancelled"] >= LEAVERS * 0.5
    # None is cut off without a word: an error ends a stream, a refusal comes before it.
    assert after_kill.total() == KILLED and after_kill["error"] > 0
    assert set(after_kill) <= {"error", "503", "whole"} and codes == {"engine_unavailable"}
    assert at_end == {"whole": DRAINED}
    assert late.kind == "503" and late.error["code"] == "server_draining"
    p95 = statistics.quantiles(waits, n=20)[-1] if len(waits) > 1 else waits[0]
    print(f"p95 of {len(waits)} requests beside the storm: {p95 * 1000:.0f} ms")
