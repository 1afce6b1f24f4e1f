"""A run whose `output_dir` is an object store.

It is trained in a folder of the cache; a thread of rank 0 carries over every finished checkpoint and the
small files while the training goes on. The store is the truth: `owner.json` in it names the folder that wrote
last. A folder that is not the owner takes the run as it is in the store, and becomes the owner; the one that
was, should it still train, stops at its next upload.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.core.errors import Interrupted, RunFailed, TunesmithError
from tunesmith.core.paths import locked, new_folder, write_json
from tunesmith.core.progress import say
from tunesmith.core.run_folder import MANIFEST, RunFolder, manifest_holds, read_manifest, read_object
from tunesmith.core.store import (
    Store,
    Stored,
    StoreError,
    check_name,
    get_folder,
    join,
    put_folder,
    remove_folder,
    stored_manifest,
)
from tunesmith.core.store_cache import own_files, stored_steps
from tunesmith.workflows.run_facts import public_recipe

OWNER = "owner.json"
POLL_S = 1.0
SMALL_FILES_EVERY_S = 20.0
AFTER_A_FAULT_S = 20.0
# Waits before the last attempts at the end of a run.
PATIENCE_S = (0.0, 2.0, 10.0)


def take(run: RunFolder, url: str, *, fresh: bool) -> None:
    """Make the folder on this machine the run that is in the store, and the run's owner.

    fresh: what is here and there will be moved aside, so nothing is brought. For the holder of the run's
    lock. Raises UserError or StoreError when the store cannot be read or written.
    """
    store = Store(url)
    mark = run.path.with_name(f".{run.path.name}.{OWNER}")
    there, mine = _owner(store), read_object(mark)
    if mine is None or there != mine:
        if not fresh:
            _replace(run, store)
        mine = {"id": uuid.uuid4().hex, "host": platform.node(), "folder": str(run.path)}
        store.write(OWNER, json.dumps(mine, indent=2).encode())
        write_json(mark, mine)
    else:
        store.write(
            OWNER, json.dumps(mine, indent=2).encode()
        )  # that it may be written shows before training


def _owner(store: Store) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(OWNER) or b"null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _replace(run: RunFolder, store: Store) -> None:
    found = store.list()
    if "lock.json" not in found:  # a run that has not begun
        move_aside(run)
        return
    say(f"bring the run {store.url}")
    with new_folder(run.path) as draft:
        for name in own_files(found):
            if name != OWNER:
                check_name(store.url, name)
                store.get(name, draft / name)
        (draft / "checkpoints").mkdir(exist_ok=True)
        _bring_checkpoint(store, found, RunFolder(draft))


def _bring_checkpoint(store: Store, found: dict[str, Stored], run: RunFolder) -> None:
    """The newest that is whole and unharmed; those that are not are removed from the store."""
    for name in reversed(stored_steps(found)):
        url = join(store.url, f"checkpoints/{name}")
        try:
            get_folder(url, run.checkpoints / name)
            return
        except StoreError as error:
            if manifest_holds_in_store(url):
                raise
            say(f"warning: {error.what}: this checkpoint is passed over")
            remove_folder(url)


def manifest_holds_in_store(url: str) -> bool:
    """Whether the files that a folder's manifest names are there with their sizes, unread."""
    store = Store(url)
    manifest, found = stored_manifest(store), store.list()
    return manifest is not None and all(
        name in found and found[name].num_bytes == entry["bytes"] for name, entry in manifest["files"].items()
    )


def move_aside(run: RunFolder) -> None:
    """Rename an earlier run to NAME.1, or the first such name that is free."""
    if not run.path.exists():
        return
    number = 1
    while (target := run.path.with_name(f"{run.path.name}.{number}")).exists():
        number += 1
    run.path.rename(target)
    say(f"moved the earlier run to {target}")


def move_aside_in_store(url: str) -> None:
    """Move an earlier run in the store to NAME.1, or the first such name that is free, inside the store."""
    found = [name for name in Store(url).list() if name != OWNER]
    if not found:
        return
    number = 1
    while Store(f"{url}.{number}").list():
        number += 1
    parent, _, name = url.rpartition("/")
    store = Store(parent)
    last = sorted(found, key=lambda item: item.endswith(MANIFEST))
    for item in last:
        store.copy(f"{name}/{item}", f"{name}.{number}/{item}")
    store.remove([f"{name}/{item}" for item in ("lock.json", *reversed(last))])
    say(f"moved the earlier run to {url}.{number}")


def bring_checkpoint(run: RunFolder, url: str, name: str) -> Path:
    """On a machine other than rank 0's: the checkpoint that the run goes on from."""
    path, place = run.checkpoints / name, join(url, f"checkpoints/{name}")
    with locked(path):
        if stored_manifest(Store(place)) != read_manifest(path) or not manifest_holds(path):
            get_folder(place, path)
    return path


def without_end(events: bytes) -> bytes:
    """The lines of an events file but for a last one that says that the run is finished."""
    head, _, last = events.rstrip(b"\n").rpartition(b"\n")
    try:
        event = json.loads(last)
    except ValueError:
        return events
    return head + b"\n" if event.get("event") == "end" and event.get("status") == "finished" else events


class TakenOver(RunFailed):
    """Another folder has become the run's owner."""


