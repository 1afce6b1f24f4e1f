"""The served engine is a process of its own: it dies, drains, and comes back, and the gateway goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import warm
from tests.make_run import make_run
from tunesmith.workflows.verify import is_alive

ENDLESS = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}


@dataclass
class Server:
    process: subprocess.Popen[str]
    facts: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self.url}/ready", timeout=60)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        whole = {"model": self.facts["model"]} | body
        return httpx.post(f"{self.url}/v1/completions", json=whole, timeout=120)

    def text(self, **body: Any) -> str:
        answer = self.post({"prompt": "Hello", "max_tokens": 12, "temperature": 0} | body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def engines(self) -> list[int]:
        """Pids of the engines."""
        return [pid for pid in warm.children(self.process.pid) if is_alive(pid)]

    def zombies(self) -> list[int]:
        return [pid for pid in warm.children(self.process.pid) if not is_alive(pid)]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        self.process.communicate(timeout=60)
        return self.process.returncode


def start(*args: str | Path) -> Server:
    pipe = subprocess.PIPE
    process = warm.start("serve", *args, "--port", "0", "--json", stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return Server(process, json.loads(line))


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends those that the test has not ended."""
    started: list[Server] = []

    def make(*args: str | Path) -> Server:
        started.append(start(*args))
        return started[-1]

    yield make
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def events(server: Server, body: dict[str, Any], seen: Callable[[], None] = lambda: None) -> list[Any]:
    """What a streamed answer brings, to its end; `seen` is called at its first event."""
    found: list[Any] = []
    whole = {"model": server.facts["model"]} | body
    with httpx.stream("POST", f"{server.url}/v1/completions", json=whole, timeout=120) as answer:
        if answer.status_code != 200:
            return [json.loads(answer.read())]
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
                if len(found) == 1:
                    seen()
    return found


def running(server: Server) -> int:
    return int(server.ready().json()["running"])


def test_a_killed_engine_ends_its_streams_with_an_error_and_comes_back(
    serve: Callable[..., Server], tiny: Path
) -> None:
    server = serve(tiny)
    before = server.text()
    [engine] = server.engines()
    with ThreadPoolExecutor(5) as threads:
        streams = [threads.submit(events, server, ENDLESS) for _ in range(4)]
        whole = threads.submit(server.post, ENDLESS | {"stream": False, "n": 16})
        until(lambda: running(server) >= 8)
        os.kill(engine, signal.SIGKILL)
        for stream in streams:
            last = stream.result()[-1]
            assert last["error"]["code"] == "engine_unavailable", last
            assert "SIGKILL" in last["error"]["message"]
        assert whole.result().status_code == 503
    # The gateway still answers, and says how it stands.
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    if not server.ready().json()["ready"]:
        refused = server.post(ENDLESS)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
    until(lambda: server.ready().status_code == 200)
    status = server.ready().json()
    assert (status["restarts"], status["failure"]) == (1, None)
    assert server.text() == before
    [again] = server.engines()
    assert again != engine
    assert not server.zombies()
    assert server.end() == 0
    assert not is_alive(again)


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(
    serve: Callable[..., Server], tiny: Path
) -> None:
    server = serve(tiny, "--grace", "60")
    engines = server.engines()
    body = ENDLESS | {"max_tokens": 400}
    with ThreadPoolExecutor(3) as threads:
        streams: list[Future[list[Any]]] = [threads.submit(events, server, body) for _ in range(3)]
        until(lambda: running(server) == 3)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ready().status_code == 503)
        refused = server.post(ENDLESS)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        for stream in streams:
            found = stream.result()
            assert found[-1] == "[DONE]"
            assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0
    assert not any(map(is_alive, engines))


def test_a_second_signal_ends_at_once(serve: Callable[..., Server], tiny: Path) -> None:
    server = serve(tiny, "--grace", "3600")
    engines = server.engines()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.post, ENDLESS | {"stream": False, "n": 64})
        until(lambda: running(server) > 0)
        server.process.send_signal(signal.SIGINT)
        until(lambda: server.ready().status_code == 503)
        assert server.end(signal.SIGINT) == 130
        assert asked.exception() is not None or asked.result().status_code >= 500
    until(lambda: not any(map(is_alive, engines)))


