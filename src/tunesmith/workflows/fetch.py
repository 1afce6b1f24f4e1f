"""Bring models and data sets to this machine, and say what was brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.hub.datasets import DatasetFiles, dataset_files, is_hub_dataset
from tunesmith.hub.lock import write_fetch_lock
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.remote import model_files
from tunesmith.hub.repo import Plan, fetch_repo, plan_repo
from tunesmith.hub.selection import Selection
from tunesmith.hub.sources import is_hub_model, resolve_model
from tunesmith.hub.wish import JOBS, SLOW_KIB_PER_S, Wish
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe

RECIPE_ENDINGS = (".yaml", ".yml")
DATASET_PREFIXES = ("dataset:", "datasets/", "hf://datasets/", "https://huggingface.co/datasets/")
MODEL_PREFIXES = ("model:", "hf://", "https://huggingface.co/")


@dataclass(frozen=True)
class How:
    """How to fetch; what is left out is taken from the recipe where there is one, else its default."""

    revision: str | None = None
    endpoints: tuple[str, ...] = ()
    offline: bool = False
    selection: Selection = field(default_factory=Selection)
    jobs: int = JOBS
    slow_kib_per_s: float = SLOW_KIB_PER_S
    progress: bool = True

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}", hint="give 1 or more")
        if self.slow_kib_per_s < 0:
            raise UserError(f"--min-speed is {self.slow_kib_per_s:g}", hint="give 0 (no floor) or more KiB/s")

    def wish(self, kind: str, name: str) -> Wish:
        return Wish(
            "dataset" if kind == "dataset" else "model",
            name,
            self.revision,
            self.endpoints,
            offline=self.offline,
            selection=self.selection,
            jobs=self.jobs,
            slow_kib_per_s=self.slow_kib_per_s,
            progress=self.progress,
        )


@dataclass(frozen=True)
class FetchedDataset:
    """`lock`: the lock file written, if one was asked for."""

    files: DatasetFiles
    lock: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        files = self.files
        return {
            "dataset": files.name,
            "source": "hub",
            "revision": files.revision,
            "folder": str(files.folder),
            "bytes": _sum(files.files),
            "files": files.files,
            "lock": str(self.lock) if self.lock else None,
        }


@dataclass(frozen=True)
class Fetched:
    """A model, with the data sets of the recipe where one was fetched.

    `listed`: the files brought, where the user chose them; else those that the model uses.
    """

    files: ModelFiles
    lock: Path | None = None
    datasets: tuple[FetchedDataset, ...] = ()
    listed: dict[str, dict[str, int | str]] | None = None

    def as_dict(self) -> dict[str, Any]:
        files = self.files
        listed = files.files if self.listed is None else self.listed
        return {
            "model": files.name,
            "source": files.source,
            "revision": files.revision,
            "folder": str(files.folder),
            "adapter": str(files.adapter) if files.adapter else None,
            "tokenizer": str(files.tokenizer),
            "bytes": _sum(listed),
            "files": listed,
            "datasets": [found.as_dict() for found in self.datasets],
            "lock": str(self.lock) if self.lock else None,
        }


def fetch(
    what: str,
    *,
    revision: str | None = None,
    endpoints: Sequence[str] | None = None,
    offline: bool = False,
    lock: Path | None = None,
    how: How | None = None,
) -> Fetched:
    """Bring the model `what`, or all that the recipe file `what` needs; options overrule the recipe.

    `lock`: a file to write the lock to. Raises what `resolve_model`, `fetch_repo` and `load_recipe` raise.
    """
    how = how or How(revision, tuple(endpoints or ()), offline)
    if is_recipe(what):
        return fetch_recipe(Path(what), how=how, lock=lock)
    found = _fetch_model(what, how)
    if lock is not None:
        write_fetch_lock(lock, found.files, [])
    return replace(found, lock=lock)


def fetch_dataset(name: str, *, how: How | None = None, lock: Path | None = None) -> FetchedDataset:
    """Bring the hub data set `name`. Raises what `fetch_repo` raises."""
    wish = (how or How()).wish("dataset", name)
    files = dataset_files(wish, fetch_repo(wish))
    if lock is not None:
        write_fetch_lock(lock, None, [files])
    return FetchedDataset(files, lock)


def fetch_recipe(path: Path, *, how: How | None = None, lock: Path | None = None) -> Fetched:
    """Bring the model of a recipe and every hub data set that it names, for training and evaluation."""
    recipe = load_recipe(path.expanduser())
    how = _with_recipe(how or How(), recipe)
    model = _fetch_model(recipe.model.path, how)
    datasets = tuple(fetch_dataset(name, how=_for_data(how)) for name in hub_datasets(recipe))
    if lock is not None:
        write_fetch_lock(lock, model.files, [found.files for found in datasets])
    return replace(model, lock=lock, datasets=datasets)


def plan_fetch(
    what: str, *, dataset: bool = False, recipe: Path | None = None, how: How | None = None
) -> dict[str, Any]:
    """What a fetch would bring, without bringing it: files and sizes, and what is here already."""
    how = how or How()
    if recipe is None and not dataset and is_recipe(what):
        recipe = Path(what)
    if recipe is None:
        return _planned("dataset" if dataset else "model", what, how) | {"dry_run": True}
    read = load_recipe(recipe.expanduser())
    how = _with_recipe(how, read)
    below = [_planned("dataset", name, _for_data(how)) for name in hub_datasets(read)]
    return _planned("model", read.model.path, how) | {"dry_run": True, "datasets": below}


def how(
    *,
    revision: str | None = None,
    endpoints: Sequence[str] = (),
    offline: bool = False,
    allow: Sequence[str] = (),
    deny: Sequence[str] = (),
    allow_pickle: bool = False,
    jobs: int = JOBS,
    slow_kib_per_s: float = SLOW_KIB_PER_S,
) -> How:
    """How to fetch, from plain options. Raises UserError for a value out of range."""
    chosen = Selection(tuple(allow), tuple(deny), allow_pickle)
    return How(revision, tuple(endpoints), offline, chosen, jobs, slow_kib_per_s)


def hub_datasets(recipe: Recipe) -> list[str]:
    """The hub data sets that a recipe names, each once."""
    paths = [source.path for source in (*recipe.data.sources, *recipe.data.eval_sources)]
    return list(dict.fromkeys(path for path in paths if is_hub_dataset(path)))


def is_recipe(what: str) -> bool:
    return Path(what).suffix in RECIPE_ENDINGS


def kind_by_prefix(what: str) -> tuple[str, bool]:
    """(name, is a data set) of what a user writes: `datasets/owner/name`, `dataset:owner/name`, a page."""
    for prefix in DATASET_PREFIXES:
        if what.startswith(prefix) and not Path(what).exists():
            return what.removeprefix(prefix).strip("/"), True
    prefix = next((prefix for prefix in MODEL_PREFIXES if what.startswith(prefix)), "")
    return (what.removeprefix(prefix).strip("/") if prefix else what), False


def _fetch_model(what: str, how: How) -> Fetched:
    if how.selection != Selection() and not is_hub_model(what):
        raise UserError(
            f"'{what}' is no hub model, so there are no files to choose from",
            hint="--allow, --deny and --allow-pickle are for hub ids (owner/name)",
        )
    if is_hub_model(what) and how != How(how.revision, how.endpoints, how.offline):
        wish = how.wish("model", what)
        snapshot = fetch_repo(wish)
        if how.selection != Selection():
            return Fetched(model_files(wish, snapshot), listed=snapshot.files)
    return Fetched(
        resolve_model(
            what,
            revision=how.revision,
            endpoints=how.endpoints or None,
            offline=how.offline,
            progress=how.progress,
        )
    )


def _planned(kind: str, name: str, how: How) -> dict[str, Any]:
    if kind == "model" and not is_hub_model(name):
        where = "here already" if Path(name).expanduser().exists() else "made from a package, not fetched"
        local = {"source": "local", "note": where, "revision": None}
        return {"model": name, **local, "bytes": 0, "missing_bytes": 0, "files": {}}
    plan: Plan = plan_repo(how.wish(kind, name))
    files = {
        file.path: {"bytes": file.size, "sha256": file.sha256, "here": file.path in plan.whole}
        for file in plan.files
    }
    return {
        kind: name,
        "source": "hub",
        "endpoint": str(plan.listing.endpoint),
        "revision": plan.listing.commit,
        "bytes": sum(file.size or 0 for file in plan.files),
        "missing_bytes": plan.missing_bytes,
        "files": files,
    }


def _with_recipe(how: How, recipe: Recipe) -> How:
    model = recipe.model
    return replace(
        how,
        revision=how.revision or model.revision,
        endpoints=how.endpoints or tuple(model.endpoint or ()),
        offline=how.offline or model.offline,
    )


def _for_data(how: How) -> How:
    """A recipe's revision and choice of files are its model's."""
    return replace(how, revision=None, selection=Selection())


def _sum(files: dict[str, dict[str, int | str]]) -> int:
    return sum(int(entry["bytes"]) for entry in files.values())
