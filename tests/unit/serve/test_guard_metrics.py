"""/metrics as Prometheus reads it: right numbers, right labels, and no more series than there may be."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.unit.serve.asgi import Client, Words, ask, bearer, get
from tunesmith.serve.engine import EngineStatus
from tunesmith.serve.guard import Guard, GuardOptions, guard
from tunesmith.serve.metrics import MOST_VALUES, joined
from tunesmith.serve.record import RequestRecord

STATUS = EngineStatus(
    alive=True, ready=True, running=3, waiting=2, finished=10, cancelled=1, generated_tokens=500,
    prompt_tokens=90, cached_tokens=40, preempted=4, cache_tokens=64, cache_capacity=1024, restarts=1,
    adapters=("orders", "poems"),
)  # fmt: skip


def samples(app: Guard) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(name, labels) -> value, as Prometheus' own parser reads the answer."""
    told = get(app, "/metrics")
    assert told.status == 200 and told.headers["content-type"].startswith("text/plain")
    return parsed(told.body.decode())


def parsed(text: str, **more: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """As `samples`, of a text; more: labels laid over those of each sample."""
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, frozenset({**s.labels, **more}.items())): s.value for s in found}


def value(app: Guard, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    wanted = set(labels.items())
    return sum(v for (found, has), v in samples(app).items() if found == name and wanted <= has)


def test_requests_tokens_and_times() -> None:
    app = guard(Words().app, GuardOptions(api_key="k"))
    for _ in range(2):
        ask(app, headers=bearer("k"))
    ask(app, headers=bearer("k"), chunks=[b'{"model": "m", "adapter": "poems", "tokens": 4}'])
    ask(app, headers=bearer("wrong"))
    by = {"path": "/v1/completions", "method": "POST"}
    assert value(app, "tunesmith_requests_total", **by, model="tiny", status="200", key="api_key") == 2
    assert value(app, "tunesmith_requests_total", **by, model="m", adapter="poems", status="200") == 1
    assert value(app, "tunesmith_requests_total", **by, model="", status="401", key="") == 1
    assert value(app, "tunesmith_errors_total", code="invalid_api_key") == 1
    assert value(app, "tunesmith_prompt_tokens_total", model="tiny") == 10
    assert value(app, "tunesmith_completion_tokens_total", model="tiny", key="api_key") == 6
    assert value(app, "tunesmith_completion_tokens_total", adapter="poems") == 4
    assert value(app, "tunesmith_time_to_first_token_seconds_count") == 3
    assert value(app, "tunesmith_request_duration_seconds_count", path="/v1/completions") == 4
    assert value(app, "tunesmith_request_duration_seconds_bucket", path="/v1/completions", le="+Inf") == 4


def test_gaps_between_tokens() -> None:
    words = Words()
    for _ in range(4):
        words.step.release()
    app = guard(words.app, GuardOptions())
    ask(app, chunks=[b'{"model": "tiny", "tokens": 4, "stream": true}'])
    assert value(app, "tunesmith_inter_token_latency_seconds_count", model="tiny") == 3
    assert value(app, "tunesmith_time_to_first_token_seconds_count", model="tiny") == 1


def test_the_engines_state_is_that_of_the_moment() -> None:
    engines: dict[str, EngineStatus] = {}
    app = guard(Words().app, GuardOptions(engines=lambda: engines))
    assert value(app, "tunesmith_engine_running") == 0
    engines["a"] = engines["b"] = STATUS
    expected = {
        "running": 3, "waiting": 2, "cache_tokens": 64, "cache_capacity": 1024, "alive": 1, "ready": 1,
        "finished_total": 10, "cancelled_total": 1, "generated_tokens_total": 500, "prompt_tokens_total": 90,
        "cached_tokens_total": 40, "preempted_total": 4, "restarts_total": 1,
    }  # fmt: skip
    for name, number in expected.items():
        assert value(app, f"tunesmith_engine_{name}", engine="b") == number, name
    assert value(app, "tunesmith_engine_adapter_loaded", engine="a", adapter="poems") == 1


def test_requests_under_way() -> None:
    words = Words()
    app = guard(words.app, GuardOptions())

    async def everything() -> list[bytes]:
        running = [Client(chunks=[b'{"model": "tiny", "tokens": 2, "stream": true}']) for _ in range(3)]
        tasks = [asyncio.create_task(client.run(app)) for client in running]
        while words.open < 3:
            await asyncio.sleep(0)
        words.step.release()
        await running[0].reply.began.wait()
        told = await Client("/metrics", method="GET").run(app)
        for _ in range(5):
            words.step.release()
        await asyncio.gather(*tasks)
        return [line for line in told.body.splitlines() if line.startswith(b"tunesmith_requests_in_flight")]

    assert sorted(asyncio.run(everything())) == [
        b'tunesmith_requests_in_flight{adapter="",model="tiny",phase="answering"} 1.0',
        b'tunesmith_requests_in_flight{adapter="",model="tiny",phase="waiting"} 2.0',
    ]
    assert value(app, "tunesmith_requests_in_flight") == 0


def test_what_clients_invent_makes_no_series() -> None:
    app = guard(Words().app, GuardOptions())
    get(app, "/nothing/0")
    ask(app, "/v1/completions/0", method="BREW")
    before = {(name, labels) for name, labels in samples(app) if "path" in dict(labels)}
    for number in range(20):
        get(app, f"/nothing/{number}")
        get(app, f"/v1/models/{number}")
        ask(app, f"/v1/completions/{number}", method=f"BREW{number}")
    added = {dict(labels)["path"] for name, labels in samples(app) if "path" in dict(labels)} - {
        dict(labels)["path"] for _, labels in before
    }
    assert added <= {"/v1/models/{name:path}", "/metrics"}
    methods = {dict(labels).get("method") for _, labels in samples(app)}
    assert methods <= {None, "GET", "other"}


def test_names_of_models_are_bounded_too() -> None:
    app = guard(Words().app, GuardOptions())
    for number in range(MOST_VALUES + 20):
        app.metrics.observe(RequestRecord(model=f"adapter-{number}", completion_tokens=1))
    models = {dict(labels).get("model") for _, labels in samples(app)} - {None, ""}
    assert len(models) == MOST_VALUES + 1 and "other" in models
    assert value(app, "tunesmith_completion_tokens_total", model="other") == 20


def test_two_guards_count_apart() -> None:
    one, other = (guard(Words().app, GuardOptions()) for _ in range(2))
    ask(one)
    both: list[Any] = [value(app, "tunesmith_completion_tokens_total") for app in (one, other)]
    assert both == [3, 0]


def test_the_metrics_of_several_replicas_as_one() -> None:
    apps = {name: guard(Words().app, GuardOptions(api_key="k")) for name in ("a", "b")}
    for name, times in (("a", 1), ("b", 2)):
        for _ in range(times):
            ask(apps[name], headers=bearer("k"))
    one = {name: get(app, "/metrics").body.decode() for name, app in apps.items()}
    text = joined(one).decode()
    assert text.count("# TYPE tunesmith_requests_total counter") == 1
    found = parsed(text)
    alone = {key: v for name, told in one.items() for key, v in parsed(told, replica=name).items()}
    assert found == alone
    answered = {
        dict(labels)["replica"]: count
        for (name, labels), count in found.items()
        if name == "tunesmith_requests_total"
    }
    assert answered == {"a": 1, "b": 2}
