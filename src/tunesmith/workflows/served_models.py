"""The models that an engine serves, as clients see them: their names, and what each is made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_json
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.hub.lock import read_lock
from tunesmith.hub.model_files import ModelFiles, used_files
from tunesmith.hub.sources import resolve_model
from tunesmith.model.template import stop_token_ids, template_hash
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import has_tokenizer, is_adapter, read_json_file
from tunesmith.serve.gateway import OpenedAdapter
from tunesmith.serve.jobs import ServedModel
from tunesmith.workflows.run_proof import check_template_of_run
from tunesmith.workflows.token_facts import Ends

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""OpenAI's; a model's generation_config.json changes none of them."""
RUN_DEPTH = 4  # from runs/NAME/checkpoints/step-000100/adapter to runs/NAME


@dataclass(frozen=True)
class Facts:
    """What an engine tells of the model that it has loaded.

    name: of what is served by default; origin: what `resolve_model` took; adapter: folder of the adapter on
    the base, merged into it or not; end_ids: the stop ids of the model's generation_config; adapters: name
    and folder of those that requests may choose, `name` among them when `adapter` is not merged.
    """

    name: str
    origin: str
    base: str
    tokenizer: str
    max_length: int
    vocab_size: int
    context_length: int
    base_revision: str | None = None
    base_adapters: tuple[str, ...] = ()
    adapter: str | None = None
    merged: bool = False
    end_ids: tuple[int, ...] = ()
    adapters: Mapping[str, str] | None = None
    device: str = "cpu"
    weights: str = "fp32"
    trust_remote_code: bool = False

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Facts:
        """From what came out of another process, where tuples are lists."""
        known = {entry.name for entry in fields(cls)}
        tuples = {name: tuple(plain[name]) for name in ("base_adapters", "end_ids")}
        return cls(**{name: value for name, value in plain.items() if name in known} | tuples)


def served_models(facts: Facts) -> dict[str, ServedModel]:
    """By name, the default first: what was asked for, then other adapters, then the base model.

    Raises UserError when the tokenizer, its template or its stop tokens are not those of the run.
    """
    makers = _Models(facts)
    named = dict(facts.adapters or {})
    if facts.name in named:
        first = makers.adapter(facts.name, named.pop(facts.name), facts.origin, Path(facts.tokenizer))
    else:
        first = makers.whole(facts.name, facts.adapter)
    others = [makers.find(name, folder).model for name, folder in named.items()]
    base = [makers.base({first.name, *(one.name for one in others)})] if first.adapter else []
    return {model.name: model for model in (first, *others, *base)}


def open_adapter(facts: Facts, name: str, path: str) -> OpenedAdapter:
    """An adapter or run folder on this machine, as a model of the engine's base.

    Raises UserError when it is none, or was trained on another base.
    """
    return _Models(facts).find(name, path)


class _Models:
    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._tokenizers: dict[Path, Any] = {}

    def whole(self, name: str, adapter: str | None) -> ServedModel:
        """The engine's own weights, with `adapter` in them."""
        run = run_of(adapter or self._facts.origin) or run_of(self._facts.origin)
        return self._model(name, Path(self._facts.tokenizer), run=run, folder=adapter, is_name=False)

    def base(self, taken: set[str]) -> ServedModel:
        name = _base_name(self._facts)
        while name in taken:
            name += "-base"
        own = Path(self._facts.base)
        folder = own if has_tokenizer(own) else Path(self._facts.tokenizer)
        return self._model(name, folder, run=None, folder=None, is_name=False)

    def adapter(self, name: str, folder: str, origin: str, tokenizer: Path) -> ServedModel:
        return self._model(name, tokenizer, run=run_of(folder) or run_of(origin), folder=folder, is_name=True)

    def find(self, name: str, path: str) -> OpenedAdapter:
        folder, tokenizer = find_adapter(path, self._facts)
        return OpenedAdapter(self.adapter(name, str(folder), path, tokenizer), folder)

    def _model(
        self, name: str, tokenizer_folder: Path, *, run: RunFolder | None, folder: str | None, is_name: bool
    ) -> ServedModel:
        facts, tokenizer = self._facts, self._tokenizer(tokenizer_folder)
        stop_ids = stop_token_ids(tokenizer, Ends(list(facts.end_ids)))
        if run is not None:
            check_template_of_run(run, tokenizer, stop_ids, facts.end_ids, facts.trust_remote_code)
        return ServedModel(
            name=name,
            tokenizer=tokenizer,
            max_length=facts.max_length,
            stop_ids=stop_ids,
            created=int(time.time()),
            origin=self._origin(run, folder, tokenizer, stop_ids),
            adapter=name if is_name else None,
        )

    def _origin(
        self, run: RunFolder | None, adapter: str | None, tokenizer: Any, stop_ids: tuple[int, ...]
    ) -> dict[str, Any]:
        facts = self._facts
        lock = read_lock(run.lock) if run is not None and run.lock.is_file() else None
        return {
            "path": self._path(adapter),
            "run": str(run.path) if run else None,
            "data_hash": _data_hash(lock),
            "base": facts.base,
            "base_revision": facts.base_revision or (lock["model"].get("revision") if lock else None),
            "template_hash": template_hash(tokenizer),
            "adapter": adapter,
            "stop_ids": list(stop_ids),
            "sampling_defaults": SAMPLING_DEFAULTS,
            "weights": facts.weights,
        }

    def _path(self, adapter: str | None) -> str:
        """What can be given to `serve` to have this model by itself."""
        if adapter is None:
            return self._facts.base if self._facts.adapter else self._facts.origin
        return self._facts.origin if adapter == self._facts.adapter else adapter

    def _tokenizer(self, folder: Path) -> Any:
        if folder not in self._tokenizers:
            self._tokenizers[folder] = load_tokenizer(folder, trust_remote_code=self._facts.trust_remote_code)
        return self._tokenizers[folder]


