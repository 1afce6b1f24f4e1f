"""Spans through OpenTelemetry's own exporter, to a receiver that understands them."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.unit.serve.asgi import Words, ask, get
from tunesmith.serve.guard import GuardOptions, guard
from tunesmith.serve.tracing import ENDPOINTS, open_traces

SDK = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


class Received(list[bytes]):
    """Bodies that were sent to the endpoint of the environment; answered: when it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = threading.Event()
        self.answered.set()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    bodies = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            bodies.answered.wait()
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(ENDPOINTS[0], f"http://127.0.0.1:{server.server_port}")
    yield bodies
    bodies.answered.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_without_an_endpoint_there_are_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert open_traces() is None


class _NoSdk(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_an_endpoint_without_the_packages_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:9")
    for name in [n for n in sys.modules if n.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoSdk(), *sys.meta_path])
    assert open_traces() is None
    assert "no traces: opentelemetry." in capsys.readouterr().err
    assert ask(guard(Words().app, GuardOptions())).status == 200


def test_a_collector_that_does_not_answer_delays_no_end(
    receiver: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SDK:
        pytest.importorskip(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    app = guard(Words().app, GuardOptions())
    receiver.answered.clear()
    assert ask(app).status == 200
    app.close()
    assert len(receiver) == 1


def test_a_span_a_request(receiver: Received) -> None:
    for name in SDK:
        pytest.importorskip(name)
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    app = guard(Words().app, GuardOptions())
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ask(app, headers={"traceparent": parent, "x-request-id": "r1"})
    ask(app, headers={"traceparent": "not one", "content-length": "1000000000"})
    get(app, "/health")
    app.close()
    [request] = [ExportTraceServiceRequest.FromString(body) for body in receiver]
    [resource] = request.resource_spans
    assert any(a.key == "service.name" and a.value.string_value == "tunesmith"
               for a in resource.resource.attributes)  # fmt: skip
    good, bad = resource.scope_spans[0].spans
    assert good.name == "text_completion tiny"
    assert good.trace_id.hex() == parent.split("-")[1] and good.parent_span_id.hex() == parent.split("-")[2]
    assert 0 < good.end_time_unix_nano - good.start_time_unix_nano < 60e9
    told = {a.key: a.value for a in good.attributes}
    assert told["gen_ai.request.model"].string_value == "tiny"
    assert told["gen_ai.usage.input_tokens"].int_value == 5
    assert told["gen_ai.usage.cache_read.input_tokens"].int_value == 2
    assert told["gen_ai.usage.output_tokens"].int_value == 3
    assert told["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "stop"
    assert told["gen_ai.response.id"].string_value == "r1"
    assert {a.key: a.value.string_value for a in bad.attributes}["error.type"] == "request_too_large"
    assert bad.parent_span_id == b""
