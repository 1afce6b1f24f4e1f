"""Load: prompts, times of arrival, and the figures of what requests met."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import numpy as np
import pytest

from tunesmith.core.net import EventClient
from tunesmith.workflows.bench_load import (
    Asked,
    Level,
    Met,
    figures,
    make_prompts,
    percentiles,
    run_level,
)
from tunesmith.workflows.bench_serve_report import curves_svg, table


def test_percentiles_are_numpys() -> None:
    draw = random.Random(0)
    for count in (2, 3, 10, 257):
        values = [draw.expovariate(1.0) for _ in range(count)]
        wanted = np.percentile(values, [50, 95, 99])
        assert list((percentiles(values) or {}).values()) == pytest.approx(wanted)
    assert percentiles([]) is None and percentiles([2.0]) == {"p50": 2.0, "p95": 2.0, "p99": 2.0}


def test_prompts_have_the_lengths_and_are_the_same_for_the_same_seed() -> None:
    prompts = make_prompts(50, (60, 300), 3)
    assert prompts == make_prompts(50, (60, 300), 3) != make_prompts(50, (60, 300), 4)
    assert all(200 < len(prompt) <= 1350 for prompt in prompts)
    assert len({prompt[:20] for prompt in prompts}) == 50


def two() -> list[Met]:
    first = Met(10.0, [10.5, 10.6, 10.8], 11.0, prompt_tokens=7, output_tokens=4)
    return [
        first,
        Met(10.2, [11.2], 12.0, prompt_tokens=3, output_tokens=1),
        Met(10.0, ended=10.1, failure="no"),
    ]


def test_figures_by_hand() -> None:
    found = figures(Level(concurrency=2), two())
    assert (found["requests"], found["failed"], found["failures"]) == (3, 1, ["no"])
    assert found["unfinished"] == 0
    assert (found["prompt_tokens"], found["output_tokens"]) == (10, 5)
    assert found["wall_s"] == 2.0 and found["tokens_per_s"] == 2.5 and found["requests_per_s"] == 1.0
    assert found["first_token_s"]["p50"] == pytest.approx(0.75)
    assert found["between_tokens_s"]["p50"] == pytest.approx(0.15)
    assert found["whole_s"]["p50"] == pytest.approx(1.4)


def test_table_and_picture_name_every_load_and_escape_what_they_show() -> None:
    levels = [figures(Level(concurrency=2), two()), figures(Level(rate=0.5), two())]
    system = {"system": "a<b>", "new_tokens": 4, "levels": levels, "ready_s": 1.0, "peak_gib": 0.5}
    text = table([system])
    assert "2 clients" in text and "0.5 req/s" in text and "ready in 1.0 s" in text and "  no" in text
    picture = ElementTree.fromstring(curves_svg([system]))
    assert any((part.text or "").startswith("a<b>") for part in picture.iter())


@contextmanager
def server(*events: str, endless: bool = False) -> Iterator[str]:
    """Answers every request with these events; endless: and then with nothing, until it is closed."""
    closed = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write("".join(f"data: {event}\n\n" for event in events).encode())
            if endless:
                closed.wait()

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        closed.set()
        http.shutdown()
        http.server_close()


def load(url: str, asked: Asked, level: Level, count: int, limit_s: float | None = None) -> list[Met]:
    async def run() -> list[Met]:
        client = EventClient(url, timeout_s=20.0)
        try:
            return await run_level(client, asked, level, ["a"] * count, 0, limit_s=limit_s)
        finally:
            await client.close()

    return asyncio.run(run())


def test_an_open_loop_does_not_wait_for_answers_and_a_dead_server_is_a_failure() -> None:
    mets = load("http://127.0.0.1:9", Asked(model="m"), Level(rate=200.0), 20)
    assert len(mets) == 20 and all(met.failure for met in mets)
    assert [met.began for met in mets] == sorted(met.began for met in mets)


def test_a_level_ends_at_its_limit_and_what_has_come_counts() -> None:
    asked = Asked(model="m", count=len)
    with server('{"choices": [{"text": "abcd"}]}', endless=True) as url:
        mets = load(url, asked, Level(concurrency=2), 3, limit_s=1.0)
    assert [(met.cut, met.failure) for met in mets] == [(True, None)] * 3
    assert [met.output_tokens for met in mets] == [4, 4, 0]
    found = figures(Level(concurrency=2), mets)
    assert (found["requests"], found["failed"], found["unfinished"]) == (3, 0, 3)
    assert found["output_tokens"] == 8 and found["whole_s"] is None and found["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("event", "failure"),
    [
        ('{"error": {"message": "out of memory"}}', "out of memory"),
        ('{"error": "dead"}', "dead"),
        ("[1]", "an event is not one of OpenAI's: [1]"),
        ("no json", "an event is not one of OpenAI's: no json"),
    ],
)
def test_what_a_server_says_is_wrong_is_a_failure(event: str, failure: str) -> None:
    with server(event, "[DONE]") as url:
        assert [met.failure for met in load(url, Asked(model="m"), Level(rate=50.0), 2)] == [failure] * 2