class Carrier:
    """Carries a run over while it is trained. Only after `start` does it do anything."""

    def __init__(self, run: RunFolder, url: str, *, keep: int) -> None:
        self.run, self.url, self.keep = run, url, keep
        self.taken: TakenOver | None = None
        self._store = Store(url)
        self._mark = run.path.with_name(f".{run.path.name}.{OWNER}")
        self._staged = run.path.with_name(f".{run.path.name}.carried")
        self._done: set[str] = set()
        self._sent: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin: what is half in the store is removed first."""
        shutil.rmtree(self._staged, ignore_errors=True)
        self._thread = threading.Thread(target=self._work, name="carrier", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        next_at, told = 0.0, False
        while not self._ended.wait(POLL_S):
            new = any(path.name not in self._done for path in self.run.saved_checkpoints())
            if time.monotonic() < next_at and (told or not new):
                continue
            try:
                self.carry()
                next_at, told = time.monotonic() + SMALL_FILES_EVERY_S, False
            except TakenOver as error:
                self.taken = error
                say(f"error: {error}")
                os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C: the training stops after its step
                return
            except (TunesmithError, OSError) as error:
                if not told:
                    say(f"warning: {error}\nthe training goes on; what is missing in the store comes later")
                next_at, told = time.monotonic() + AFTER_A_FAULT_S, True

    def close(self, error: BaseException | None) -> None:
        """Carry over what is left. Raises RunFailed where that cannot be done, if nothing else went wrong."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        if self.taken is not None:
            raise self.taken
        waits = PATIENCE_S if error is None or isinstance(error, Interrupted) else PATIENCE_S[:1]
        fault = self._try_to_carry(waits)
        shutil.rmtree(self._staged, ignore_errors=True)
        if fault is None:
            say(f"carried over to {self.url}")
        elif error is None:
            raise RunFailed(
                f"{self.url}: the run is finished in {self.run.path}, but could not be carried over: "
                f"{getattr(fault, 'what', fault)}",
                hint="the same command carries over what is missing",
            )
        else:
            say(f"warning: {fault}\nwhat is missing in the store is carried over by the same command")

    def _try_to_carry(self, waits: tuple[float, ...]) -> Exception | None:
        fault: Exception | None = None
        for wait_s in waits:
            time.sleep(wait_s)
            try:
                self.carry()
                return None
            except TakenOver:
                raise
            except (TunesmithError, OSError) as error:
                fault = error
        return fault

    def carry(self) -> None:
        """Carry over what has changed. Raises TakenOver, UserError or StoreError.

        A checkpoint comes after the events up to its step, without which the resumed run had a gap; the event
        `end` comes after the last checkpoint, since it makes the run finished.
        """
        self._check_owner()
        saved = self.run.saved_checkpoints()
        events = self.run.events.read_bytes() if self.run.events.exists() else b""
        self._carry_files()
        self._carry_events(without_end(events))
        for path in reversed(saved):
            if path.name not in self._done and self._carry_checkpoint(path):
                self._done.add(path.name)
        self._prune()
        self._carry_events(events)

    def _carry_events(self, events: bytes) -> None:
        state = (len(events), 0)  # the file only grows
        if self._sent.get("events.jsonl") != state:
            self._store.write("events.jsonl", events)
            self._sent["events.jsonl"] = state

    def _check_owner(self) -> None:
        there, mine = _owner(self._store), read_object(self._mark)
        if there != mine:
            host = (there or {}).get("host", "another machine")
            raise TakenOver(
                f"{self.url}: {host} has taken this run over, so this training stopped",
                hint="train a run on one machine at a time; a second training needs another name: --set "
                "name=NAME",
            )

    def _carry_files(self) -> None:
        """All small files; the lock is last: with it the run has begun."""
        for path in sorted(self._small_files(), key=lambda path: path == self.run.lock):
            name, now = path.relative_to(self.run.path).as_posix(), path.stat()
            state = (now.st_size, now.st_mtime_ns)
            if self._sent.get(name) == state:
                continue
            if path == self.run.recipe:
                self._store.write(name, public_recipe(self.run).encode())
            else:
                self._store.put(path, name)
            self._sent[name] = state

    def _small_files(self) -> Iterator[Path]:
        for path in self.run.path.rglob("*"):
            parts = path.relative_to(self.run.path).parts
            hidden = any(part.startswith(".") for part in parts)
            elsewhere = parts[0] in ("checkpoints", "export") or path == self.run.events
            if not hidden and not elsewhere and path.is_file():
                yield path

    def _carry_checkpoint(self, path: Path) -> bool:
        """False where it was removed meanwhile, as the oldest is after each save."""
        try:
            put_folder(self._linked(path), join(self.url, f"checkpoints/{path.name}"))
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)
        return True

    def _linked(self, path: Path) -> Path:
        """The checkpoint by hard links, which stay when it is removed; itself where the disk has none.

        Raises FileNotFoundError when it is being removed.
        """
        shutil.rmtree(self._staged, ignore_errors=True)
        manifest = read_manifest(path)
        if manifest is None:
            raise FileNotFoundError(path)
        for name in (*manifest["files"], MANIFEST):
            (self._staged / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path / name, self._staged / name)
            except FileNotFoundError:
                raise
            except OSError:
                return path
        return self._staged

    def _prune(self) -> None:
        """Remove half checkpoints, and all but the newest `keep` whole ones."""
        found = self._store.list()
        whole = stored_steps(found)
        names = {name.split("/")[1] for name in found if name.startswith("checkpoints/")}
        for name in sorted(names - set(whole[-self.keep :])):
            remove_folder(join(self.url, f"checkpoints/{name}"))


@contextmanager
def carrying(run: RunFolder, url: str | None, *, keep: int) -> Iterator[Carrier | None]:
    """A carrier for the training in the block; none without a URL."""
    if url is None:
        yield None
        return
    carrier = Carrier(run, url, keep=keep)
    try:
        yield carrier
    except BaseException as error:
        carrier.close(error)
        raise
    carrier.close(None)
