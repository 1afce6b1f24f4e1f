"""HTTP against real servers: redirects, secrets, statuses, broken answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.core.net import Http, NetError, shown


class Server(ThreadingHTTPServer):
    """Answers each path with (status, headers, body); notes the headers that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        status, headers, body = self.server.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    pair = Server(), Server()
    for server in pair:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield pair
    for server in pair:
        server.shutdown()
        server.server_close()


@pytest.fixture
def http() -> Iterator[Http]:
    client = Http(read_timeout_s=2.0)
    yield client
    client.close()


def test_secrets_stay_behind_at_a_redirect_and_do_not_come_back(
    servers: tuple[Server, Server], http: Http
) -> None:
    home, other = servers
    home.answers["/a"] = (302, {"Location": "/b", "X-Linked-Etag": "first", "ETag": "one"}, b"")
    home.answers["/b"] = (307, {"Location": f"{other.url}/c"}, b"")
    other.answers["/c"] = (302, {"Location": f"{home.url}/d"}, b"")
    home.answers["/d"] = (302, {"Location": f"{other.url}/e"}, b"")
    other.answers["/e"] = (200, {"ETag": "of the store"}, b"bytes")
    secrets = {"Authorization": "Bearer secret"}
    with http.open(f"{home.url}/a", headers={"Range": "bytes=1-"}, secrets=secrets) as reply:
        assert b"".join(reply.chunks) == b"bytes"
    assert reply.headers["etag"] == "of the store"
    assert reply.own_headers["x-linked-etag"] == "first" and reply.own_headers.get("etag") != "of the store"
    sent = {path: headers.get("authorization") for path, headers in home.seen + other.seen}
    assert sent == {"/a": "Bearer secret", "/b": "Bearer secret", "/c": None, "/d": None, "/e": None}
    assert all(headers["range"] == "bytes=1-" for _, headers in home.seen + other.seen)


def test_redirects_in_a_circle(servers: tuple[Server, Server], http: Http) -> None:
    home, _ = servers
    home.answers["/a"] = (302, {"Location": "/a"}, b"")
    with pytest.raises(NetError, match="more than 10 redirects"), http.open(f"{home.url}/a"):
        pass


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
        ({"Retry-After": "DATE"}, 5000.0),
    ],
)
def test_status_with_retry_after(
    servers: tuple[Server, Server], http: Http, headers: dict[str, str], expected: float | None
) -> None:
    home, _ = servers
    if headers.get("Retry-After") == "DATE":
        headers = {"Retry-After": formatdate(time.time() + 5000)}
    home.answers["/a?sig=secret"] = (429, {**headers, "X-Error-Code": "Busy"}, b"")
    with pytest.raises(NetError) as error, http.open(f"{home.url}/a?sig=secret"):
        pass
    assert (error.value.status, error.value.code) == (429, "Busy")
    assert error.value.retry_after_s == (pytest.approx(expected, abs=600) if expected else None)
    assert "secret" not in str(error.value)


def test_cut_body_is_an_error(servers: tuple[Server, Server], http: Http) -> None:
    home, _ = servers
    home.answers["/a"] = (200, {"Content-Length": "100"}, b"ten bytes.")
    got = b""
    with pytest.raises(NetError) as error, http.open(f"{home.url}/a") as reply:
        for chunk in reply.chunks:
            got += chunk
    assert got == b"ten bytes." and error.value.status is None


def test_error_of_the_reader_is_not_taken_for_the_networks(
    servers: tuple[Server, Server], http: Http
) -> None:
    home, _ = servers
    home.answers["/a"] = (200, {}, b"x")
    with pytest.raises(OSError, match="disk"), http.open(f"{home.url}/a"):
        raise OSError("disk")


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff\xfe"])
def test_what_is_no_json(servers: tuple[Server, Server], http: Http, body: bytes) -> None:
    home, _ = servers
    home.answers["/a"] = (200, {}, body)
    with pytest.raises(NetError, match="is no JSON"):
        http.get_json(f"{home.url}/a")


def test_nobody_there(http: Http) -> None:
    with pytest.raises(NetError) as error:
        http.get_json("http://127.0.0.1:9/x")
    assert error.value.refused


def test_bad_proxy_is_the_users_to_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy:1")
    with pytest.raises(UserError, match="proxy settings"):
        Http()


def test_shown_holds_no_secret() -> None:
    assert shown("https://user:pass@host:8443/a/b?sig=1#x") == "https://host:8443/a/b"
