"""What lies in an object store, brought to the cache: only what has changed there since the last time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir, locked, need_disk, new_folder, write_json
from tunesmith.core.progress import say
from tunesmith.core.run_folder import MANIFEST, checkpoint_name, manifest_fault, read_object
from tunesmith.core.store import (
    FREE_SPACE,
    PARTIAL,
    Store,
    Stored,
    StoreError,
    Vanished,
    check_name,
    is_url,
    join,
    stored_manifest,
)
from tunesmith.core.units import bytes_text

RECORD = "objects.json"
TRIES = 3  # a run that is being trained changes while it is read


def local_path(text: str, *, step: int | None = None) -> str:
    """A path that a user gave: a URL brought to this machine by `fetch`, all else as it is."""
    return str(fetch(text, step=step)) if is_url(text) else text


def fetch(url: str, *, step: int | None = None) -> Path:
    """The file or folder at `url`, in the cache; of a run, its newest whole checkpoint (or that of `step`).

    What has not changed in the store since the last time is not brought again. Raises UserError when nothing
    whole is there; StoreError when the store cannot be reached.
    """
    store = Store(url)
    key = hashlib.sha256(f"{store.url} {step}".encode()).hexdigest()[:16]
    target = cache_dir() / "store" / key
    with locked(target):
        for left in reversed(range(TRIES)):
            try:
                return _fetch(store, target, step)
            except Vanished:
                if not left:
                    raise
    raise AssertionError("the loop returns or raises")


def _fetch(store: Store, target: Path, step: int | None) -> Path:
    found = store.list()
    if not found:
        raise UserError(f"{store.url}: there is nothing at this URL", hint="check the URL")
    name = PurePosixPath(store.url).name
    if "" in found:
        _bring(store, {"": found[""]}, target, name, is_run=False)
        return target / name
    is_run = "recipe.yaml" in found and "lock.json" in found
    wanted = _of_run(store, found, step) if is_run else _of_folder(store, found)
    _bring(store, wanted, target, name, is_run=is_run)
    return target / name


def _of_folder(store: Store, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Of a folder that was carried over what its manifest names; else everything."""
    manifest = stored_manifest(store) if MANIFEST in found else None
    if manifest is None:
        if PARTIAL in found:
            raise UserError(
                f"{store.url}: this folder is not whole: it is being carried over, or that was cut off",
                hint="wait for its end, or give the command that wrote it again",
            )
        return dict(found)
    missing = [name for name in manifest["files"] if name not in found]
    if missing:
        raise StoreError(f"{store.url}: {missing[0]} is missing", hint="it was removed from the store")
    return {name: found[name] for name in (*manifest["files"], MANIFEST)}


def own_files(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """A run's files without its checkpoints and exports."""
    return {name: entry for name, entry in found.items() if not name.startswith(("checkpoints/", "export/"))}


def _of_run(store: Store, found: Mapping[str, Stored], step: int | None) -> dict[str, Stored]:
    """The run's own files, and those of one checkpoint; none where it has saved none yet."""
    steps = stored_steps(found)
    if step is not None and checkpoint_name(step) not in steps:
        complete = ", ".join(str(int(name.removeprefix("step-"))) for name in steps)
        raise UserError(
            f"--checkpoint {step}: {store.url} has no complete checkpoint of that step",
            hint=f"complete are: {complete or 'none'}",
        )
    chosen = steps[-1] if step is None and steps else checkpoint_name(step or 0)
    return own_files(found) | {
        name: e for name, e in found.items() if name.startswith(f"checkpoints/{chosen}/")
    }


def stored_steps(found: Mapping[str, Stored]) -> list[str]:
    """The names of a run's whole checkpoints, oldest first."""
    parts = [PurePosixPath(name).parts for name in found]
    steps = [
        part[1]
        for part in parts
        if len(part) == 3 and part[::2] == ("checkpoints", MANIFEST) and part[1].startswith("step-")
    ]
    return sorted(steps, key=lambda name: (len(name), name))


def _bring(store: Store, wanted: Mapping[str, Stored], target: Path, name: str, *, is_run: bool) -> None:
    """Make `target / name` and the record of it. What is there already, unchanged, becomes a hard link."""
    record = {item: [entry.num_bytes, entry.mark] for item, entry in wanted.items()}
    old, before = target / name, read_object(target / RECORD) or {}
    same = {
        item for item, entry in record.items() if before.get(item) == entry and _is_here(old / item, entry)
    }
    if same == record.keys() == before.keys():
        return
    for item in wanted:
        check_name(store.url, item)
    new = [item for item in wanted if item not in same]
    size = sum(wanted[item].num_bytes for item in new)
    need_disk(target, size, what=store.url, hint=FREE_SPACE)
    say(f"{store.url}: {len(new)} files, {bytes_text(size)}")
    with new_folder(target) as draft:
        if is_run:
            (draft / name / "checkpoints").mkdir(parents=True)
        for item in wanted:
            path = draft / name / item
            path.parent.mkdir(parents=True, exist_ok=True)
            if item in same:
                os.link(old / item, path)
            else:
                _get(store, item, path, wanted[item])
        if not is_run and MANIFEST in wanted and (fault := manifest_fault(draft / name)):
            raise StoreError(f"{store.url}: {fault}", hint="it was changed or harmed in the store")
        write_json(draft / RECORD, record)


def _is_here(path: Path, entry: list[object]) -> bool:
    return path.is_file() and path.stat().st_size == entry[0]


def _get(store: Store, name: str, path: Path, entry: Stored) -> None:
    store.get(name, path)
    if path.stat().st_size != entry.num_bytes:
        raise Vanished(f"{join(store.url, name)}: changed while it was read", hint="try again")
