"""Malformed requests against a real server: no 5xx, no hang, no leak.

    python -m bench.serve.malformed MODEL_FOLDER
    python -m bench.serve.malformed MODEL_FOLDER --requests 20000 --seed 7 --connections 8 --bound-mib 32

Starts `tunesmith serve` on the model, sends it the requests of tests/malformed.py over a few connections, and
prints how many were answered with which status, every answer that is a fault with its request, and the
resident memory of the gateway's and the engine's process after a tenth, a half and all of them. Exits with 1
at a fault, at a request without an end (--hang-s), when something runs on afterwards, when the server told of
an error of its own, or when a process grew by more than --bound-mib in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tests.malformed import Malformed, Request, fault
from tunesmith.core.net import EventClient
from tunesmith.workflows.endpoint import Endpoint, serving
from tunesmith.workflows.verify import descendants

MAX_LENGTH = 96
PATIENCE_S = 0.2
"""How long a broken request may stay without an answer before the client says that nothing more comes."""
ANSWERLESS = frozenset({"headers"})
"""Whole requests that the server may cut off while they are sent."""


@dataclass
class Report:
    """statuses: answers by status, 0 for a connection that ended without one."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[Request, str]] = field(default_factory=list)
    memory_mib: dict[int, dict[str, float]] = field(default_factory=dict)

    def growth_mib(self) -> dict[str, float]:
        """Of each process, from the middle mark to the last."""
        *_, middle, last = self.memory_mib.values()
        return {name: round(last[name] - middle[name], 1) for name in last}


