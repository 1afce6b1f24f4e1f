"""The guard behind a real server: raw sockets and the official client in front, a real model behind."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests import warm
from tests.conftest import Cli
from tests.unit.serve.asgi import ASK, Words, bearer
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.connections import bounded_connection
from tunesmith.serve.guard import Guard, GuardOptions, guard
from tunesmith.serve.keys import Key, add_key, hashed
from tunesmith.serve.quota import used_today
from tunesmith.workflows import keys as workflow

WAIT_S = 60


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of the samples with these labels, as Prometheus' own parser reads /metrics."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    found = [s for family in families for s in family.samples if s.name == name]
    return sum(s.value for s in found if labels.items() <= s.labels.items())


# -- a small application behind uvicorn: what no client library would send ---------------------------


class Small:
    """A server in a thread; `words` is the application, `guard` what stands before it."""

    def __init__(self, options: GuardOptions) -> None:
        self.words = Words()
        self.guard: Guard = guard(self.words.app, options)
        connection = bounded_connection(options.bounds)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.guard, port=0, log_level="error", http=connection, timeout_graceful_shutdown=1
            )
        )
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until(lambda: self._server.started)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._listener])

        asyncio.run(serve())

    def give(self, words: int) -> None:
        """Let the streams go on by so many words altogether."""
        for _ in range(words):
            self.loop.call_soon_threadsafe(self.words.step.release)

    def raw(self, data: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        client.sendall(data)
        return client

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def small(**options: Any) -> Iterator[Small]:
    server = Small(GuardOptions(**options))
    try:
        yield server
    finally:
        server.give(1000)
        server.stop()


def answer(client: socket.socket) -> tuple[int, bytes]:
    """(status, everything) of a response after which the server closes the connection."""
    taken = b""
    while part := client.recv(65536):
        taken += part
    client.close()
    return int(taken.split()[1]) if taken else 0, taken


def head(**lines: str) -> bytes:
    given = {"host": "localhost", "content-type": "application/json"} | lines
    text = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
    return f"POST /v1/completions HTTP/1.1\r\n{text}\r\n".encode()


def test_bodies_too_large_are_answered_even_while_they_are_sent() -> None:
    with small(bounds=Bounds(max_body_bytes=1000)) as server:
        refused = httpx.post(f"{server.url}/v1/completions", content=b"x" * 5_000_000)
        assert refused.status_code == 413 and refused.json()["error"]["code"] == "request_too_large"
        chunked = httpx.post(f"{server.url}/v1/completions", content=(b"x" * 65536 for _ in range(50)))
        assert chunked.status_code == 413 and "transfer-encoding" in chunked.request.headers
        status, taken = answer(server.raw(head(content_length="99999999999", expect="100-continue")))
        assert status == 413 and b"100 Continue" not in taken
        assert httpx.post(f"{server.url}/v1/completions", content=ASK).status_code == 200
        until(lambda: server.guard.num_running == 0)


def test_slow_senders_are_cut() -> None:
    with small(bounds=Bounds(body_timeout_s=0.3, header_timeout_s=0.3)) as server:
        slow = server.raw(head(content_length="100") + b"{")
        silent, half = server.raw(b""), server.raw(b"POST /v1/completions HTTP/1.1\r\nhost: loc")
        status, taken = answer(slow)
        assert status == 408 and b"body_timeout" in taken
        assert answer(silent) == (0, b"") and answer(half) == (0, b"")
        assert server.guard.num_running == 0


@pytest.mark.parametrize("key", ["k", "wrong"])
def test_a_body_that_breaks_off_the_protocol_is_answered_once(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with small(api_key="k") as server:
        start = head(transfer_encoding="chunked", authorization=f"Bearer {key}")
        status, taken = answer(server.raw(start + b"not a length\r\n"))
        assert status == 400 and b"invalid_http" in taken and taken.count(b"HTTP/1.1") == 1
        for none in (
            b"HEAD /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"\x16\x03\x01\r\n\r\n",
        ):
            assert answer(server.raw(none))[0] == 400
        late = server.raw(start + b"2\r\n{}\r\n")
        until(lambda: metric(server.url, "tunesmith_requests_in_flight") == 1 or key == "wrong")
        late.sendall(b"not a length\r\n")
        status, taken = answer(late)
        assert status in (400, 401) and taken.count(b"HTTP/1.1") == 1
        until(lambda: server.guard.num_running == 0)
    assert not caplog.records, caplog.text


def test_a_connection_is_kept_for_several_requests_and_after_a_refusal() -> None:
    with small(api_key="k", bounds=Bounds(header_timeout_s=1.0)) as server, httpx.Client() as client:
        for key, status in (("k", 200), ("wrong", 401), ("k", 200)):
            time.sleep(0.5)
            told = client.post(f"{server.url}/v1/completions", content=ASK, headers=bearer(key))
            assert told.status_code == status and "connection" not in told.headers
        # Longer than the time for headers, all in all: an answer under way is not a slow request.
        body = b'{"model": "tiny", "tokens": 2, "stream": true}'
        with client.stream("POST", f"{server.url}/v1/completions", content=body, headers=bearer("k")) as long:
            time.sleep(1.5)
            server.give(2)
            assert long.read().count(b"word") == 2


def add(file: Path, name: str, **limits: Any) -> None:
    add_key(file, Key(name=name, sha256=hashed(name.encode()), created=datetime.now(UTC), **limits))


def test_fifty_at_once_with_a_concurrency_of_four(tmp_path: Path) -> None:
    add(tmp_path / "keys.json", "alice", concurrency=4)
    body = b'{"model": "tiny", "tokens": 2, "stream": true}'

    async def everything(server: Small) -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=WAIT_S) as client:
            url = f"{server.url}/v1/completions"
            asked = [
                asyncio.create_task(client.post(url, content=body, headers=bearer("alice")))
                for _ in range(50)
            ]
            while sum(task.done() for task in asked) < 46:
                await asyncio.sleep(0.01)
            assert server.guard.num_running == 4
            server.give(8)
            return await asyncio.gather(*asked)

    with small(keys_file=tmp_path / "keys.json") as server:
        replies = asyncio.run(everything(server))
        statuses = [reply.status_code for reply in replies]
        assert (statuses.count(200), statuses.count(429)) == (4, 46)
        assert all(r.headers["retry-after"] == "1" for r in replies if r.status_code == 429)
        assert server.guard.num_running == 0


def test_clients_that_drop_in_mid_stream_leave_nothing_behind(tmp_path: Path) -> None:
    add(tmp_path / "keys.json", "alice", concurrency=40)
    body = b'{"model": "tiny", "tokens": 3, "stream": true}'
    with small(keys_file=tmp_path / "keys.json") as server:
        request = head(content_length=str(len(body)), authorization="Bearer alice") + body
        clients = [server.raw(request) for _ in range(40)]
        until(lambda: server.words.open == 40)
        server.give(40)
        for client in clients:
            client.recv(1)
            client.close()
        server.give(200)
        until(lambda: server.guard.num_running == 0 and server.words.open == 0)
        assert metric(server.url, "tunesmith_requests_in_flight") == 0
        assert httpx.post(f"{server.url}/v1/completions", content=ASK, headers=bearer("alice")).is_success


def test_a_client_that_reads_nothing_is_given_up() -> None:
    with small(bounds=Bounds(send_timeout_s=0.5)) as server:
        long = {"model": "tiny", "tokens": 1000, "stream": True, "word": "word" * 50_000}
        body = json.dumps(long).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head(content_length=str(len(body))) + body)
        until(lambda: server.words.open == 1)
        # 200 kB each: altogether more than the kernel and the server put by for one connection.
        server.give(200)
        until(lambda: server.guard.num_running == 0 and server.words.open == 0)
        assert metric(server.url, "tunesmith_errors_total", code="client_stalled") == 1
        client.close()


# -- the real command, with the tiny model ----------------------------------------------------------


class Real:
    def __init__(self, model: Path, folder: Path) -> None:
        self.keys, self.log = folder / "keys.json", folder / "access.jsonl"
        self.secrets = {
            name: workflow.add(name, options, self.keys)["key"]
            for name, options in {
                "alice": workflow.KeyOptions(),
                "poor": workflow.KeyOptions(tokens_per_day=40),
                "quick": workflow.KeyOptions(rate="3/h"),
                "going": workflow.KeyOptions(),
                "other": workflow.KeyOptions(models="another"),
                "root": workflow.KeyOptions(admin=True),
            }.items()
        }
        pipe = subprocess.PIPE
        self.process = warm.start(
            "serve", model, "--model-name", "tiny", "--port", "0", "--json", "--keys-file", self.keys,
            "--max-body-mib", "0.1", "--log-requests", self.log, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url = json.loads(line)["url"]

    def client(self, name: str) -> OpenAI:
        key = self.secrets.get(name, name)
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)

    def ask(self, name: str, **options: Any) -> Any:
        given = {"model": "tiny", "prompt": "Hello", "max_tokens": 10} | options
        return self.client(name).completions.create(**given, extra_body={"ignore_eos": True})


@pytest.fixture(scope="module")
def real(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    server = Real(tiny, tmp_path_factory.mktemp("guard"))
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0
    assert used_today(server.keys)["poor"] >= 40, "tokens used are written at the end"


def test_wrong_missing_and_right_keys(real: Real) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        real.ask("nobody")
    assert error.value.code == "invalid_api_key"
    assert httpx.get(f"{real.url}/v1/models").status_code == 401
    assert real.ask("alice").usage.completion_tokens == 10


def test_over_the_quota(real: Real) -> None:
    answered = 0
    with pytest.raises(openai.RateLimitError) as error:
        for _ in range(10):
            answered += real.ask("poor").usage.total_tokens
    assert error.value.code == "insufficient_quota" and answered >= 40
    assert error.value.response.headers["x-should-retry"] == "false"
    assert error.value.response.headers["x-ratelimit-remaining-tokens"] == "0"


def test_over_the_rate_and_its_headers(real: Real) -> None:
    raw = real.client("quick").completions.with_raw_response
    left = [
        raw.create(model="tiny", prompt="a", max_tokens=1).headers["x-ratelimit-remaining-requests"]
        for _ in range(3)
    ]
    assert left == ["2", "1", "0"]
    with pytest.raises(openai.RateLimitError) as error:
        real.ask("quick")
    assert error.value.code == "rate_limit_exceeded"
    assert 1100 <= int(error.value.response.headers["retry-after"]) <= 1200


def test_a_key_revoked_in_mid_stream_lets_that_stream_end(real: Real) -> None:
    stream = iter(real.ask("going", stream=True, max_tokens=200))
    next(stream)
    workflow.revoke("going", real.keys)
    with pytest.raises(openai.AuthenticationError):
        real.ask("going")
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def test_models_that_a_key_may_not_use(real: Real) -> None:
    # Unlike one that exists and is another's, such a model is not told of.
    with pytest.raises(openai.APIStatusError) as error:
        real.ask("other")
    assert error.value.status_code in (403, 404)
    assert real.client("other").models.list().data == []


def test_admin_paths(real: Real) -> None:
    body = {"name": "x", "path": "/nowhere"}
    for name, statuses in (("alice", {403}), ("root", {400, 404, 422})):
        headers = bearer(real.secrets[name])
        told = httpx.post(f"{real.url}/admin/adapters", json=body, headers=headers)
        assert told.status_code in statuses, told.text


def test_a_body_too_large(real: Real) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        real.ask("alice", prompt="x" * 200_000)
    assert error.value.status_code == 413


def test_metrics(real: Real) -> None:
    before = metric(real.url, "tunesmith_completion_tokens_total", model="tiny", key="alice")
    real.ask("alice", max_tokens=7)
    list(real.ask("alice", max_tokens=7, stream=True))
    assert metric(real.url, "tunesmith_completion_tokens_total", model="tiny", key="alice") == before + 14
    assert (
        metric(real.url, "tunesmith_requests_total", path="/v1/completions", status="200", key="alice") >= 2
    )
    assert metric(real.url, "tunesmith_time_to_first_token_seconds_count", model="tiny") >= 2
    assert metric(real.url, "tunesmith_inter_token_latency_seconds_count", model="tiny") >= 6
    assert metric(real.url, "tunesmith_engine_generated_tokens_total") >= before + 14
    assert metric(real.url, "tunesmith_engine_ready") == 1


def test_streams_dropped_leave_the_engine_free(real: Real) -> None:
    for _ in range(20):
        stream = real.ask("alice", stream=True, max_tokens=900)
        next(iter(stream))
        stream.close()
    until(lambda: metric(real.url, "tunesmith_requests_in_flight") == 0)
    until(lambda: metric(real.url, "tunesmith_engine_running") == 0)
    until(lambda: metric(real.url, "tunesmith_disconnected_total", key="alice") >= 15)


def test_the_access_log_has_who_and_how_much_but_no_text_and_no_key(real: Real) -> None:
    raw = real.client("alice").completions.with_raw_response
    told = raw.create(model="tiny", prompt="a phrase nobody says", max_tokens=3)
    wanted = told.headers["x-request-id"]

    def line() -> dict[str, Any] | None:
        lines = [json.loads(text) for text in real.log.read_text().splitlines()]
        return next((found for found in lines if found["request_id"] == wanted), None)

    until(line)
    found = line()
    assert found is not None
    assert (found["key"], found["model"], found["status"]) == ("alice", "tiny", 200)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (
        told.parse().usage.prompt_tokens,  # type: ignore[union-attr]
        3,
    )
    text = real.log.read_text()
    assert "nobody says" not in text and not any(secret in text for secret in real.secrets.values())


# -- the user's own keys ----------------------------------------------------------------------------


def test_a_new_users_key_is_asked_for_without_a_word_of_it(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path), "TUNESMITH_KEYS_FILE": ""}
    alice = cli("keys", "add", "alice", env=env).stdout.strip()
    pipe = subprocess.PIPE
    process = warm.start("serve", tiny, "--port", "0", "--json", env=env, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    models = f"{json.loads(line)['url']}/v1/models"
    try:
        assert httpx.get(models).status_code == 401
        assert httpx.get(models, headers=bearer(alice)).status_code == 200
        bob = cli("keys", "add", "bob", env=env).stdout.strip()
        assert httpx.get(models, headers=bearer(bob)).status_code == 200, (
            "keys count as soon as they are there"
        )
        for name in ("alice", "bob"):
            assert cli("keys", "revoke", name, env=env).returncode == 0
        assert httpx.get(models, headers=bearer(bob)).status_code == 401
        assert httpx.get(models).status_code == 401, "the last key gone is no open door"
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
    assert f"asks for an API key: {tmp_path}/tunesmith/keys.json has 1" in errors
    assert alice not in errors and bob not in errors


def test_own_keys_that_are_damaged_end_the_start(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "tunesmith" / "keys.json"
    file.parent.mkdir()
    file.write_text("{")
    env = {"XDG_CONFIG_HOME": str(tmp_path), "TUNESMITH_KEYS_FILE": ""}
    done = cli("serve", tiny, "--port", "0", env=env)
    assert done.returncode == 2
    assert str(file) in done.stderr and "--keys-file none" in done.stderr
