"""What a gateway serves, proved to be what was asked for, and how it is guarded."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tunesmith.core.progress import say
from tunesmith.serve.engine import Engine
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.guard import GuardOptions
from tunesmith.serve.jobs import ServedModel
from tunesmith.workflows.run_proof import PROBE_TOKENS, Probe, probe_answer
from tunesmith.workflows.serve_settings import Deployment
from tunesmith.workflows.served_models import Facts, open_adapter, run_of, served_models
from tunesmith.workflows.start_engine import StartedEngine


def fill(gateway: Gateway, started: StartedEngine, facts: Facts) -> dict[str, Any]:
    """Have the gateway answer with what the engine has loaded; model, models, max_length, the probe's end and
    what the model is made of.

    Raises UserError when the tokenizer or its template are not those of the run.
    """
    models, engine = served_models(facts), started.engine
    assert engine is not None
    first = next(iter(models.values()))
    probe = _probe(first, engine)
    gateway.open_adapter = partial(open_adapter, facts)
    gateway.models, gateway.engine = models, engine
    return {
        "model": first.name,
        "models": list(models),
        "max_length": first.max_length,
        "probe": probe,
    } | first.origin


def _probe(model: ServedModel, engine: Engine) -> dict[str, Any] | None:
    """Of a run: whether an answer ends by its stop token; says so where it does not."""
    run = model.origin["run"] and run_of(model.origin["run"])
    if not run:
        return None
    with ThreadPoolExecutor(1) as elsewhere:  # this thread may have an event loop already
        found: Probe = elsewhere.submit(lambda: asyncio.run(probe_answer(engine, model, run))).result()
    if not found.ends:
        say(
            f"warning: {model.name}: a probe answer did not end by its stop token within {PROBE_TOKENS} "
            "tokens: was it trained long enough, and with its stop token?"
        )
    return {"tokens": found.tokens, "ends": found.ends}


def guard_options(wanted: Deployment, engine: StartedEngine) -> GuardOptions:
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
