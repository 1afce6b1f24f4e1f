"""A model as far as a plan needs it: configuration and tokenizer, never its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.hub_cache import hub_cache
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.core.store import is_url
from tunesmith.core.store_cache import fetch
from tunesmith.hub.builtin import BUILTIN
from tunesmith.hub.lock import read_lock
from tunesmith.hub.made import is_whole, models_dir
from tunesmith.hub.repo import cached, fetch_repo
from tunesmith.hub.selection import BESIDE, Selection
from tunesmith.hub.sources import is_hub_model, resolve_model
from tunesmith.hub.wish import Wish
from tunesmith.model.config import load_config
from tunesmith.model.weights import has_tokenizer, is_adapter, read_json_file
from tunesmith.plan.sizes import config_of, size_named
from tunesmith.recipe.schema import Model, Recipe
from tunesmith.train.states import weights_bytes
from tunesmith.workflows.plan_step import shape_of

# What is fetched of a hub model: all that lies beside its weights, exports in subfolders left out.
DESCRIPTION = Selection(allow=BESIDE, deny=("*/*",))
DEPTH = 8  # adapters of adapters: more is a circle


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """config: as transformers has it; tokenizer: its folder, None where there is none; cache: the folder to
    which training will first fetch the weights, None where they are here or nobody can tell; note: what to
    know of where this comes from."""

    name: str
    config: Any
    tokenizer: Path | None
    cache: Path | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters of a recipe's model, adapters with it, and bytes of what is written of it.

    stored_bytes: of the weights in a checkpoint; trained: (number, bytes each) of every trained tensor.
    """

    parameters: int
    trained_parameters: int
    stored_bytes: int
    trained: tuple[tuple[int, int], ...]
    base_parameters: int

    def as_dict(self) -> dict[str, int]:
        return {"parameters": self.parameters, "trained_parameters": self.trained_parameters}


def find_model(model: Model) -> PlannedModel:
    """The model that a recipe names: a folder with a config.json, a run, an adapter, a GGUF file, a hub id,
    of which only what lies beside the weights is fetched, or the name of a size in the table of sizes.

    Raises UserError for what is none of these, or no language model; what the hub raises of a model that is
    in no table.
    """
    return _named(model.path, model, depth=0)


def _named(path: str, model: Model, *, depth: int) -> PlannedModel:
    if depth > DEPTH:
        raise UserError(f"{path}: runs or adapters name each other as their base in a circle")
    if is_url(path):
        return _named(str(fetch(path)), model, depth=depth + 1)
    local = Path(path).expanduser().absolute()
    if local.is_dir():
        return _folder(local, model, depth)
    if path.lower() == BUILTIN and is_whole(models_dir() / BUILTIN):
        return _described(models_dir() / BUILTIN, BUILTIN, model)
    if not local.exists() and path.lower() != BUILTIN:
        return _distant(path, model, depth)
    files = resolve_model(path, revision=model.revision, endpoints=model.endpoint, offline=model.offline)
    return replace(_described(files.folder, files.name, model), tokenizer=files.tokenizer)


def _distant(path: str, model: Model, depth: int) -> PlannedModel:
    """A hub id; where no hub answers, and for other names, the shape of a known size."""
    if not is_hub_model(path):
        return _sized(path)
    try:
        return _hub(path, model, depth)
    except TunesmithError as error:
        try:
            found = _sized(path)
        except UserError:
            raise error from None
        return replace(found, note=f"{path} could not be fetched; its shape is from the table of sizes")


def _sized(name: str) -> PlannedModel:
    size = size_named(name)
    config = config_of(size.name)
    config.dtype = torch.bfloat16  # as all of them are published
    return PlannedModel(name=size.name, config=config, tokenizer=None)


def _folder(folder: Path, model: Model, depth: int) -> PlannedModel:
    if is_run(folder):
        return _run(RunFolder(folder), model, depth)
    if not is_adapter(folder):
        return _described(folder, folder.name, model)
    base = read_json_file(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{folder}: adapter_config.json names no base model", hint="give the base model itself"
        )
    return _on(_named(str(base), model, depth=depth + 1), folder)


def _run(run: RunFolder, model: Model, depth: int) -> PlannedModel:
    """The model that a run has trained has the shape of the one that it began with."""
    entry = read_lock(run.lock)["model"]
    base = _named(
        str(entry["origin"]), model.model_copy(update={"revision": entry.get("revision")}), depth=depth + 1
    )
    return _on(replace(base, name=run.path.name), run.path / "tokenizer")


def _on(base: PlannedModel, folder: Path) -> PlannedModel:
    """The base with the tokenizer of what lies on top of it, if that has its own."""
    return replace(base, tokenizer=folder) if has_tokenizer(folder) else base


def _hub(name: str, model: Model, depth: int) -> PlannedModel:
    """A whole copy in the cache, else what lies beside the weights, fetched."""
    wish = Wish("model", name, model.revision, tuple(model.endpoint or ()), offline=model.offline)
    whole = cached(wish, whole=True)
    found = whole or fetch_repo(replace(wish, selection=DESCRIPTION))
    if is_adapter(found.folder):
        return _folder(found.folder, model, depth)
    planned = _described(found.folder, name, model)
    return planned if whole is not None else replace(planned, cache=hub_cache())


def _described(folder: Path, name: str, model: Model) -> PlannedModel:
    config = load_config(folder, trust_remote_code=model.trust_remote_code)
    return PlannedModel(name=name, config=config, tokenizer=folder if has_tokenizer(folder) else None)


def size_of(recipe: Recipe, config: Any, *, new_token_ids: tuple[int, ...] = ()) -> Size:
    """Counts of the model that the resolved recipe trains, from its shapes. Raises UserError for layers that
    the recipe names and the model lacks."""
    layers = config.get_text_config().num_hidden_layers
    if recipe.method.type == "qlora":  # has the adapters of lora, and a base that is counted as it was
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"type": "lora"})})
    return counted(shape_of(recipe, config, layers=layers, new_token_ids=new_token_ids))


def counted(model: Any) -> Size:
    """Counts of a model that is not quantised, real or of shapes alone, its adapters attached."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters, learned = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    return Size(
        parameters=parameters,
        trained_parameters=learned,
        stored_bytes=weights_bytes(model),
        trained=tuple((p.numel(), p.element_size()) for p in trained),
        base_parameters=parameters - (learned if isinstance(model, PeftModel) else 0),
    )
