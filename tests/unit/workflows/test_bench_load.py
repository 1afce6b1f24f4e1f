"""Load: prompts, times of arrival, and the figures of what requests met."""

from __future__ import annotations

import asyncio
import random
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


def test_an_open_loop_does_not_wait_for_answers_and_a_dead_server_is_a_failure() -> None:
    async def run() -> list[Met]:
        client = EventClient("http://127.0.0.1:9", timeout_s=1.0)
        try:
            return await run_level(client, Asked(model="m"), Level(rate=200.0), ["a"] * 20, 0)
        finally:
            await client.close()

    mets = asyncio.run(run())
    assert len(mets) == 20 and all(met.failure for met in mets)
    assert [met.began for met in mets] == sorted(met.began for met in mets)
