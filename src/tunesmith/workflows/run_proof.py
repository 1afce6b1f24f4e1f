"""Proofs that what is served is what was trained: the run's tokens, template and stop tokens; an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder
from tunesmith.hub.lock import read_lock, versions
from tunesmith.model.requests import SamplingParams
from tunesmith.model.template import encode_prompt
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import has_tokenizer
from tunesmith.serve.engine import Ask, Engine
from tunesmith.serve.jobs import ServedModel
from tunesmith.workflows.run_facts import run_recipe
from tunesmith.workflows.token_facts import Ends, token_facts

PROBE_TOKENS = 64
PROBE = "Hello! What can you do?"


def check_template_of_run(
    run: RunFolder, tokenizer: Any, stop_ids: Sequence[int], end_ids: Sequence[int], trust_remote_code: bool
) -> None:
    """Raise UserError unless the tokenizer, its template and stop ids are those stored with the run."""
    served = token_facts(tokenizer) | {"stop_ids": list(stop_ids)}
    folder = run.path / "tokenizer"
    if has_tokenizer(folder):
        trained = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        stored = token_facts(trained, Ends(list(end_ids)))
        _compare(run, "its tokenizer folder", stored, served)
    if run.lock.is_file():
        lock = read_lock(run.lock)
        if isinstance(lock.get("tokens"), Mapping):  # runs of earlier versions have none
            _compare(run, "its lock.json", _comparable(run, lock, served), served)


def _comparable(run: RunFolder, lock: Mapping[str, Any], served: Mapping[str, Any]) -> dict[str, Any]:
    """The lock's facts, without a hash that other versions of the packages may make of the same tokenizer."""
    locked, there, here = dict(lock["tokens"]), lock.get("versions", {}), versions()
    changed = [name for name in ("tokenizers", "transformers") if there.get(name) != here.get(name)]
    if changed and locked.get("tokenizer_hash") != served["tokenizer_hash"]:
        told = ", ".join(f"{name} was {there.get(name)} and is {here.get(name)}" for name in changed)
        say(f"warning: {run.path}: the tokenizer cannot be compared with that of lock.json: {told}")
        locked.pop("tokenizer_hash", None)
    return locked


def _compare(run: RunFolder, where: str, stored: Mapping[str, Any], served: Mapping[str, Any]) -> None:
    names = {"tokenizer_hash": "tokenizer", "template_hash": "chat template", "stop_ids": "stop tokens"}
    for key, name in names.items():
        if key in stored and not _same(stored[key], served[key]):
            raise UserError(
                f"{run.path}: the {name} to be served is not the one that the run was trained with "
                f"({where}: {_short(stored[key])}, served: {_short(served[key])})",
                hint="serve the run with its own tokenizer, unchanged",
            )


def _same(one: Any, other: Any) -> bool:
    """Of stop tokens the order means nothing."""
    return set(one) == set(other) if isinstance(one, list) else bool(one == other)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Probe:
    """An answer to a short question: how many tokens it had, and whether its stop token ended it."""

    tokens: int
    ends: bool


async def probe_answer(engine: Engine, model: ServedModel, run: RunFolder | None) -> Probe:
    """Ask the model a question of its run, greedily, and see whether the answer ends by itself."""
    ids = _question(model, run)[: model.max_length - 1]
    most = min(PROBE_TOKENS, model.max_length - len(ids))
    params = SamplingParams(max_new_tokens=most, stop_ids=model.stop_ids)
    tokens, ends = 0, False
    async for batch in engine.submit([Ask(ids, params, model.adapter)]):
        for _, event in batch:
            tokens += event.token_id is not None
            ends |= event.finish_reason == "stop"
    return Probe(tokens, ends)


def _question(model: ServedModel, run: RunFolder | None) -> list[int]:
    recipe = run_recipe(run) if run is not None else None
    text = recipe.samples.prompts[0] if recipe and recipe.samples.prompts else PROBE
    if not model.tokenizer.chat_template:
        return list(model.tokenizer(text).input_ids)
    head = [{"role": "system", "content": recipe.data.system}] if recipe and recipe.data.system else []
    return encode_prompt(model.tokenizer, [*head, {"role": "user", "content": text}])
