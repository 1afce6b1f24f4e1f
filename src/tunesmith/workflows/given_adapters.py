"""Adapters that a user names beside a model, as folders."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import is_run
from tunesmith.core.store_cache import local_path
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.weights import is_adapter


def with_given_adapter(files: ModelFiles, adapter: str) -> ModelFiles:
    """`files` with the adapter of the folder or run `adapter`, in place of its own."""
    folder = Path(local_path(adapter)).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--adapter {adapter}: there is no such folder", hint="check the path")
    if is_adapter(folder):
        return files.replacing_adapter(folder)
    found = resolve_model(adapter) if is_run(folder) else None
    if found is None or found.adapter is None:
        raise UserError(
            f"--adapter {adapter}: holds no adapter", hint="give the folder with adapter_config.json"
        )
    return files.replacing_adapter(found.adapter, tokenizer=found.tokenizer)


def adapter_beside(path: str, base: ModelFiles) -> Path:
    """The adapter folder that `path` is, or that the run `path` has, to be loaded on `base`.

    Raises UserError when there is none, or the run was trained on other weights than the base's.
    """
    folder = Path(local_path(path)).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"adapter {path}: there is no such folder", hint="check the path")
    if is_adapter(folder):
        return folder
    found = resolve_model(str(folder)) if is_run(folder) else None
    if found is None or found.adapter is None:
        raise UserError(f"adapter {path}: holds no adapter", hint="give the folder with adapter_config.json")
    if found.base_adapters != base.base_adapters:
        raise UserError(
            f"adapter {path}: it was trained on another tuned run than the one that is served",
            hint="serve it by itself",
        )
    return found.adapter
