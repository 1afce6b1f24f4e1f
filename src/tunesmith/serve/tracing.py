"""A span a request, sent by OpenTelemetry's own exporter, where its packages and an endpoint are there.

Attributes are those of the semantic conventions for generative AI and for HTTP servers
(opentelemetry.io/docs/specs/semconv/gen-ai).
"""

from __future__ import annotations

import os
import threading
from typing import Any

from tunesmith.core.optional import load
from tunesmith.core.progress import say
from tunesmith.serve.record import RequestRecord

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
CLOSE_S = 2.0
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Traces:
    """Makes the span when the request has ended, with the times that it had."""

    def __init__(self, provider: Any) -> None:
        self._tracer, self._provider = provider.get_tracer("tunesmith"), provider
        self._api = load("opentelemetry.trace")
        context = load("opentelemetry.trace.propagation.tracecontext")
        self._propagator = context.TraceContextTextMapPropagator()

    def observe(self, record: RequestRecord) -> None:
        operation = _OPERATIONS.get(record.route)
        if operation is None:
            return
        carrier = {"traceparent": record.trace_parent} if record.trace_parent else {}
        span = self._tracer.start_span(
            f"{operation} {record.model or ''}".rstrip(),
            context=self._propagator.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            attributes=_attributes(record, operation),
            start_time=int(record.time * 1e9),
        )
        if record.status >= 500:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR))
        span.end(int((record.time + record.duration_s) * 1e9))

    def close(self) -> None:
        """Send what has not been sent; a collector that does not answer delays the server's end by 2 s."""
        ending = threading.Thread(target=self._provider.shutdown, name="tunesmith-traces", daemon=True)
        ending.start()
        ending.join(CLOSE_S)


def _attributes(record: RequestRecord, operation: str) -> dict[str, Any]:
    failed = record.status >= 400
    told = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tunesmith",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": None if record.finish is None else [record.finish],
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.server.time_to_first_token": record.first_token_s,
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "client.address": record.client,
        "error.type": (record.error or str(record.status)) if failed else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def open_traces() -> Traces | None:
    """None when the environment names no endpoint, or a package is missing (which is told)."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        return _open()
    except ImportError as error:
        say(f"warning: no traces: {error.name} is not installed: pip install 'tunesmith[tracing]'")
        return None


def _open() -> Traces:
    sdk, export = load("opentelemetry.sdk.trace"), load("opentelemetry.sdk.trace.export")
    exporter = load("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
    name = os.environ.get("OTEL_SERVICE_NAME", "tunesmith")
    resource = load("opentelemetry.sdk.resources").Resource.create({"service.name": name})
    # The guard ends it: a second time, when Python ends, would wait for as long as the exporter likes.
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return Traces(provider)
