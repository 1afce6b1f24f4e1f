"""Where things lie, and how they are written so that a crash leaves the old or the new, never half."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from tunesmith.core.errors import TunesmithError
from tunesmith.core.units import bytes_text


def cache_dir() -> Path:
    """The folder for models, tokenised data and downloads: $TUNESMITH_CACHE, else ~/.cache/tunesmith."""
    given = os.environ.get("TUNESMITH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "tunesmith"
    return root.expanduser().absolute()


def sha256_file(path: Path) -> str:
    """The file's SHA-256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sync_dir(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush every file and folder below `path` to disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_dir(Path(folder))


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode=mode)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that `folder` lies on, or will lie on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def need_disk(folder: Path, need_bytes: int, *, what: str, hint: str, spare_bytes: int = 0) -> None:
    """Raise TunesmithError unless the disk of `folder` has room for `what` and then `spare_bytes` left."""
    free = free_bytes(folder)
    if free < need_bytes + spare_bytes:
        raise TunesmithError(
            f"{what} needs {bytes_text(need_bytes)} of disk, but {folder} has {bytes_text(free)} free",
            hint=hint,
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it is synced and renamed to `target`.

    An existing `target` is replaced only then. After an error nothing is left of the new folder; what a
    killed process left of its own is removed by the next.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_dead(target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    os.chmod(temporary, 0o755)
    handle = os.open(temporary, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # ends with the process: so others see that it lives
    try:
        yield temporary
        sync_tree(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync_dir(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _clear_dead(target: Path) -> None:
    """Remove the half-written folders of `target` whose processes have ended."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        try:
            handle = os.open(left, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` across processes: two that make the same thing take turns."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{target.name}.lock"):
        yield
