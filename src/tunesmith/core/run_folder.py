"""The run folder: the only bridge between the parts that work and the parts that show.

A checkpoint is complete when, and only when, its `manifest.json` (written last) names every file with
its size and SHA-256, and the files agree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_file, write_json

MANIFEST = "manifest.json"
STATE = "state.json"  # of a checkpoint: counters, and times that no two runs share


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "export" / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "export" / "merged"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / checkpoint_name(step)

    def saved_checkpoints(self) -> list[Path]:
        """The checkpoints that have a manifest, oldest first, unread: one of them may be harmed."""
        found = [path for path in self.checkpoints.glob("step-*") if read_manifest(path) is not None]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def complete_checkpoints(self) -> list[Path]:
        """The whole and unharmed checkpoints, oldest first."""
        return [path for path in self.saved_checkpoints() if manifest_holds(path)]

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; damaged newer ones are passed over."""
        return next((path for path in reversed(self.saved_checkpoints()) if manifest_holds(path)), None)


def checkpoint_name(step: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"step-{step:06d}"


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "checkpoints").is_dir()


def open_run(path: Path) -> RunFolder:
    """The run in `path`. Raises UserError when there is none."""
    if not is_run(path):
        raise UserError(
            f"{path}: not a run folder (it has no recipe.yaml with checkpoints/)",
            hint="give the folder that 'tunesmith train' named, such as runs/NAME",
        )
    return RunFolder(path)


def manifest_of(folder: Path, **fields: Any) -> dict[str, Any]:
    """The manifest of a folder: `fields`, and size and SHA-256 of every file but an earlier manifest."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return fields | {"files": files}


def write_manifest(folder: Path, **fields: Any) -> None:
    """Write `manifest.json` of a folder: `manifest_of` it."""
    write_json(folder / MANIFEST, manifest_of(folder, **fields))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None where there is none, or a damaged one."""
    return read_object(folder / MANIFEST)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def manifest_holds(folder: Path) -> bool:
    """True when every file that the manifest names is there, with its size and its hash."""
    return manifest_fault(folder) is None


def manifest_fault(folder: Path) -> str | None:
    """What is wrong with a folder, by its manifest; None for a whole and unharmed one."""
    manifest = read_manifest(folder)
    files = manifest.get("files") if manifest else None
    if not isinstance(files, dict):
        return f"{MANIFEST} is {'damaged' if (folder / MANIFEST).exists() else 'missing'}"
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            return f"{MANIFEST} is damaged"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    # Hashes last: a missing file is then seen without reading gigabytes.
    found = (_hash_fault(folder, name, entry["sha256"]) for name, entry in files.items())
    return next((fault for fault in found if fault), None)


def _hash_fault(folder: Path, name: str, sha256: str) -> str | None:
    try:
        return None if sha256_file(folder / name) == sha256 else f"{name} is not as it was written (its hash)"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
