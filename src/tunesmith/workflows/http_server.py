"""The HTTP server around an application: its socket, TLS, signals, and an end that loses no answer."""

from __future__ import annotations

import ipaddress
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.connections import bounded_connection

LAST_WORDS_S = 3.0
HURRY_S = 1.0
POLL_S = 0.02


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; taken before the model is loaded, so that a taken port is known at once."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        return listener
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="take another --port (0 takes a free one), or end the program that uses this one",
        ) from None


def url_of(listener: socket.socket, *, tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(cert: str | None, key: str | None) -> dict[str, str]:
    """uvicorn's options for TLS; none without a certificate. Raises UserError for files that do not fit."""
    if cert is None:
        if key is not None:
            raise UserError(f"--tls-key {key}: without --tls-cert it is of no use", hint="give both")
        return {}
    files = [str(Path(file).expanduser()) for file in (cert, key) if file is not None]
    for option, file in zip(("--tls-cert", "--tls-key"), files, strict=False):
        if not Path(file).is_file():
            raise UserError(f"{option} {file}: there is no such file", hint="give a PEM file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            files[0], files[1] if len(files) > 1 else None, password=""
        )
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"--tls-cert {cert}: certificate and key cannot be used: {error.args[-1]}",
            hint="give the certificate chain and its key, without a passphrase, as PEM files",
        ) from None
    return dict(zip(("ssl_certfile", "ssl_keyfile"), files, strict=False))


class Server(uvicorn.Server):
    """Ends in order: no new requests, `grace_s` seconds for those that run, then the rest is cut off.

    drain: refuses new requests. finish: gives the engine these seconds, and ends it. num_running: requests
    whose answers are not yet sent. abort: ends the engine at once.
    """

    def __init__(
        self,
        app: Any,
        *,
        drain: Callable[[], None],
        finish: Callable[[float], None],
        num_running: Callable[[], int],
        abort: Callable[[], None],
        grace_s: float,
        bounds: Bounds,
        tls: dict[str, str],
    ) -> None:
        config = uvicorn.Config(
            app,
            http=bounded_connection(bounds),
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=int(LAST_WORDS_S),
            server_header=False,
            **tls,  # type: ignore[arg-type]
        )
        super().__init__(config)
        self.stopped_by: int | None = None
        self._hurried = False
        self._drain, self._finish, self._num_running, self._abort = drain, finish, num_running, abort
        self._grace_s = grace_s
        self._ending: threading.Thread | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal again: a served end is exit code 0."""
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._ending is not None and not self._hurried:
                self._ending.join()

    def stop(self) -> None:
        """From any thread: end in order."""
        if self._ending is None:
            self._ending = threading.Thread(target=self._end, name="tunesmith-drain", daemon=True)
            self._ending.start()

    def _end(self) -> None:
        end = time.monotonic() + self._grace_s
        try:
            self._drain()
            self._finish(self._grace_s)
            # The engine's last tokens are still on their way through the event loop to the clients.
            while self._num_running() and time.monotonic() < end + LAST_WORDS_S and not self._hurried:
                time.sleep(POLL_S)
        finally:
            self.should_exit = True

    def _hurry(self) -> None:
        """What runs is told of its end by the engine's; only what has no time to hear it is cut off."""
        end = time.monotonic() + HURRY_S
        while self._num_running() and time.monotonic() < end:
            time.sleep(POLL_S)
        self.force_exit = self._num_running() > 0
        self.should_exit = True

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._hurried:
            self.should_exit = self.force_exit = True
            return
        if self.stopped_by is not None:
            self._hurried = True
            for target in (self._abort, self._hurry):
                threading.Thread(target=target, name="tunesmith-abort", daemon=True).start()
            return
        self.stopped_by = number
        if running := self._num_running():
            what = "1 request" if running == 1 else f"{running} requests"
            say(f"finishing {what}, for at most {self._grace_s:g} s; a second signal ends at once")
        self.stop()
