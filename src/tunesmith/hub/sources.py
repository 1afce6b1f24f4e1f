"""From what a user writes as `model.path` to files on this disk."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.core.store import is_url
from tunesmith.core.store_cache import fetch
from tunesmith.hub.builtin import BUILTIN, builtin_model
from tunesmith.hub.gguf_file import is_gguf, model_from_gguf
from tunesmith.hub.lock import read_lock
from tunesmith.hub.model_files import ModelFiles, check_model_folder
from tunesmith.hub.remote import fetch_model
from tunesmith.model.weights import has_tokenizer, is_adapter, read_json_file

__all__ = ["ModelFiles", "resolve_model"]

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
Resolve = Callable[..., ModelFiles]
DEPTH = 8  # runs started from runs: more is a circle


def resolve_model(
    path: str,
    *,
    revision: str | None = None,
    endpoints: Sequence[str] | None = None,
    offline: bool = False,
    progress: bool = True,
    _depth: int = 0,
) -> ModelFiles:
    """The files of `path`: a model, adapter or run folder, a GGUF file, the URL of one of these in an object
    store, the built-in name, or a hub id.

    A path that exists is taken first. Brings, converts or makes what is not here yet. Raises UserError
    (or TunesmithError for the network) that names what is missing and what to do.
    """
    if _depth > DEPTH:
        raise UserError(f"{path}: runs or adapters name each other as their base in a circle")
    again = partial(resolve_model, endpoints=endpoints, offline=offline, progress=progress, _depth=_depth + 1)
    if is_url(path):
        return replace(again(str(fetch(path))), origin=path)
    local = Path(path).expanduser().absolute()
    if local.is_file():
        return _file(local, progress=progress)
    if local.exists():
        return _folder(local, again)
    if path.lower() == BUILTIN:
        return builtin_model(progress=progress)
    if not is_hub_model(path):
        raise _not_found(path)
    found = fetch_model(path, revision=revision, endpoints=endpoints, offline=offline, progress=progress)
    return _adapter(found.folder, again) if is_adapter(found.folder) else found


def is_hub_model(path: str) -> bool:
    """True when `path` means a hub id: the form owner/name, and nothing of that name here."""
    return (
        HUB_ID.match(path) is not None and not path.endswith(".gguf") and not Path(path).expanduser().exists()
    )


def _file(path: Path, *, progress: bool) -> ModelFiles:
    if is_gguf(path):
        return model_from_gguf(path, progress=progress)
    raise UserError(
        f"{path}: a single file, but no GGUF file",
        hint="give the folder that holds the model's config.json and safetensors",
    )


def _folder(path: Path, again: Resolve) -> ModelFiles:
    if is_run(path):
        return _run(RunFolder(path), again)
    if is_adapter(path):
        return _adapter(path, again)
    check_model_folder(path)
    return ModelFiles(folder=path, name=path.name, source="folder", origin=str(path), tokenizer=path)


def _run(run: RunFolder, again: Resolve) -> ModelFiles:
    """The run's base with its newest adapter, or its newest full weights."""
    tokenizer = run.path / "tokenizer"
    latest = run.latest_checkpoint()
    adapters = ([latest / "adapter"] if latest else []) + [run.adapter]
    models = ([latest / "model"] if latest else []) + [run.merged]
    adapter = next((folder for folder in adapters if is_adapter(folder)), None)
    if adapter is not None:
        base = run_base(run, again)
        own = tokenizer if has_tokenizer(tokenizer) else None
        return base.with_adapter(adapter.absolute(), origin=run.path.absolute(), tokenizer=own)
    model = next((folder for folder in models if (folder / "config.json").is_file()), None)
    if model is None:
        raise UserError(
            f"{run.path}: the run has no complete checkpoint yet",
            hint=f"finish the training: tunesmith train {run.recipe}",
        )
    check_model_folder(model)
    own_tokenizer = tokenizer if has_tokenizer(tokenizer) else model
    return ModelFiles(model.absolute(), run.path.name, "folder", str(run.path.absolute()), own_tokenizer)


def run_base(run: RunFolder, again: Resolve | None = None) -> ModelFiles:
    """The model that the run started from, as its lock names it."""
    again = again or resolve_model
    entry = read_lock(run.lock)["model"]
    try:
        return again(_moved(str(entry["origin"])), revision=entry.get("revision"))
    except UserError as error:
        raise UserError(f"{run.path}: the base model of the run: {error.what}", hint=error.hint) from None


def _adapter(folder: Path, again: Resolve) -> ModelFiles:
    raw = read_json_file(folder / "adapter_config.json")
    base = raw.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{folder}: adapter_config.json names no base model",
            hint="give the base model, and the adapter with --adapter",
        )
    try:
        found = again(_moved(str(base)), revision=raw.get("revision"))
    except UserError as error:
        raise UserError(
            f"{folder}: the adapter's base model cannot be found: {error.what}",
            hint="give the base model itself, and the adapter with --adapter",
        ) from None
    own = folder if has_tokenizer(folder) else None
    return found.with_adapter(folder, origin=folder, tokenizer=own)


def _moved(origin: str) -> str:
    """A base in another machine's cache: the built-in model is the same everywhere."""
    if is_url(origin):
        return origin
    path = Path(origin).expanduser()
    return BUILTIN if not path.exists() and path.name == BUILTIN else origin


def _not_found(path: str) -> UserError:
    if path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        return UserError(f"{path}: there is no such file or folder", hint="check the path")
    near = difflib.get_close_matches(path.lower(), [BUILTIN], n=1, cutoff=0.5)
    return UserError(
        f"'{path}' is no file, folder, hub id (owner/name) or built-in model",
        hint=f"did you mean '{near[0]}'?" if near else f"the built-in model is '{BUILTIN}'",
    )
