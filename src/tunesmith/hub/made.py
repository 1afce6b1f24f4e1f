"""Model folders made once into the cache: whole or absent, whoever makes them and however it ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tunesmith.core.paths import cache_dir, locked, need_disk, new_folder
from tunesmith.core.run_folder import read_manifest, write_manifest


def models_dir() -> Path:
    return cache_dir() / "models"


def made_once(name: str, make: Callable[[Path], None], *, need_bytes: int) -> Path:
    """The folder `name` in the model cache, filled by `make(folder)` if it is not there yet.

    Two processes take turns, and the second finds the folder. After a crash nothing half is taken for
    whole: the folder gets its name last. Raises TunesmithError when the disk lacks `need_bytes`.
    """
    target = models_dir() / name
    if is_whole(target):
        return target
    with locked(target):
        if is_whole(target):
            return target
        _remove_leftovers(target)
        check_disk(target.parent, need_bytes, what=name)
        with new_folder(target) as folder:
            make(folder)
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            write_manifest(folder)
    return target


def is_whole(folder: Path) -> bool:
    """True when the files that the folder's manifest names are there, with their sizes."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    paths = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def check_disk(folder: Path, need_bytes: int, *, what: str) -> None:
    """Raise TunesmithError unless the disk of `folder` has `need_bytes` free."""
    need_disk(
        folder,
        need_bytes,
        what=what,
        hint="free space, or set $TUNESMITH_CACHE to a folder on another disk",
    )


def _remove_leftovers(target: Path) -> None:
    """Folders of makers that were killed; the lock is held, so none of them is still at work."""
    for folder in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(folder, ignore_errors=True)