class Connection:
    """Sends requests one after the other, over one connection as long as the server keeps it."""

    def __init__(self, endpoint: Endpoint, hang_s: float) -> None:
        address = endpoint.url.removeprefix("http://").split(":")
        self._host, self._port = address[0], int(address[1])
        self._key, self._hang_s = endpoint.api_key, hang_s
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: Request) -> tuple[list[int], str | None]:
        """(the statuses that came back, what is wrong with them)."""
        try:
            async with asyncio.timeout(self._hang_s):
                if request.cut:
                    return await self._send_broken(request)
                return await self._send_whole(request)
        except TimeoutError:
            self.close()
            return [], f"no end within {self._hang_s:g} s"

    async def _send_whole(self, request: Request) -> tuple[list[int], str | None]:
        for again in (True, False):
            used = self._open is not None
            try:
                status, kind, text = await self._answer(request)
                return [status], fault(status, kind, text)
            except (ConnectionError, asyncio.IncompleteReadError):
                self.close()
                # A kept connection may end at any moment; a new one has to answer.
                if not (used and again):
                    break
        return [0], None if request.kind in ANSWERLESS else "closed without an answer"

    async def _answer(self, request: Request) -> tuple[int, str, str]:
        if self._open is None:
            self._open = await asyncio.open_connection(self._host, self._port, limit=2**20)
        reader, writer = self._open
        writer.write(request.wire(self._key))
        await writer.drain()
        status, lines = 100, {}
        while status == 100:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
            lines = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
            }
        body = await _body(reader, lines)
        if lines.get("connection") == "close":
            self.close()
        return status, lines.get("content-type", ""), body.decode()

    async def _send_broken(self, request: Request) -> tuple[list[int], str | None]:
        """On a connection of its own, to its end."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        taken = bytearray()
        try:
            writer.write(request.wire(self._key))
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    while part := await reader.read(65536):
                        taken += part
            if writer.can_write_eof():
                writer.write_eof()
            taken += await reader.read()
        except (ConnectionError, OSError):
            pass  # reset by the server, which is an end
        finally:
            writer.transport.abort()
        statuses = [int(found) for found in re.findall(rb"^HTTP/1\.1 ([2-5]\d\d) ", taken, re.MULTILINE)]
        bad = any(status >= 500 for status in statuses)
        return statuses or [0], taken.decode("latin-1") if bad else None

    def close(self) -> None:
        if self._open is not None:
            self._open[1].transport.abort()
            self._open = None


async def _body(reader: asyncio.StreamReader, lines: dict[str, str]) -> bytes:
    if "chunked" not in lines.get("transfer-encoding", ""):
        return await reader.readexactly(int(lines.get("content-length", "0")))
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def memory_of(pid: int) -> dict[str, float]:
    """The gateway's, and of the processes that it started that of the largest, which is the engine's."""
    engines = [resident_mib(child) for child in descendants(pid)]
    return {"gateway": resident_mib(pid)} | ({"engine": max(engines)} if engines else {})


async def storm(
    endpoint: Endpoint, *, seed: int, requests: int, connections: int = 8, hang_s: float = 120.0
) -> Report:
    """Send them all; memory is looked at after a tenth, a half, and all of them."""
    report, made = Report(), Malformed(seed)
    endless = iter(made.any, None)
    for mark in sorted({max(1, requests // 10), max(1, requests // 2), requests}):
        coming = islice(endless, mark - report.kinds.total())
        senders = [Connection(endpoint, hang_s) for _ in range(connections)]
        await asyncio.gather(*(_work(sender, coming, report) for sender in senders))
        report.memory_mib[mark] = memory_of(endpoint.pid)
    return report


async def _work(sender: Connection, coming: Iterator[Request | None], report: Report) -> None:
    for request in coming:
        assert request is not None
        report.kinds[request.kind] += 1
        statuses, wrong = await sender.send(request)
        report.statuses.update(statuses)
        if wrong is not None:
            report.faults.append((request, wrong))
            print(f"FAULT {wrong[:2000]}\n  {request!r:.3000}", flush=True)
    sender.close()


async def left_over(endpoint: Endpoint, hang_s: float) -> str | None:
    """What the server still has under way when nobody asks any more; None: nothing."""
    client = EventClient(endpoint.url, api_key=endpoint.api_key)
    end = time.monotonic() + hang_s
    try:
        while True:
            state: dict[str, Any] = await client.get("/ready")
            if not (state["running"] or state["waiting"] or state["cache_tokens"]):
                return None
            if time.monotonic() > end:
                return json.dumps(state)
            await asyncio.sleep(0.2)
    finally:
        await client.close()


def verdict(report: Report, left: str | None, bound_mib: float) -> list[str]:
    """Why it is not as it must be; empty where it is."""
    grown = {name: mib for name, mib in report.growth_mib().items() if mib > bound_mib}
    reasons = [f"{len(report.faults)} faults"] if report.faults else []
    reasons += [f"{name} grew by {mib} MiB in the second half" for name, mib in grown.items()]
    return reasons + ([f"something runs on: {left}"] if left else [])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--hang-s", type=float, default=120.0)
    parser.add_argument("--bound-mib", type=float, default=32.0)
    options = parser.parse_args(argv)
    args = ("--model-name", "tiny", "--max-length", str(MAX_LENGTH))
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(str(options.model), log=Path(folder) / "log", args=args) as endpoint,
    ):
        report, left = asyncio.run(_run(endpoint, options))
        told = (Path(folder) / "log").read_text(errors="replace").partition("Traceback")
    reasons = verdict(report, left, options.bound_mib)
    if told[1]:
        reasons.append("the server tells of an error of its own")
        print(told[1] + told[2][:5000])
    print(json.dumps(_told(report) | {"seed": options.seed, "failed": reasons}, indent=2))
    return 1 if reasons else 0


async def _run(endpoint: Endpoint, options: argparse.Namespace) -> tuple[Report, str | None]:
    report = await storm(
        endpoint,
        seed=options.seed,
        requests=options.requests,
        connections=options.connections,
        hang_s=options.hang_s,
    )
    return report, await left_over(endpoint, options.hang_s)


def _told(report: Report) -> dict[str, Any]:
    return {
        "requests": report.kinds.total(),
        "kinds": dict(sorted(report.kinds.items())),
        "statuses": dict(sorted(report.statuses.items())),
        "memory_mib": report.memory_mib,
        "growth_mib": report.growth_mib(),
    }


if __name__ == "__main__":
    sys.exit(main())