def test_an_engine_does_not_outlive_its_server(serve: Callable[..., Server], tiny: Path) -> None:
    server = serve(tiny)
    [engine] = server.engines()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(events, server, ENDLESS | {"n": 16})
        until(lambda: running(server) > 0)
        server.process.kill()
        server.process.wait()
        end = time.monotonic() + 1.0
        while is_alive(engine) and time.monotonic() < end:
            time.sleep(0.01)
        assert not is_alive(engine)
        assert asked.exception() is not None


def test_replicas_share_the_load_and_keep_their_adapters(
    serve: Callable[..., Server], tiny: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "orders", tiny, steps=(4, 7, 11))
    other = make_run(tmp_path / "letters", tiny, steps=(5, 9))
    server = serve(run.path, "--adapter", f"letters={other.path}", "--replicas", "2", "--threads", "1")
    assert server.facts["models"] == ["orders", "letters", "tiny-llama"]
    texts = {model: server.text(model=model) for model in server.facts["models"]}
    assert len(set(texts.values())) == 3
    engines = server.engines()
    assert len(engines) == 2
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(events, server, ENDLESS) for _ in range(4)]
        until(lambda: running(server) == 4)
        loads = _per_engine(server, "running")
        assert loads == [2.0, 2.0]
        os.kill(engines[0], signal.SIGKILL)
        ends = [stream.result()[-1] for stream in streams]
        # Those of the other engine have noticed nothing.
        assert len([end for end in ends if end == "[DONE]"]) == 2
    assert server.text(model="letters") == texts["letters"]
    until(lambda: _per_engine(server, "ready") == [1.0, 1.0])
    os.kill(engines[1], signal.SIGKILL)
    until(lambda: server.ready().json()["restarts"] == 2)
    assert {model: _patiently(server, model) for model in texts} == texts


def _per_engine(server: Server, what: str) -> list[float]:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(f"tunesmith_engine_{what}{{")]


def _patiently(server: Server, model: str) -> str:
    until(lambda: server.ready().status_code == 200)
    return server.text(model=model)


def test_an_adapter_loaded_while_serving_survives_a_restart(
    serve: Callable[..., Server], tiny: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "orders", tiny, steps=(4, 7, 11))
    server = serve(tiny)
    added = httpx.post(
        f"{server.url}/admin/adapters", json={"name": "new", "path": str(run.path)}, timeout=60
    )
    assert added.status_code == 200, added.text
    assert added.json()["run"] == str(run.path)
    before = server.text(model="new")
    assert before != server.text()
    os.kill(server.engines()[0], signal.SIGKILL)
    until(lambda: server.ready().json()["restarts"] == 1)
    assert _patiently(server, "new") == before


@pytest.mark.parametrize("where", ["nothing", "damaged", "too long"])
def test_what_does_not_load_is_told_in_the_same_words(
    cli: Any, tiny: Path, tmp_path: Path, where: str
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((tiny / "config.json").read_text())
    path = {"nothing": tmp_path / "nothing", "damaged": damaged, "too long": tiny}[where]
    more = ["--max-length", "5000"] if where == "too long" else []
    told = []
    for option in ([], ["--in-process"]):
        done = cli("serve", path, "--port", "0", "--json", *more, *option)
        assert done.returncode == 2, done.stderr
        told.append(json.loads(done.stdout))
    assert told[0] == told[1]


def test_over_https_with_pages_and_a_log(serve: Callable[..., Server], tiny: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    cert, key, log = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "log.jsonl"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(made, check=True, capture_output=True)
    page = "https://chat.example.org"
    more = ["--cors-origin", page, "--log-requests", log, "--in-process", "--max-body-mib", "0.01"]
    server = serve(tiny, "--tls-cert", cert, "--tls-key", key, *more)
    assert server.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(cert))
    body = {"model": server.facts["model"], "prompt": "secret words", "max_tokens": 2}
    url = f"{server.url}/v1/completions"
    answer = httpx.post(url, json=body, verify=context, headers={"Origin": page}, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == page
    large = httpx.post(url, json=body | {"prompt": "x" * 20_000}, verify=context, timeout=60)
    assert large.status_code == 413
    assert server.end() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 413]
    assert "secret" not in log.read_text()
