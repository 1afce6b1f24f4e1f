"""What /metrics tells, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.serve.access import METRICS_PATH
from tunesmith.serve.engine import EngineStatus
from tunesmith.serve.limits import Limiter
from tunesmith.serve.record import RequestRecord
from tunesmith.serve.refuse import route_path

Engines = Callable[[], Mapping[str, EngineStatus]]

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
MOST_VALUES = 200
"""Values of a label that get series of their own; those that come later share "other"."""
METHODS = frozenset({"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"})
LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)

_GAUGES = {
    "alive": "1 when the engine can compute.",
    "ready": "1 when the engine has produced a token.",
    "running": "Requests being computed.",
    "waiting": "Requests in line.",
    "cache_tokens": "Tokens that the key-value cache holds.",
    "cache_capacity": "Tokens that the key-value cache can hold; 0: unknown.",
}
_COUNTERS = {
    "finished": "Answers that were completed.",
    "cancelled": "Answers that were ended before they were complete.",
    "generated_tokens": "Tokens generated.",
    "prompt_tokens": "Prompt tokens taken in.",
    "cached_tokens": "Prompt tokens that a cached prefix saved.",
    "preempted": "Times that a request gave up its cache pages for others.",
    "restarts": "Times that the engine's process was started again.",
}


def joined(texts: Mapping[str, str]) -> bytes:
    """What several gateways tell, by their names, as one text: each sample has the label `replica`."""
    families: dict[str, Metric] = {}
    for name, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [s._replace(labels={**s.labels, "replica": name}) for s in family.samples]
    return generate_latest(_Fixed(families.values()))


class _Fixed(Collector):
    """A registry of what was collected elsewhere."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Bounded:
    """Lets the first values through and calls the rest "other": series stay in memory for ever."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, value: str | None) -> str:
        if value is None:
            return ""
        if value not in self._known:
            if len(self._known) >= MOST_VALUES:
                return "other"
            self._known.add(value)
        return value


class Metrics:
    """Counts ended requests, and asks engines and limiter for their state when it is read.

    Labels come from records: a model is set only after it was found, so that names which clients invent
    make no series.
    """

    def __init__(self, engines: Engines, limiter: Limiter) -> None:
        self.registry = CollectorRegistry()
        self._model, self._key = _Bounded(), _Bounded()
        self.registry.register(_State(engines, limiter, self._model))
        by_model = ("model", "adapter")
        by_key = (*by_model, "key")
        request = ("path", "method", "status")
        self._requests = self._counter("requests", "Requests that ended.", *request, *by_key)
        self._errors = self._counter("errors", "Requests refused, and streams that failed.", "code", "key")
        self._left = self._counter("disconnected", "Requests whose client left before the end.", *by_key)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens asked about.", *by_key)
        self._completion = self._counter("completion_tokens", "Tokens answered.", *by_key)
        self._first = self._histogram(
            "time_to_first_token_seconds", "To the first token.", LATENCY_S, *by_model
        )
        self._gap = self._histogram(
            "inter_token_latency_seconds", "Between arrivals of tokens.", GAP_S, *by_model
        )
        self._whole = self._histogram(
            "request_duration_seconds", "To the end of the answer.", LATENCY_S, "path", *by_model
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tunesmith_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"tunesmith_{name}", text, labels, buckets=buckets, registry=self.registry)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        model, adapter = self._model(record.model), self._model(record.adapter)
        key = self._key(record.key_name)
        by = {"model": model, "adapter": adapter}
        method = record.method if record.method in METHODS else "other"
        self._requests.labels(
            path=record.route, method=method, status=str(record.status), key=key, **by
        ).inc()
        if record.error is not None:
            self._errors.labels(code=record.error, key=key).inc()
        if record.disconnected:
            self._left.labels(key=key, **by).inc()
        self._prompt.labels(key=key, **by).inc(record.prompt_tokens)
        self._completion.labels(key=key, **by).inc(record.completion_tokens)
        if record.first_token_s is not None:
            self._first.labels(**by).observe(record.first_token_s)
        for gap_s in record.gaps_s:
            self._gap.labels(**by).observe(gap_s)
        self._whole.labels(path=record.route, **by).observe(record.duration_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    """The engines' and the gateway's state at the moment of reading."""

    def __init__(self, engines: Engines, limiter: Limiter, bounded: _Bounded) -> None:
        self._engines, self._limiter, self._bounded = engines, limiter, bounded

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engines = self._engines()
        yield self._in_flight()
        for field, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"tunesmith_engine_{field}", text, labels=["engine"])
            for name, status in engines.items():
                gauge.add_metric([name], float(getattr(status, field)))
            yield gauge
        for field, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"tunesmith_engine_{field}", text, labels=["engine"])
            for name, status in engines.items():
                counter.add_metric([name], float(getattr(status, field)))
            yield counter
        yield _adapters(engines)

    def _in_flight(self) -> GaugeMetricFamily:
        """Requests that wait for their first token, and those that have had it."""
        labels = ["model", "adapter", "phase"]
        running = GaugeMetricFamily("tunesmith_requests_in_flight", "Requests under way.", labels=labels)
        counts = Tally(
            (
                self._bounded(r.model),
                self._bounded(r.adapter),
                "waiting" if r.first_token_s is None else "answering",
            )
            for r in self._limiter.records
        )
        for values, count in counts.items():
            running.add_metric(values, count)
        return running


def _adapters(engines: Mapping[str, EngineStatus]) -> GaugeMetricFamily:
    loaded = GaugeMetricFamily(
        "tunesmith_engine_adapter_loaded", "1 for every adapter loaded.", labels=["engine", "adapter"]
    )
    for name, status in engines.items():
        for adapter in status.adapters:
            loaded.add_metric([name, adapter], 1.0)
    return loaded


class MetricsRoute:
    """Answers GET /metrics in front of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if route_path(scope) != METRICS_PATH or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body = self._metrics.text()
        headers = [
            (b"content-type", CONTENT_TYPE),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