def find_adapter(path: str, facts: Facts) -> tuple[Path, Path]:
    """The adapter folder in `path` (itself, or that of a run) and the tokenizer folder that belongs to it.

    Raises UserError when there is none, or it was trained on another base than the engine's.
    """
    folder = Path(path).expanduser().absolute()
    base = Path(facts.base)
    plain = base if has_tokenizer(base) else Path(facts.tokenizer)
    if folder.suffix == ".gguf" and folder.is_file():  # llama.cpp's own form, loaded at its start
        return folder, plain
    if not folder.is_dir():
        raise UserError(f"adapter {path}: there is no such folder", hint="check the path")
    if is_run(folder):
        files = resolve_model(str(folder), progress=False)
        if files.adapter is None:
            raise UserError(
                f"adapter {path}: this run trained all weights, it has no adapter",
                hint="serve it by itself: tunesmith serve " + path,
            )
        _check_same_base(path, files, facts)
        return files.adapter, files.tokenizer
    if not is_adapter(folder):
        raise UserError(
            f"adapter {path}: holds no adapter", hint="give a run, or the folder with adapter_config.json"
        )
    run = run_of(str(folder))
    if run is not None:
        _check_same_base(path, resolve_model(str(run.path), progress=False), facts)
    places = (folder, *([run.path / "tokenizer"] if run else []))
    return folder, next((place for place in places if has_tokenizer(place)), plain)


def run_of(path: str) -> RunFolder | None:
    """The run that a folder is, or lies in."""
    here = Path(path).expanduser().absolute()
    return next((RunFolder(place) for place in (here, *here.parents[:RUN_DEPTH]) if is_run(place)), None)


def _check_same_base(path: str, files: ModelFiles, facts: Facts) -> None:
    below = tuple(str(adapter) for adapter in files.base_adapters)
    if _same_files(files.folder, Path(facts.base)) and below == facts.base_adapters:
        return
    other = f"{files.folder} with {len(below)} adapters in it" if below else str(files.folder)
    raise UserError(
        f"adapter {path}: it was trained on {other}, and this engine has {facts.base}",
        hint="serve it by itself, or on the model that it was trained on",
    )


def _same_files(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same model, as far as names, sizes and the config tell."""
    if one == other:
        return True
    names = [{path.name: path.stat().st_size for path in used_files(folder) if path.suffix == ".safetensors"}
             for folder in (one, other)]  # fmt: skip
    return names[0] == names[1] and (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def _base_name(facts: Facts) -> str:
    """What people call the base model: as the run's lock or the adapter names it, else its folder's name."""
    run = run_of(facts.adapter or facts.origin) or run_of(facts.origin)
    if run is not None and run.lock.is_file():
        return str(read_lock(run.lock)["model"].get("name") or Path(facts.base).name)
    if facts.adapter is not None:
        named = read_json_file(Path(facts.adapter) / "adapter_config.json").get("base_model_name_or_path")
        if named:
            return str(named) if not Path(named).is_absolute() else Path(named).name
    return Path(facts.base).name


def _data_hash(lock: Mapping[str, Any] | None) -> str | None:
    """Of the contents of all files that the run was trained and evaluated on, wherever they lie."""
    entries = (lock or {}).get("data") or {}
    hashes = sorted(str(entry["sha256"]) for entry in entries.values() if "sha256" in entry)
    return sha256_json(hashes) if hashes else None
