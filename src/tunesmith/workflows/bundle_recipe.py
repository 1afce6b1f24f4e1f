"""What a recipe needs, as parts of a bundle: its models, its rows, and the recipe itself with its paths set
to where these will lie, below the project folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_json, write_text
from tunesmith.core.progress import say
from tunesmith.hub.builtin import BUILTIN
from tunesmith.hub.bundle_manifest import Item
from tunesmith.hub.bundle_models import Collected, collect, describe_folder, files_below
from tunesmith.hub.bundle_store import Store, slug
from tunesmith.hub.datasets import is_hub_dataset
from tunesmith.hub.sources import resolve_model
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe, Source
from tunesmith.workflows.fetch import How, fetch_dataset, hub_datasets

RECIPE = "recipe.yaml"


def collect_model(
    store: Store,
    path: str,
    *,
    revision: str | None = None,
    endpoints: list[str] | None = None,
    offline: bool = False,
) -> list[Item]:
    """The model `path`, as `resolve_model` understands it, with its base and adapters.

    Raises what `resolve_model` raises, and UserError for a base model that lies somewhere on this disk: its
    path would lead nowhere on the other machine.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return [collect(store, _local_model(local))]
    files = resolve_model(path, revision=revision, endpoints=endpoints, offline=offline)
    folders = dict.fromkeys([files.folder, *files.base_adapters, *([files.adapter] if files.adapter else [])])
    found = [collect(store, _local_model(local))] if local.is_dir() else []
    for folder in folders:
        if local.is_dir() and folder.resolve().is_relative_to(local.resolve()):
            continue
        wanted = describe_folder(folder)
        if wanted is None:
            raise UserError(
                f"{path}: its base {folder} is a folder of this machine, which the other does not have",
                hint=f"export it as one model first: tunesmith export {path} --kind merged",
            )
        found.append(collect(store, wanted))
    return found


def _local_model(path: Path) -> Collected:
    """A model folder, run or GGUF file of the user: below models/ in the project folder."""
    path = path.absolute()
    name = slug(path.name)
    if path.is_file():
        place, sources = "models", {name: path}
    else:
        place, sources = f"models/{name}", files_below(path)
    return Collected("model", name, f"models/project/{name}", {"kind": "project", "place": place}, sources)


def collect_data(store: Store, path: Path) -> list[Item]:
    """The files and hub data sets that a recipe's sources name.

    Raises UserError for a file that is not there, and what `fetch_dataset` raises.
    """
    recipe = load_recipe(path)
    found = [collect(store, wanted) for _, wanted in _local_sources(recipe) if wanted is not None]
    for name in hub_datasets(recipe):
        how = How(endpoints=tuple(recipe.model.endpoint or ()), offline=recipe.model.offline)
        wanted = describe_folder(fetch_dataset(name, how=how).files.folder, part="data")
        assert wanted is not None, name
        found.append(collect(store, wanted))
    return found


def _local_sources(recipe: Recipe) -> list[tuple[Source, Collected | None]]:
    """Each source, and how its files are carried; None for a hub id."""
    named = [("", source) for source in recipe.data.sources]
    named += [("eval-", source) for source in recipe.data.eval_sources]
    return [(source, _source(source, f"{kind}{number}")) for number, (kind, source) in enumerate(named)]


def _source(source: Source, number: str) -> Collected | None:
    path = Path(source.path).expanduser().absolute()
    name = f"{number}-{slug(path.name)}"
    root = f"data/{name}"
    if path.is_file():
        return Collected("data", name, "data/files", {"kind": "project", "place": "data"}, {name: path})
    if path.is_dir():
        return Collected("data", name, root, {"kind": "project", "place": root}, files_below(path))
    if not is_hub_dataset(source.path):
        raise UserError(f"'{source.path}' does not exist (looked in {Path.cwd()})", hint="check the path")
    return None


def collect_recipe(store: Store, path: Path, parts: set[str]) -> None:
    """The model of a recipe, and the recipe as it will be read on the other machine."""
    recipe = load_recipe(path)
    model = recipe.model
    if "model" in parts:
        collect_model(
            store, model.path, revision=model.revision, endpoints=model.endpoint, offline=model.offline
        )
    if "project" not in parts:
        return
    text = moved_recipe(path, recipe)
    request = {"kind": "project", "place": "", "sha256": sha256_json(text)}
    if store.keep("project", "recipe", request) is None:
        folder = store.staging("project", "recipe")
        write_text(folder / RECIPE, text)
        for name, source in _templates(recipe).items():
            write_text(folder / name, source.read_text(encoding="utf-8"))
        store.add("project", "recipe", "project/recipe", request, folder)


def _templates(recipe: Recipe) -> dict[str, Path]:
    """The chat template file of the recipe, by its name in the bundle."""
    given = recipe.model.chat_template
    return {Path(given).name: Path(given).expanduser()} if given else {}


def moved_recipe(path: Path, recipe: Recipe) -> str:
    """The text of a recipe with its paths relative to the project folder; its comments are kept.

    A hub model is read from the cache only; the API key is left out: a bundle is passed on.
    """
    yaml = YAML()
    values: Any = yaml.load(path)
    values["name"] = recipe.name or path.stem
    model = Path(recipe.model.path).expanduser()
    if model.exists():
        values["model"]["path"] = f"models/{slug(model.absolute().name)}"
    elif recipe.model.path.lower() != BUILTIN:
        values["model"]["offline"] = True
    for name in _templates(recipe):
        values["model"]["chat_template"] = name
    sources = [*values["data"]["sources"], *(values["data"].get("eval_sources") or [])]
    for entry, (_, wanted) in zip(sources, _local_sources(recipe), strict=True):
        if wanted is not None:
            entry["path"] = f"data/{wanted.name}"
    if recipe.serve.api_key is not None:
        say(f"{path}: serve.api_key is left out of the bundle; set $TUNESMITH_API_KEY on the other machine")
        del values["serve"]["api_key"]
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()
