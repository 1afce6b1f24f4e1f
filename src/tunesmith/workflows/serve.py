"""tunesmith serve: a model or run behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Serve
from tunesmith.serve.api import Gateway, create_app
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.guard import GuardOptions, guard
from tunesmith.serve.jobs import ServedModel
from tunesmith.workflows.http_server import Server, check_tls, is_loopback, listen, url_of
from tunesmith.workflows.open_engine import EngineWants
from tunesmith.workflows.run_facts import run_recipe
from tunesmith.workflows.run_proof import PROBE_TOKENS, Probe, probe_answer
from tunesmith.workflows.served_models import Facts, open_adapter, run_of, served_models
from tunesmith.workflows.start_engine import StartedEngine

GRACE_S = 8.0
"""Docker kills a container ten seconds after it has asked it to end."""
MIB = 1024**2
OVER_RECIPE = ("host", "port", "api_key", "max_length", "max_concurrent", "precision", "model_name")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What the caller wants other than the run's recipe or the defaults of its section `serve`.

    adapters: NAME=FOLDER for more models beside it, or a bare FOLDER in place of its own adapter. merge: fold
    the adapter into the weights. engine: whose; in_process: compute in a thread of this process. replicas:
    engines, each a process. cache_tokens: prompts and answers of all requests that an engine holds together.
    grace_s: for running requests after SIGTERM. max_waiting: requests in line beyond those computed.
    """

    adapters: tuple[str, ...] = ()
    merge: bool = False
    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    max_length: int | None = None
    max_concurrent: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    model_name: str | None = None
    weights: Literal["fp32", "bf16", "int8", "nf4"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    engine: Literal["auto", "local", "vllm", "llamacpp"] = "auto"
    in_process: bool = False
    replicas: int = 1
    cache_tokens: int | None = None
    max_waiting: int = 1024
    grace_s: float = GRACE_S
    allow_open: bool = False
    keys_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    access_log: str | None = None
    log_prompts: bool = False
    metrics_open: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    tls_cert: Path | None = None
    tls_key: Path | None = None


def serve(
    path: str, options: ServeOptions, *, on_ready: Callable[[dict[str, Any]], None] | None = None
) -> int | None:
    """Serve until SIGTERM or SIGINT; returns the signal's number after a clean end.

    on_ready is called once, with url, model, models, max_length and what the model is made of, when a token
    has been generated and the model is proved to be the run's. Raises UserError for a taken port, an open
    address without a key, and whatever does not load.
    """
    settings = _settings(path, options)
    _refuse_open_address(settings, options)
    tls = check_tls(options.tls_cert, options.tls_key)
    engine = StartedEngine(
        engine_wants(path, options, settings),
        engine=options.engine,
        in_process=options.in_process,
        replicas=options.replicas,
    )
    gateway = Gateway()
    guarded = guard(create_app(gateway), _guard_options(settings, options, engine))
    listener = listen(settings.host, settings.port)
    server = Server(
        guarded,
        drain=guarded.drain,
        finish=engine.stop,
        num_running=lambda: guarded.num_running,
        abort=engine.abort,
        grace_s=options.grace_s,
        bounds=options.bounds,
        tls=tls,
    )
    loader = _Loader(engine, gateway, server, url_of(listener, tls=bool(tls)), on_ready)
    loader.start()
    server.run(sockets=[listener])
    guarded.close()  # a second signal ends the server before it tells the application
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
    given = {name: value for name in OVER_RECIPE if (value := getattr(options, name)) is not None}
    settings = base.model_copy(update=given)
    key = settings.api_key or os.environ.get("TUNESMITH_API_KEY") or None
    return settings.model_copy(update={"api_key": key})


def _refuse_open_address(settings: Serve, options: ServeOptions) -> None:
    if settings.api_key or options.keys_file or options.allow_open or is_loopback(settings.host):
        return
    raise UserError(
        f"--host {settings.host}: without an API key anyone who reaches this machine could use the model",
        hint="give --api-key (or $TUNESMITH_API_KEY) or --keys-file, or --allow-open when that is what you "
        "want",
    )


def engine_wants(path: str, options: ServeOptions, settings: Serve) -> EngineWants:
    """Raises UserError for adapters that are not named as they must be."""
    own, named = split_adapters(options.adapters)
    name = settings.model_name
    if own is not None and name is None:
        run = run_of(own)
        name = (run.path if run else Path(own).expanduser().absolute()).name
    return EngineWants(
        path=path,
        model_name=name,
        adapter=own,
        adapters=named,
        merge=options.merge,
        # Only what the caller says of both can clash: the run's precision gives way to --weights.
        precision=settings.precision if options.weights is None else options.precision or "auto",
        weights=options.weights,
        device=options.device,
        threads=options.threads,
        max_length=settings.max_length,
        max_concurrent=settings.max_concurrent,
        max_waiting=options.max_waiting,
        cache_tokens=options.cache_tokens,
    )


def split_adapters(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The bare folder, if there is one, and those with a name. Raises UserError for two that clash."""
    own: str | None = None
    named: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        # A path may hold an equals sign; a name holds no slash.
        if not equals or "/" in name:
            if own is not None:
                raise UserError(
                    f"--adapter {text}: there is one already, {own}",
                    hint="give each further adapter a name: --adapter NAME=FOLDER",
                )
            own = text
        elif not name or not folder or name in named:
            fault = "the name is given twice" if name in named else "is not NAME=FOLDER"
            raise UserError(f"--adapter {text}: {fault}", hint="such as --adapter orders=runs/orders")
        else:
            named[name] = folder
    return own, named


def _guard_options(settings: Serve, options: ServeOptions, engine: StartedEngine) -> GuardOptions:
    return GuardOptions(
        keys_file=options.keys_file,
        api_key=settings.api_key,
        cors_origins=options.cors_origins,
        access_log=options.access_log,
        log_prompts=options.log_prompts,
        metrics_open=options.metrics_open,
        bounds=options.bounds,
        engines=engine.statuses,
    )


def bounds(max_body_mib: float, request_timeout_s: float, max_requests: int) -> Bounds:
    return Bounds(
        max_body_bytes=max(1, int(max_body_mib * MIB)),
        request_timeout_s=request_timeout_s,
        max_requests=max_requests,
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
