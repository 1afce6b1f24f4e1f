"""What a run's own files tell about it: recipe, data, results. Nothing is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.events import read_events
from tunesmith.core.paths import cache_dir, sha256_json
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.core.store import is_url, join
from tunesmith.core.store_cache import local_path
from tunesmith.export.card import CardFacts
from tunesmith.export.check import Check
from tunesmith.export.save import license_of
from tunesmith.hub.builtin import BUILTIN_LICENSE
from tunesmith.hub.lock import read_lock
from tunesmith.hub.model_files import ModelFiles
from tunesmith.recipe.load import dump_yaml, load_recipe
from tunesmith.recipe.resolve import without_secrets
from tunesmith.recipe.schema import Recipe
from tunesmith.train.metrics import final_events

# Column of the card: key in the event `data`.
DATA_COLUMNS = {
    "file": "file",
    "format": "format",
    "rows": "rows",
    "trained on": "train_rows",
    "held out": "eval_rows",
    "too long": "dropped",
    "truncated": "truncated",
    "tokens": "tokens_kept",
    "supervised tokens": "tokens_supervised",
}
# Key in the event `end`: row of the card.
TOTALS = {
    "tokens": "tokens trained on",
    "supervised_tokens": "supervised tokens trained on",
    "tokens_per_s": "tokens/s",
    "peak_gib": "peak memory, GiB",
}


def public_recipe(run: RunFolder) -> str:
    """The recipe as the user wrote it, or without its API key when it has one."""
    written = load_recipe(run.recipe)
    if written.serve.api_key is None:
        return run.recipe.read_text(encoding="utf-8")
    return dump_yaml(without_secrets(written))


def run_folder(recipe: Recipe, recipe_path: Path) -> RunFolder:
    """Where the run of a recipe is, or will be, on this machine: of one in an object store, in the cache."""
    folder = Path(recipe.output_dir).expanduser()
    if is_url(recipe.output_dir):
        folder = cache_dir() / "runs" / sha256_json(recipe.output_dir.rstrip("/"))[:16]
    return RunFolder((folder / (recipe.name or recipe_path.stem)).absolute())


def run_url(recipe: Recipe, recipe_path: Path) -> str | None:
    """The URL of a run in an object store; None where output_dir is a folder of this machine."""
    return join(recipe.output_dir, recipe.name or recipe_path.stem) if is_url(recipe.output_dir) else None


def run_recipe(run: RunFolder) -> Recipe:
    """The recipe that the run used: resolved, or as written where the run has not got that far."""
    return load_recipe(run.resolved if run.resolved.is_file() else run.recipe)


def recipe_of(path: str) -> Recipe | None:
    """The recipe of the run at `path`; None where that is no run folder."""
    folder = Path(local_path(path)).expanduser()
    return run_recipe(RunFolder(folder)) if is_run(folder) else None


def card_facts(
    run: RunFolder, *, kind: str, step: int, base: ModelFiles, base_name: str, checks: Sequence[Check]
) -> CardFacts:
    """What the card of an export of checkpoint `step` tells."""
    return CardFacts(
        name=run.path.name,
        kind=kind,
        base=base_name,
        base_revision=base.revision,
        base_license=BUILTIN_LICENSE if base.source == "builtin" else license_of(base.folder),
        method=run_recipe(run).method.type,
        step=step,
        recipe=public_recipe(run),
        data=data_rows(run),
        results=results(run, step),
        checks=[check.as_dict() for check in checks],
        versions=read_lock(run.lock).get("versions", {}),
    )


def data_rows(run: RunFolder) -> list[dict[str, Any]]:
    """What became of the rows of every data file, as the run counted it; empty when it noted none."""
    events = list(read_events(run.events, "data"))
    files = events[-1].get("files", []) if events else []
    return [{name: row.get(key, "") for name, key in DATA_COLUMNS.items()} for row in files]


def results(run: RunFolder, step: int) -> dict[str, Any]:
    """Measured up to `step`: held-out loss before and after, training loss, and the whole run's totals."""
    evals = [event for event in final_events(run.events, "eval") if int(event["step"]) <= step]
    steps = [event for event in final_events(run.events, "step") if int(event["step"]) <= step]
    found = {f"held-out loss at step {event['step']}": event["loss"] for event in (*evals[:1], *evals[-1:])}
    if steps:
        found[f"training loss at step {steps[-1]['step']}"] = steps[-1]["loss"]
    for event in read_events(run.events, "end"):
        if event.get("step") == step:
            found |= {name: event[key] for key, name in TOTALS.items() if key in event}
    return found
