"""Malformed requests over real connections: the short form of `python -m bench.serve.malformed`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.serve.malformed import MAX_LENGTH, left_over, storm
from tests.e2e.test_serve import start, stop
from tunesmith.workflows.endpoint import Endpoint


def test_broken_requests_are_answered_or_ended_and_leave_nothing(tiny: Path) -> None:
    args = ("--model-name", "tiny", "--max-length", str(MAX_LENGTH))
    running = start(tiny, *args, env={"TUNESMITH_API_KEY": "right-key"})
    try:
        endpoint = Endpoint(running.url, "right-key", running.process.pid)
        report = asyncio.run(storm(endpoint, seed=5, requests=250, hang_s=300))
        left = asyncio.run(left_over(endpoint, 300))
    finally:
        code, errors = stop(running)
    assert (report.faults, left) == ([], None)
    assert {200, 400, 401, 404, 405, 415, 431} <= set(report.statuses), report.statuses
    assert len(report.kinds) == 10 and report.kinds.total() == 250
    assert code == 0 and "Traceback" not in errors
