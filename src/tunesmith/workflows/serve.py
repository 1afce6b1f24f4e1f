"""tunesmith serve: a model or run behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import say
from tunesmith.serve.api import Gateway, create_app
from tunesmith.serve.engine import EngineError
from tunesmith.serve.guard import GuardOptions, guard
from tunesmith.serve.jobs import ServedModel
from tunesmith.workflows.http_server import Server, check_tls, listen, url_of
from tunesmith.workflows.run_proof import PROBE_TOKENS, Probe, probe_answer
from tunesmith.workflows.serve_settings import Deployment, ServeOptions, deployment, engine_wants
from tunesmith.workflows.served_models import Facts, open_adapter, run_of, served_models
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
    guarded = guard(create_app(gateway), _guard_options(wanted, engine))
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


def _guard_options(wanted: Deployment, engine: StartedEngine) -> GuardOptions:
    settings = wanted.settings
    return GuardOptions(
        keys_file=wanted.keys_file,
        api_key=settings.api_key,
        cors_origins=settings.cors_origins,
        access_log=settings.log_requests,
        log_prompts=settings.log_prompts,
        metrics_open=settings.metrics_open,
        bounds=wanted.bounds,
        engines=engine.statuses,
    )


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
        models = served_models(facts)
        first = next(iter(models.values()))
        probe = self._probe(first)
        assert self._engine.engine is not None
        self._gateway.open_adapter = partial(open_adapter, facts)
        self._gateway.models, self._gateway.engine = models, self._engine.engine
        say(f"{', '.join(models)} answers at {self._url}/v1  (context {first.max_length} tokens)")
        if self._on_ready is not None:
            self._on_ready(
                {
                    "url": self._url,
                    "model": first.name,
                    "models": list(models),
                    "max_length": first.max_length,
                    "probe": probe,
                }
                | first.origin
            )

    def _probe(self, model: ServedModel) -> dict[str, Any] | None:
        """Of a run: whether an answer ends by its stop token; says so where it does not."""
        run = model.origin["run"] and run_of(model.origin["run"])
        engine = self._engine.engine
        if not run or engine is None:
            return None
        found: Probe = asyncio.run(probe_answer(engine, model, run))
        if not found.ends:
            say(
                f"warning: {model.name}: a probe answer did not end by its stop token within {PROBE_TOKENS} "
                "tokens: was it trained long enough, and with its stop token?"
            )
        return {"tokens": found.tokens, "ends": found.ends}
