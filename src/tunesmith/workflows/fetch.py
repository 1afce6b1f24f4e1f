"""Bring a model to this machine, and say what was brought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.hub.lock import write_lock
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.recipe.load import load_recipe

RECIPE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Fetched:
    """`lock`: the lock file written, if one was asked for."""

    files: ModelFiles
    lock: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        files = self.files
        return {
            "model": files.name,
            "source": files.source,
            "revision": files.revision,
            "folder": str(files.folder),
            "adapter": str(files.adapter) if files.adapter else None,
            "tokenizer": str(files.tokenizer),
            "bytes": sum(int(entry["bytes"]) for entry in files.files.values()),
            "files": files.files,
            "lock": str(self.lock) if self.lock else None,
        }


def fetch(
    what: str,
    *,
    revision: str | None = None,
    endpoints: list[str] | None = None,
    offline: bool = False,
    lock: Path | None = None,
) -> Fetched:
    """Bring the model `what`, or the model of the recipe file `what`; options overrule the recipe.

    `lock`: a file to write the lock to. Raises what `resolve_model` and `load_recipe` raise.
    """
    path = Path(what).expanduser()
    if path.suffix in RECIPE_ENDINGS:
        model = load_recipe(path).model
        what, revision = model.path, revision or model.revision
        endpoints, offline = endpoints or model.endpoint, offline or model.offline
    files = resolve_model(what, revision=revision, endpoints=endpoints, offline=offline)
    if lock is not None:
        write_lock(lock, files)
    return Fetched(files, lock)
