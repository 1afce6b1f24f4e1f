"""`lock.json` of a run: which model, data and versions it was made with, so that it can be repeated."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_json
from tunesmith.hub.datasets import DatasetFiles
from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.weights import read_json_file

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Package: version of everything that decides the numbers of a run."""
    found = {"tunesmith": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_lock(model: ModelFiles, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The lock of a run: `data` is a plain mapping of data file to its size and hash."""
    return {
        "model": {
            "name": model.name,
            "source": model.source,
            "origin": model.origin,
            "revision": model.revision,
            "folder": str(model.folder),
            "files": model.files,
        },
        "data": dict(data or {}),
        "versions": versions(),
    }


def write_lock(path: Path, model: ModelFiles, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `make_lock` to `path`, and return it."""
    lock = make_lock(model, data)
    write_json(path, lock)
    return lock


def write_fetch_lock(path: Path, model: ModelFiles | None, datasets: Sequence[DatasetFiles]) -> None:
    """Write what was fetched: the lock of a run's shape, with each hub data set under "datasets"."""
    lock: dict[str, Any] = make_lock(model) if model else {"data": {}, "versions": versions()}
    lock["datasets"] = [
        {
            "name": found.name,
            "revision": found.revision,
            "folder": str(found.folder),
            "files": found.files,
        }
        for found in datasets
    ]
    write_json(path, lock)


def read_lock(path: Path) -> dict[str, Any]:
    """The lock in `path`. Raises UserError when it is missing or names no model."""
    lock = read_json_file(path)
    entry = lock.get("model")
    if not isinstance(entry, dict) or not entry.get("origin"):
        raise UserError(f"{path}: names no model", hint="the run folder is damaged: train it again")
    return lock


def differences(locked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One sentence for each file that is not as locked; both map name to {"bytes", "sha256"}."""
    faults = [f"{name}: missing" for name in sorted(locked.keys() - found.keys())]
    faults += [f"{name}: not in the lock" for name in sorted(found.keys() - locked.keys())]
    for name in sorted(locked.keys() & found.keys()):
        if locked[name]["sha256"] != found[name]["sha256"]:
            faults.append(f"{name}: {_change(locked[name], found[name])}")
    return faults


def _change(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    size = f", {was['bytes']} -> {now['bytes']} bytes" if was["bytes"] != now["bytes"] else ""
    return f"sha256 {was['sha256'][:12]}… -> {now['sha256'][:12]}…{size}"


def verify_model(lock: Mapping[str, Any], model: ModelFiles) -> list[str]:
    """What differs between the model of a lock and the files of `model` on this disk; none: the same."""
    return differences(lock["model"]["files"], model.files)
