"""From a plain description to an engine that computes, and what it tells of itself; in any process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from tunesmith.core.errors import MissingExtra, TunesmithError
from tunesmith.model.generate import Generator
from tunesmith.model.grammar import Grammars
from tunesmith.model.template import stop_token_ids
from tunesmith.serve.local_engine import LocalEngine
from tunesmith.workflows.engine_facts import engine_facts
from tunesmith.workflows.engine_wants import EngineWants, served_length
from tunesmith.workflows.open_model import OpenModel
from tunesmith.workflows.open_served import open_served, warm_up_prompt
from tunesmith.workflows.run_facts import recipe_of

POLL_S = 0.02
PREPARE_AFTER_S, PREPARE_WITHIN_S = 1.0, 300.0


def open_engine(
    wants: EngineWants, *, stopped: Callable[[], bool] = lambda: False
) -> tuple[LocalEngine, dict[str, Any]]:
    """The engine, computing in a thread, when it has generated a token, and its facts as plain data.

    Raises UserError for whatever does not load, TunesmithError when it cannot compute or `stopped` says that
    nobody waits for it any more.
    """
    engine, facts = load_engine(wants)
    engine.start(facts["probe"])
    wait_until_ready(engine, stopped)
    return engine, facts


def wait_until_ready(engine: LocalEngine, stopped: Callable[[], bool] = lambda: False) -> None:
    """Raises as `open_engine` does, with the engine closed."""
    while not engine.status().ready:
        if stopped() or not engine.status().alive:
            engine.close(grace_s=0.0)
            raise TunesmithError(engine.status().failure or "the engine ended")
        time.sleep(POLL_S)


def load_engine(wants: EngineWants) -> tuple[LocalEngine, dict[str, Any]]:
    """The engine, not started yet, and its facts. Raises UserError for whatever does not load."""
    opened = open_served(
        wants.path,
        adapter=wants.adapter,
        adapters=wants.adapters,
        name=wants.model_name,
        merge=wants.merge,
        weights=wants.weights or "auto",
        precision=wants.precision,
        device=wants.device,
        threads=wants.threads,
    )
    length = served_length(wants.max_length, opened.context_length)
    grammars = Grammars(opened.tokenizer, vocab_size(opened), stop_ids(opened))
    generator = Generator(
        opened.model,
        max_length=length,
        max_concurrent=wants.max_concurrent,
        cache_tokens=wants.cache_tokens,
        # Weights that are rounded are not worth keys and values that are not.
        cache_dtype=torch.bfloat16 if opened.weights in ("bf16", "int8", "nf4") else None,
        bank=opened.bank,
        grammars=grammars,
    )
    engine = LocalEngine(generator, max_waiting=wants.max_waiting)
    threading.Thread(target=_prepare, args=(engine, grammars), daemon=True).start()
    return engine, _facts(opened, wants, length, warm_up_prompt(opened)[:length])


def _prepare(engine: LocalEngine, grammars: Grammars) -> None:
    """Read the tokenizer before the first request with a grammar comes, but not before the engine is ready.

    It takes half a second, in which no other thread of this process goes on.
    """
    end = time.monotonic() + PREPARE_WITHIN_S
    while not engine.status().ready and time.monotonic() < end:
        time.sleep(PREPARE_AFTER_S)
    time.sleep(PREPARE_AFTER_S)
    if engine.status().ready:
        with suppress(MissingExtra):
            grammars.prepare()


def vocab_size(opened: OpenModel) -> int:
    return int(opened.model.get_input_embeddings().weight.shape[0])


def stop_ids(opened: OpenModel) -> tuple[int, ...]:
    return stop_token_ids(opened.tokenizer, opened.model.generation_config)


def _facts(opened: OpenModel, wants: EngineWants, length: int, probe: list[int]) -> dict[str, Any]:
    recipe = recipe_of(wants.path)
    return engine_facts(
        opened.files,
        name=opened.name,
        adapter=opened.adapter,
        adapters=opened.adapters,
        merged=opened.merged,
        context_length=opened.context_length,
        max_length=length,
        vocab_size=vocab_size(opened),
        eos_token_id=getattr(opened.model.generation_config, "eos_token_id", None),
        device=opened.model.get_input_embeddings().weight.device.type,
        weights=opened.weights,
        probe=probe,
        trust_remote_code=recipe is not None and recipe.model.trust_remote_code,
    )
