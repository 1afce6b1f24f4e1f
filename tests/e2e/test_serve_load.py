"""500 connections at once: slow readers, clients that leave in mid-stream, keys over their quota."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tunesmith.core.net import EventClient
from tunesmith.workflows.endpoint import Endpoint, serving

STREAMS, LEAVERS, SLOW, OVER_QUOTA = 240, 200, 20, 40
NEW_TOKENS = 24
MODEL = "tiny"


@dataclass
class Outcome:
    """How a connection ended: "whole", "left", or the status of a refusal."""

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


def body(number: int) -> dict[str, Any]:
    prompt = [11 + number % 300, 7, 19] * (3 + number % 20)
    rest = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"model": MODEL, "prompt": prompt} | rest


async def connection(url: str, key: str, number: int, *, leaves: bool = False, slow: bool = False) -> Outcome:
    host, port = url.removeprefix("http://").split(":")
    limit = 2**10 if slow else 2**16
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    try:
        writer.write(request(key, body(number)))
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            rest = (await reader.read()).decode()
            return Outcome(
                str(status), error=json.loads(rest[rest.index("{") : rest.rindex("}") + 1])["error"]
            )
        return await _read(reader, leaves=leaves, slow=slow)
    finally:
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader, *, leaves: bool, slow: bool) -> Outcome:
    tokens = 0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return Outcome("whole", tokens)
        if line.startswith(b"data: "):
            found = json.loads(line[6:])
            if "error" in found:
                return Outcome("error", tokens, found["error"])
            tokens += 1
            if leaves and tokens == 3:
                return Outcome("left", tokens)
            if slow:
                await asyncio.sleep(0.2)
    return Outcome("cut", tokens)


async def settled(client: EventClient) -> dict[str, Any]:
    """The engine's state once nothing runs any more."""
    for _ in range(600):
        found: dict[str, Any] = await client.get("/ready")
        if not (found["running"] or found["waiting"] or found["cache_tokens"]):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"something runs on: {found}")


async def storm(endpoint: Endpoint, spent: str) -> tuple[list[Outcome], list[float], dict[str, Any]]:
    """(how each connection ended, latencies of short requests meanwhile, the state afterwards)."""
    client = EventClient(endpoint.url, api_key=endpoint.api_key)
    first: dict[str, Any] = await client.get("/ready")
    key, url = endpoint.api_key, endpoint.url
    tasks = [connection(url, key, n) for n in range(STREAMS)]
    tasks += [connection(url, key, n, leaves=True) for n in range(LEAVERS)]
    tasks += [connection(url, key, n, slow=True) for n in range(SLOW)]
    tasks += [connection(url, spent, n) for n in range(OVER_QUOTA)]
    running = asyncio.gather(*tasks)
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


@pytest.mark.slow
def test_500_connections_and_everyone_gets_an_answer(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    args = ("--rate", "1/day", "--file", str(keys))
    spent = cli.json("keys", "add", "spent", *args)["key"]
    more = ("--model-name", MODEL, "--keys-file", str(keys), "--cache-tokens", "4096")
    with serving(str(tiny), log=tmp_path / "log", args=more) as endpoint:
        before = asyncio.run(connection(endpoint.url, spent, 0))
        assert before.kind == "whole"
        outcomes, waits, last = asyncio.run(storm(endpoint, spent))
        again = asyncio.run(connection(endpoint.url, endpoint.api_key, 1))
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert kinds == {"whole": STREAMS + SLOW, "left": LEAVERS, "429": OVER_QUOTA}, kinds
    refused = [outcome.error for outcome in outcomes if outcome.kind == "429"]
    assert {error["code"] for error in refused} == {"rate_limit_exceeded"}
    assert again.kind == "whole"
    # Whoever left was computed no further than a few tokens on.
    assert last["new_generated"] < (STREAMS + SLOW + 1) * NEW_TOKENS + LEAVERS * NEW_TOKENS * 0.9
    assert last["cache_tokens"] == 0 and last["cancelled"] >= LEAVERS * 0.5
    p95 = statistics.quantiles(waits, n=20)[-1] if len(waits) > 1 else waits[0]
    print(f"p95 of {len(waits)} requests beside the storm: {p95 * 1000:.0f} ms")
