"""Replace every "auto" of a recipe by its value. The recipe a user wrote is never changed: the result is
a second object of the same shape, written to the run's `resolved.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.recipe.memory import check_memory, memory_settings
from tunesmith.recipe.methods import check_method
from tunesmith.recipe.schema import Precision, Recipe

MAX_LENGTH = 2048
SERVE_MAX_LENGTH = 4096
LR = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
MAX_WORKERS = 8
MIN_SAVE_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the values depend on: the model's limit in tokens, and what the machine can do."""

    context_length: int
    device: Literal["cpu", "cuda"]
    threads: int
    precision: Precision
    serve_precision: Literal["fp32", "bf16", "fp16"]
    processes: int = 1
    kernels: Literal["torch", "liger"] = "torch"


def resolve(recipe: Recipe, facts: Facts) -> Recipe:
    """Fill in all that does not depend on the number of steps; `resolve_steps` does the rest.

    serve.engine stays as it is: the machine that serves decides.

    method.type and train.micro_batch_size depend on a plan of the memory (`plan.auto`) and are values by now.
    Raises UserError for a length beyond the model's limit, and for settings that cannot work together.
    """
    assert recipe.method.type != "auto" and recipe.train.micro_batch_size != "auto"
    check_method(recipe)
    for key, length in (("data", recipe.data.max_length), ("serve", recipe.serve.max_length)):
        if length != "auto" and length > facts.context_length:
            raise UserError(
                f"{key}.max_length: {length} is more than the model's limit of {facts.context_length} tokens",
                hint=f"take at most {facts.context_length}, or 'auto'",
            )
    engine = recipe.parallel.engine
    if engine == "auto":
        engine = "single" if _processes(recipe, facts) == 1 else "ddp"
    resolved = _updated(
        _plain(recipe),
        data={
            "max_length": min(facts.context_length, MAX_LENGTH),
            "workers": max(1, min(facts.threads, MAX_WORKERS)),
        },
        method={"alpha": 2.0 * recipe.method.rank},
        train={
            "lr": LR[recipe.method.type],
            "compile": False,
            "kernels": facts.kernels,
            **memory_settings(recipe, precision=facts.precision, engine=engine),
        },
        serve={
            "max_length": min(facts.context_length, SERVE_MAX_LENGTH),
            "precision": _serve_precision(recipe, facts),
        },
        parallel={"engine": engine},
        hardware={"device": facts.device, "threads": facts.threads, "processes": facts.processes},
    )
    check_memory(resolved)
    return resolved


def _processes(recipe: Recipe, facts: Facts) -> int:
    return facts.processes if recipe.hardware.processes == "auto" else recipe.hardware.processes


def _serve_precision(recipe: Recipe, facts: Facts) -> str:
    """Never another than that of the weights, where they are given."""
    weights = recipe.serve.weights
    return weights if weights in ("fp32", "bf16") else facts.serve_precision


def resolve_steps(recipe: Recipe, total_steps: int) -> Recipe:
    """Fill in the intervals that depend on the number of optimizer steps of the run."""
    every = max(1, round(total_steps / 4))
    done = _updated(
        recipe, train={"save_every": max(MIN_SAVE_STEPS, round(total_steps / 5))}, eval={"every": every}
    )
    return _updated(done, samples={"every": done.eval.every})


def without_secrets(recipe: Recipe) -> Recipe:
    """The recipe without its API key: what may be written into files that people pass on."""
    return recipe.model_copy(update={"serve": recipe.serve.model_copy(update={"api_key": None})})


def _plain(recipe: Recipe) -> Recipe:
    """The recipe with a truth value for gradient_checkpointing replaced by the name of what it means."""
    given = recipe.train.gradient_checkpointing
    if not isinstance(given, bool):
        return recipe
    train = recipe.train.model_copy(update={"gradient_checkpointing": "full" if given else "none"})
    return recipe.model_copy(update={"train": train})


def _updated(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with each named value put in where "auto" stands."""
    changed = {}
    for name, values in sections.items():
        section = getattr(recipe, name)
        fills = {key: value for key, value in values.items() if getattr(section, key) == "auto"}
        changed[name] = section.model_copy(update=fills)
    return recipe.model_copy(update=changed)
