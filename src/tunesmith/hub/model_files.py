"""What a resolved model is: local files, where they came from, and their hashes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_file
from tunesmith.model.weights import has_tokenizer, read_json_file, tensor_shapes, weight_files

Source = Literal["folder", "hub", "gguf", "builtin"]

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
HEX = set("0123456789abcdef")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk.

    folder: plain transformers folder of the weights; tokenizer: folder of the tokenizer that belongs to
    it (the run's own for a run); base_adapters: adapters to fold into the weights first, in this order
    (a run that started from a tuned run); adapter: the adapter on top of them; revision: the commit of a
    hub model; origin: what `resolve_model` needs to find it again.
    """

    folder: Path
    name: str
    source: Source
    origin: str
    tokenizer: Path
    adapter: Path | None = None
    revision: str | None = None
    base_adapters: tuple[Path, ...] = ()

    @cached_property
    def files(self) -> dict[str, dict[str, int | str]]:
        """File name: {"bytes", "sha256"} of every file used, hashed at the first call."""
        found = hash_folder(self.folder)
        for number, adapter in enumerate(self.base_adapters):
            found |= {f"base_adapter_{number}/{name}": entry for name, entry in hash_folder(adapter).items()}
        return found

    def with_adapter(self, adapter: Path, *, origin: Path, tokenizer: Path | None = None) -> ModelFiles:
        """The same base with `adapter`, found at `origin`, on top; one that is there moves below it."""
        below = self.base_adapters + ((self.adapter,) if self.adapter else ())
        return replace(
            self,
            adapter=adapter,
            name=origin.name,
            origin=str(origin),
            base_adapters=below,
            tokenizer=tokenizer or self.tokenizer,
        )

    def replacing_adapter(self, adapter: Path, *, tokenizer: Path | None = None) -> ModelFiles:
        """The same base with `adapter` in place of its own; the adapter's tokenizer where it has one."""
        own = adapter if has_tokenizer(adapter) else None
        return replace(self, adapter=adapter, tokenizer=tokenizer or own or self.tokenizer)


def used_files(folder: Path) -> list[Path]:
    """The files of a model or adapter folder that decide its answers, sorted by name."""
    text = {path for pattern in TEXT_FILES for path in folder.glob(pattern) if path.name != "manifest.json"}
    return sorted(text | set(folder.glob("*.safetensors")))


def hash_folder(folder: Path) -> dict[str, dict[str, int | str]]:
    """File name: {"bytes", "sha256"} of the used files of a folder."""
    return {p.name: {"bytes": p.stat().st_size, "sha256": content_hash(p)} for p in used_files(folder)}


def content_hash(path: Path) -> str:
    """SHA-256 of a file.

    The hub's cache names a large file's blob by its SHA-256, checked when it came: that name is taken.
    """
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and len(blob.name) == 64 and set(blob.name) <= HEX:
        return blob.name
    return sha256_file(path)


def check_model_folder(folder: Path) -> None:
    """Raise UserError unless `folder` has a config and whole safetensors weights."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: config.json is missing: this is no transformers model folder",
            hint="give a model folder, a hub id (owner/name), a GGUF file or a run folder",
        )
    read_json_file(folder / "config.json")
    for path in weight_files(folder):
        tensor_shapes(path)
