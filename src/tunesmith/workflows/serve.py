"""tunesmith serve: a model or run behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.model.generate import Generator
from tunesmith.model.template import stop_token_ids
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resolve import SERVE_MAX_LENGTH
from tunesmith.recipe.schema import Serve
from tunesmith.serve.api import Gateway, create_app
from tunesmith.serve.jobs import ServedModel
from tunesmith.serve.local_engine import LocalEngine
from tunesmith.workflows.open_model import OpenModel
from tunesmith.workflows.open_served import open_served, warm_up_prompt
from tunesmith.workflows.run_facts import run_recipe

GRACE_S = 5.0


@dataclass(frozen=True)
class ServeOptions:
    """What the caller wants other than the run's recipe or the defaults of its section `serve`."""

    adapter: str | None = None
    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    max_length: int | None = None
    max_concurrent: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    model_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    allow_open: bool = False


def serve(
    path: str, options: ServeOptions, *, on_ready: Callable[[dict[str, Any]], None] | None = None
) -> int | None:
    """Serve until SIGTERM or SIGINT; returns the signal's number after a clean end.

    on_ready is called once, with url, model, max_length, adapter, base, when a token has been generated.
    Raises UserError for a taken port, an open address without a key, and whatever does not load.
    """
    settings = _settings(path, options)
    _refuse_open_address(settings, options.allow_open)
    listener = _listen(settings.host, settings.port)
    gateway = Gateway()
    server = _Server(create_app(gateway, api_key=settings.api_key), gateway)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    loader = _Loader(path, options, settings, gateway, url, on_ready, server)
    loader.start()
    server.run(sockets=[listener])
    if loader.failure is not None:
        raise loader.failure
    return server.stopped_by


def _settings(path: str, options: ServeOptions) -> Serve:
    """The run's recipe, section serve, with the caller's options over it."""
    folder = Path(path).expanduser()
    base = Serve()
    if is_run(folder):
        run = RunFolder(folder)
        key = load_recipe(run.recipe).serve.api_key  # the resolved recipe has no secrets
        base = run_recipe(run).serve.model_copy(update={"api_key": key})
    names = ("host", "port", "api_key", "max_length", "max_concurrent", "precision", "model_name")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    settings = base.model_copy(update=given)
    key = settings.api_key or os.environ.get("TUNESMITH_API_KEY") or None
    return settings.model_copy(update={"api_key": key})


def _refuse_open_address(settings: Serve, allow_open: bool) -> None:
    if settings.api_key or allow_open or _is_loopback(settings.host):
        return
    raise UserError(
        f"--host {settings.host}: without an API key anyone who reaches this machine could use the model",
        hint="give --api-key (or $TUNESMITH_API_KEY), or --allow-open when that is what you want",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
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


class _Server(uvicorn.Server):
    """Ends in order: no new requests, some seconds for those that run, then the rest is cut off."""

    def __init__(self, app: Any, gateway: Gateway) -> None:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(GRACE_S) + 3
        )
        super().__init__(config)
        self.stopped_by: int | None = None
        self._gateway = gateway
        self._closer: threading.Thread | None = None

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
            if self._closer is not None:
                self._closer.join()

    def stop(self) -> None:
        """From any thread: end the server and the engine."""
        self.should_exit = True
        if self._closer is None and self._gateway.engine is not None:
            engine = self._gateway.engine
            self._closer = threading.Thread(target=lambda: engine.close(grace_s=GRACE_S), daemon=True)
            self._closer.start()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stopped_by is not None:
            self.force_exit = True
        self.stopped_by = number
        self.stop()


class _Loader(threading.Thread):
    """Loads the model while the server already tells that it is loading."""

    def __init__(
        self,
        path: str,
        options: ServeOptions,
        settings: Serve,
        gateway: Gateway,
        url: str,
        on_ready: Callable[[dict[str, Any]], None] | None,
        server: _Server,
    ) -> None:
        super().__init__(name="tunesmith-loader", daemon=True)
        self._path, self._options, self._settings = path, options, settings
        self._gateway, self._url, self._on_ready, self._server = gateway, url, on_ready, server
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            facts = self._load()
            if facts is not None and self._on_ready is not None:
                self._on_ready(facts)
        except Exception as error:
            self.failure = error
            self._server.stop()

    def _load(self) -> dict[str, Any] | None:
        """None when the server was stopped while the model was loading."""
        opened = open_served(
            self._path,
            adapter=self._options.adapter,
            precision=self._settings.precision,
            device=self._options.device,
            threads=self._options.threads,
        )
        length = served_length(self._settings, opened)
        ids = warm_up_prompt(opened)[:length]
        generator = Generator(opened.model, max_length=length, max_concurrent=self._settings.max_concurrent)
        model = served_model(opened, self._settings, length)
        engine = LocalEngine(generator)
        engine.start(ids)
        self._gateway.engine, self._gateway.model = engine, model
        while not engine.status().ready:
            if self._server.should_exit:
                self._server.stop()
                return None
            if not engine.status().alive:
                raise TunesmithError(engine.status().failure or "the engine ended")
            time.sleep(0.02)
        say(f"{model.name} answers at {self._url}/v1  (context {length} tokens)")
        return {"url": self._url, "model": model.name, "max_length": length} | model.origin


def served_length(settings: Serve, opened: OpenModel) -> int:
    """Tokens of prompt and answer together. Raises UserError for more than the model's positions."""
    if settings.max_length == "auto":
        return min(opened.context_length, SERVE_MAX_LENGTH)
    if settings.max_length > opened.context_length:
        raise UserError(
            f"--max-length {settings.max_length}: the model's context is {opened.context_length} tokens",
            hint=f"give at most {opened.context_length}",
        )
    return settings.max_length


def served_model(opened: OpenModel, settings: Serve, length: int) -> ServedModel:
    return ServedModel(
        name=settings.model_name or opened.name,
        tokenizer=opened.tokenizer,
        max_length=length,
        stop_ids=stop_token_ids(opened.tokenizer, opened.model.generation_config),
        created=int(time.time()),
        origin={
            "path": opened.files.origin,
            "base": str(opened.files.folder),
            "adapter": str(opened.adapter) if opened.adapter else None,
        },
    )
