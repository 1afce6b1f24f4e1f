"""How a server starts and ends: keys, addresses, signals, and what does not start at all."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.test_serve import start, stop


def test_key(tiny: Path) -> None:
    running = start(tiny, env={"TUNESMITH_API_KEY": "right-key"})
    try:
        assert running.client("right-key").models.list().data
        for key in ("wrong", "right-ke", "right-key2", "réal"):
            answer = httpx.get(
                f"{running.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").completions.create(model="tiny-llama", prompt="a")
        for path in ("/v1/models", "/openapi.json", "/docs", "/nothing", "/tokenize"):
            assert httpx.get(running.url + path).status_code == 401
        for path in ("/health", "/ready"):
            assert httpx.get(running.url + path).status_code == 200
    finally:
        code, errors = stop(running)
    assert code == 0
    assert "right-key" not in errors


def test_sigterm_ends_running_requests_and_exits_0(tiny: Path) -> None:
    running = start(tiny, "--grace", "1")
    with ThreadPoolExecutor(1) as pool:
        body = {"model": running.model, "prompt": "a", "max_tokens": 900, "n": 32, "ignore_eos": True}
        asked = pool.submit(running.post, "/v1/completions", body)
        while running.ready()["running"] == 0:
            time.sleep(0.02)
        begin = time.monotonic()
        code, _ = stop(running)
        answer = asked.result()
    assert code == 0
    assert time.monotonic() - begin < 10  # that of no --grace
    assert answer.status_code in (200, 503)
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "engine_unavailable"


def test_sigint_exits_130(tiny: Path) -> None:
    assert stop(start(tiny), signal.SIGINT)[0] == 130


def test_a_taken_port_is_one_clear_error(tiny: Path, cli: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("serve", tiny, "--port", port, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["what"].startswith(f"cannot listen on 127.0.0.1:{port}")


def test_an_open_address_needs_a_key(tiny: Path, cli: Any) -> None:
    done = cli("serve", tiny, "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "--api-key" in done.stderr


def test_a_model_that_does_not_load_ends_the_server(tmp_path: Path, cli: Any) -> None:
    done = cli("serve", tmp_path / "nothing", "--port", "0", "--json", timeout=60)
    assert done.returncode == 2
    assert "error" in json.loads(done.stdout)


def test_too_long_a_context_is_refused(tiny: Path, cli: Any) -> None:
    done = cli("serve", tiny, "--port", "0", "--max-length", "5000")
    assert done.returncode == 2
    assert "1024" in done.stderr
