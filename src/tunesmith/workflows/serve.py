"""tunesmith serve: a model or run behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import say
from tunesmith.serve.api import Gateway, create_app
from tunesmith.serve.engine import EngineError
from tunesmith.serve.guard import guard
from tunesmith.workflows.fill_gateway import fill, guard_options
from tunesmith.workflows.http_server import Server, check_tls, listen, url_of
from tunesmith.workflows.serve_settings import ServeOptions, deployment, engine_wants
from tunesmith.workflows.served_models import Facts
from tunesmith.workflows.start_engine import OpenEngine, StartedEngine

NO_START = (
    "where memory is short: --weights int8, a smaller --max-length or --cache-tokens; "
    "TUNESMITH_NO_KERNELS=1 computes without our own kernels"
)


def serve(
    path: str,
    options: ServeOptions,
    *,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
    open_here: OpenEngine | None = None,
) -> int | None:
    """Serve until SIGTERM or SIGINT; returns the signal's number after a clean end.

    on_ready is called once, with url, model, models, max_length and what the model is made of, when a token
    has been generated and the model is proved to be the run's. open_here: as `StartedEngine` takes it. Raises
    UserError for a taken port, an open address without a key, and whatever does not load.
    """
    wanted = deployment(path, options)
    settings = wanted.settings
    tls = check_tls(settings.tls_cert, settings.tls_key)
    engine = StartedEngine(
        engine_wants(wanted, options),
        engine=settings.engine,
        replicas=settings.replicas,
        open_here=open_here,
    )
    gateway = Gateway()
    guarded = guard(create_app(gateway), guard_options(wanted, engine))
    listener = listen(settings.host, settings.port)
    server = Server(
        guarded,
        drain=guarded.drain,
        finish=engine.stop,
        num_running=lambda: guarded.num_running,
        abort=engine.abort,
        grace_s=settings.grace_s,
        bounds=wanted.bounds,
        tls=tls,
    )
    if wanted.keys_text:
        say(wanted.keys_text)
    loader = _Loader(engine, gateway, server, url_of(listener, tls=bool(tls)), on_ready)
    loader.start()
    server.run(sockets=[listener])
    guarded.close()  # a second signal ends the server before it tells the application
    if isinstance(loader.failure, EngineError):
        raise TunesmithError(f"{path}: the engine did not start: {loader.failure}", hint=NO_START)
    if loader.failure is not None:
        raise loader.failure
    return server.stopped_by


class _Loader(threading.Thread):
    """Loads the model, and proves what it is, while the server already tells that it is loading."""

    def __init__(
        self,
        engine: StartedEngine,
        gateway: Gateway,
        server: Server,
        url: str,
        on_ready: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        super().__init__(name="tunesmith-loader", daemon=True)
        self._engine, self._gateway, self._server = engine, gateway, server
        self._url, self._on_ready = url, on_ready
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            facts = self._engine.start()
            if facts is not None:
                self._open(facts)
        except Exception as error:
            # A probe that was cut off by the end of the server is no failure.
            self.failure = None if self._server.stopped_by is not None else error
            self._server.stop()

    def _open(self, facts: Facts) -> None:
        opened = fill(self._gateway, self._engine, facts)
        names, length = ", ".join(opened["models"]), opened["max_length"]
        say(f"{names} answers at {self._url}/v1  (context {length} tokens)")
        if self._on_ready is not None:
            self._on_ready({"url": self._url} | opened)
