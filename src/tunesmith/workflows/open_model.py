"""Open whatever a user calls a model: find the files, load the weights, put the adapter on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import load_adapter, merge_adapter
from tunesmith.model.config import context_length
from tunesmith.model.load import load_model
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.workflows.given_adapters import with_given_adapter


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
