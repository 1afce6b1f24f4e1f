"""What a planned run writes."""

from __future__ import annotations

from math import ceil

from tunesmith.core.paths import cache_dir
from tunesmith.plan.disk import (
    Q8_0_BYTES,
    DiskPart,
    DiskPlan,
    checkpoint_bytes,
    plan_disk,
    state_bytes,
    stored_rows,
)
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_model import PlannedModel, Size
from tunesmith.workflows.plan_subject import Subject, WorkPlan


def disk_of(subject: Subject, size: Size, work: WorkPlan) -> DiskPlan:
    recipe, run, every = subject.recipe, subject.run, subject.recipe.train.save_every
    if work.steps is None or every == "auto":
        saves = recipe.train.keep_checkpoints + 1
    else:
        saves = 1 + ceil(work.steps / every)  # the first before step 1
    return plan_disk(
        run,
        checkpoint=planned_checkpoint(recipe, size),
        keep=recipe.train.keep_checkpoints,
        saves=saves,
        exports=_exports(subject, size),
        elsewhere=_elsewhere(subject, size),
        present=subject.present_bytes,
    )


def planned_checkpoint(recipe: Recipe, size: Size) -> int:
    """Bytes of a checkpoint of the resolved recipe."""
    optimizer = recipe.train.optimizer
    assert optimizer != "auto"
    states = sum(count * state_bytes(optimizer, each, count=count) for count, each in size.trained)
    return checkpoint_bytes(size.stored_bytes, states)


def _exports(subject: Subject, size: Size) -> list[DiskPart]:
    folder, full = subject.run / "export", subject.recipe.method.type == "full"
    merged = size.base_parameters * published_bytes(subject.model)
    gguf = ceil(size.base_parameters * Q8_0_BYTES)
    return [
        *(
            []
            if full
            else [DiskPart(what="adapter export", folder=folder, num_bytes=4 * size.trained_parameters)]
        ),
        DiskPart(what="merged export", folder=folder, num_bytes=merged, kind="run" if full else "later"),
        DiskPart(what="GGUF export (q8_0)", folder=folder, num_bytes=gguf, kind="later"),
    ]


def _elsewhere(subject: Subject, size: Size) -> list[DiskPart]:
    parts = []
    if subject.model.cache is not None:
        weights = size.base_parameters * published_bytes(subject.model)
        parts.append(
            DiskPart(what="the model's weights, to be fetched", folder=subject.model.cache, num_bytes=weights)
        )
    if subject.data is not None:
        sums = subject.data.prepared.totals()
        tokens = sums["tokens_kept"] + sums["tokens_dropped"]
        kept = stored_rows(tokens, sums["rows"])
        parts.append(DiskPart(what="tokenised rows", folder=cache_dir(), num_bytes=kept, kind="there"))
    return parts


def published_bytes(model: PlannedModel) -> int:
    """Of a weight, as the model was published: so it is fetched, and exported merged."""
    return int(getattr(model.config.dtype, "itemsize", 4))
