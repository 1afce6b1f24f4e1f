"""Malformed requests, thousands of them, against the real engine: never a 5xx, never an answer that hangs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.malformed import Malformed, Request, fault
from tests.unit.serve.served import served


async def send(client: httpx.AsyncClient, request: Request) -> httpx.Response:
    return await client.request(
        request.method, request.path, content=request.content, headers=list(request.headers)
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_malformed_request_is_the_servers_fault(smol: Path, tiny: Path, seed: int) -> None:
    async def run() -> Counter[int]:
        fuzz, seen = Malformed(seed), Counter[int]()
        async with served(smol, tiny) as (client, engine):
            for _ in range(70):
                batch = [fuzz.request() for _ in range(16)]
                answers = await asyncio.wait_for(asyncio.gather(*(send(client, r) for r in batch)), 120)
                for request, answer in zip(batch, answers, strict=True):
                    wrong = fault(answer.status_code, answer.headers.get("content-type", ""), answer.text)
                    assert wrong is None, (request, wrong)
                    seen[answer.status_code] += 1
            end = time.monotonic() + 10
            while engine.status().running and time.monotonic() < end:
                await asyncio.sleep(0.01)
            assert engine.status().alive
            assert (engine.status().running, engine.status().waiting) == (0, 0)
        return seen

    seen = asyncio.run(run())
    # Both kinds were met: what is refused, and what is odd but good.
    assert seen[400] > 300
    assert seen[200] > 100
