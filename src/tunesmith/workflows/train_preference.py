"""The objective of a recipe: what is minimised, and the reference that preferences need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir
from tunesmith.data.batches import sweep
from tunesmith.data.prepare import Prepared
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Objective as Settings
from tunesmith.recipe.schema import Recipe
from tunesmith.train.objective import Objective, Supervised
from tunesmith.train.preference import Preference
from tunesmith.train.reference import Reference

REFERENCE_TOKENS = 2048
# Settings that only some objectives use, and the objectives that do.
USED_BY = {
    "beta": ("dpo", "orpo", "kto"),
    "loss": ("dpo",),
    "label_smoothing": ("dpo",),
    "sft_weight": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def check_objective(settings: Settings) -> None:
    """Raise UserError for a setting that would do nothing."""
    for name, types in USED_BY.items():
        value = getattr(settings, name)
        if value != Settings.model_fields[name].default and settings.type not in types:
            raise UserError(
                f"objective.{name}: {value} is not used by objective.type {settings.type}",
                hint=f"remove it, or set objective.type to {' or '.join(types)}",
            )
    if settings.label_smoothing and settings.loss != "sigmoid":
        raise UserError(
            f"objective.label_smoothing: {settings.label_smoothing} is not used by objective.loss "
            f"{settings.loss}",
            hint="remove it, or set objective.loss to sigmoid",
        )


def make_objective(recipe: Recipe, prepared: Prepared) -> Callable[[Any], Objective]:
    """What makes the objective for a model."""
    if recipe.objective.type == "sft":
        return lambda model: Supervised()
    if recipe.objective.type == "orpo":
        return lambda model: Preference(recipe.objective, None)

    def documents() -> Iterator[Batch]:
        for store in (prepared.train, prepared.eval):
            yield from sweep(store, max_tokens=REFERENCE_TOKENS)

    reference = Reference(documents, cache_dir() / "reference", _identity(recipe))
    return lambda model: Preference(recipe.objective, reference)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What decides the base model's numbers beside its files: formats, quantisation, device."""
    method, quantised = recipe.method, recipe.method.type == "qlora"
    return {
        "precision": recipe.train.precision,
        "full": method.type == "full",
        "quantised": [quantised, quantised and method.double_quant],
        "new_tokens": recipe.model.new_tokens,
        "device": recipe.hardware.device,
        "batch_tokens": REFERENCE_TOKENS,
    }
