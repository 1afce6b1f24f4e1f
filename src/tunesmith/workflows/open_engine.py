"""From a plain description to an engine that computes, and what it tells of itself; in any process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.model.generate import Generator
from tunesmith.model.grammar import Grammars
from tunesmith.model.template import stop_token_ids
from tunesmith.recipe.resolve import SERVE_MAX_LENGTH
from tunesmith.serve.local_engine import LocalEngine
from tunesmith.workflows.open_model import OpenModel
from tunesmith.workflows.open_served import open_served, warm_up_prompt
from tunesmith.workflows.run_facts import recipe_of

POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class EngineWants:
    """What an engine loads and how it computes: numbers and texts, to be sent to another process.

    model_name: under which the model at `path` is served; None: its own. adapter: in place of the one that
    `path` brings. adapters: name and folder of more of them. weights: how they are stored; None: as
    `precision`. cache_tokens: of all requests together; None: as many as max_concurrent of them may need.
    """

    path: str
    model_name: str | None = None
    adapter: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    merge: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    weights: Literal["fp32", "bf16", "int8", "nf4"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    max_length: int | Literal["auto"] = "auto"
    max_concurrent: int = 32
    max_waiting: int = 1024
    cache_tokens: int | None = None


def open_engine(
    wants: EngineWants, *, stopped: Callable[[], bool] = lambda: False
) -> tuple[LocalEngine, dict[str, Any]]:
    """The engine, when it has generated a token, and its facts as plain data.

    Raises UserError for whatever does not load, TunesmithError when it cannot compute or `stopped` says that
    nobody waits for it any more.
    """
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
    generator = Generator(
        opened.model,
        max_length=length,
        max_concurrent=wants.max_concurrent,
        cache_tokens=wants.cache_tokens,
        bank=opened.bank,
        grammars=Grammars(opened.tokenizer, vocab_size(opened), stop_ids(opened)),
    )
    engine = LocalEngine(generator, max_waiting=wants.max_waiting)
    probe = warm_up_prompt(opened)[:length]
    engine.start(probe)
    while not engine.status().ready:
        if stopped() or not engine.status().alive:
            engine.close(grace_s=0.0)
            raise TunesmithError(engine.status().failure or "the engine ended")
        time.sleep(POLL_S)
    return engine, _facts(opened, wants, length, probe)


def vocab_size(opened: OpenModel) -> int:
    return int(opened.model.get_input_embeddings().weight.shape[0])


def stop_ids(opened: OpenModel) -> tuple[int, ...]:
    return stop_token_ids(opened.tokenizer, opened.model.generation_config)


def served_length(wanted: int | Literal["auto"], context: int) -> int:
    """Tokens of prompt and answer together. Raises UserError for more than the model's positions."""
    if wanted == "auto":
        return min(context, SERVE_MAX_LENGTH)
    if wanted > context:
        raise UserError(
            f"--max-length {wanted}: the model's context is {context} tokens", hint=f"give at most {context}"
        )
    return wanted


def _facts(opened: OpenModel, wants: EngineWants, length: int, probe: list[int]) -> dict[str, Any]:
    """What `served_models.Facts` describes, and the prompt for the pool's own questions."""
    weight = opened.model.get_input_embeddings().weight
    files, recipe = opened.files, recipe_of(wants.path)
    ends = getattr(opened.model.generation_config, "eos_token_id", None)
    return {
        "name": opened.name,
        "origin": files.origin,
        "base": str(files.folder),
        "base_revision": files.revision,
        "base_adapters": [str(folder) for folder in files.base_adapters],
        "tokenizer": str(files.tokenizer),
        "adapter": str(opened.adapter) if opened.adapter else None,
        "adapters": {name: str(folder) for name, folder in opened.adapters.items()},
        "merged": opened.merged,
        "context_length": opened.context_length,
        "max_length": length,
        "vocab_size": vocab_size(opened),
        "end_ids": list(ends) if isinstance(ends, (list, tuple)) else [ends] * (ends is not None),
        "device": weight.device.type,
        "weights": opened.weights,
        "probe": probe,
        "trust_remote_code": recipe is not None and recipe.model.trust_remote_code,
    }
