"""Open whatever a user calls a model: find the files, load the weights, put the adapter on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import UserError
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import load_adapter, merge_adapter
from tunesmith.model.load import context_length, load_model, load_tokenizer
from tunesmith.model.weights import is_adapter


@dataclass(frozen=True)
class OpenModel:
    """A model ready to answer. `adapter` is the folder of the adapter on top of the base, merged or not.

    bank: there when `model` is the plain base, and each request chooses its adapter; `adapters` are those in
    it, names and folders; `adapter` is then one of them, under the name `name`. weights: how they are stored.
    """

    model: Any
    tokenizer: Any
    name: str
    files: ModelFiles
    adapter: Path | None
    context_length: int
    bank: AdapterBank | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    weights: str = ""

    @property
    def merged(self) -> bool:
        """True when the adapter is part of `model` and cannot be left out."""
        return self.adapter is not None and self.bank is None


def open_model(
    path: str,
    *,
    adapter: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    merge: bool = False,
    revision: str | None = None,
    endpoints: list[str] | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    chat_template: Path | None = None,
) -> OpenModel:
    """Open `path` (anything `resolve_model` takes) in evaluation mode.

    `adapter`: an adapter folder or a run folder to take in place of the one that `path` brings.
    merge=True folds the adapter into the weights. Raises UserError for whatever does not fit.
    """
    files = resolve_model(path, revision=revision, endpoints=endpoints, offline=offline)
    if adapter is not None:
        files = with_given_adapter(files, adapter)
    return load_files(
        files,
        dtype=dtype,
        device=device,
        merge=merge,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
    )


def load_files(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    merge: bool = False,
    trust_remote_code: bool = False,
    chat_template: Path | None = None,
) -> OpenModel:
    """Load resolved files: tokenizer, base, its merged adapters in order, then the adapter on top."""
    tokenizer = load_tokenizer(
        files.tokenizer, chat_template=chat_template, trust_remote_code=trust_remote_code
    )
    model = load_weights(files, dtype=dtype, device=device, merge=merge, trust_remote_code=trust_remote_code)
    length = context_length(model.config)
    return OpenModel(model, tokenizer, files.name, files, files.adapter, length)


def load_weights(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The model of `load_files` alone, for those who have the tokenizer."""
    model = load_model(files.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    for folder in files.base_adapters:
        model = merge_adapter(load_adapter(model, folder))
    if files.adapter is None:
        return model
    model = load_adapter(model, files.adapter)
    return merge_adapter(model) if merge else model


def with_given_adapter(files: ModelFiles, adapter: str) -> ModelFiles:
    """`files` with the adapter of the folder or run `adapter`, in place of its own."""
    folder = Path(adapter).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--adapter {adapter}: there is no such folder", hint="check the path")
    if is_adapter(folder):
        return files.replacing_adapter(folder)
    found = resolve_model(adapter)
    if found.adapter is None:
        raise UserError(
            f"--adapter {adapter}: holds no adapter", hint="give the folder with adapter_config.json"
        )
    return files.replacing_adapter(found.adapter, tokenizer=found.tokenizer)


def adapter_beside(path: str, base: ModelFiles) -> Path:
    """The adapter folder that `path` is, or that the run `path` has, to be loaded on `base`.

    Raises UserError when there is none, or the run was trained on other weights than the base's.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"adapter {path}: there is no such folder", hint="check the path")
    if is_adapter(folder):
        return folder
    found = resolve_model(str(folder))
    if found.adapter is None:
        raise UserError(f"adapter {path}: holds no adapter", hint="give the folder with adapter_config.json")
    if found.base_adapters != base.base_adapters:
        raise UserError(
            f"adapter {path}: it was trained on another tuned run than the one that is served",
            hint="serve it by itself",
        )
    return found.adapter
