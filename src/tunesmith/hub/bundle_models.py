"""Models, data sets and files of a bundle: collected from this machine, put in place on another.

kind     on the machine that has it                  on the machine that gets it
made     $TUNESMITH_CACHE/models/NAME                the same place
hub      $HF_HUB_CACHE/models--O--N/snapshots/C      the same layout: blobs by SHA-256, links, refs
project  a file or folder of the user                below the project folder
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.hub_cache import hub_cache
from tunesmith.core.paths import locked, new_folder
from tunesmith.core.progress import Meter
from tunesmith.hub.bundle_files import Count, is_put, no_count, put
from tunesmith.hub.bundle_manifest import Item, Manifest, safe
from tunesmith.hub.bundle_store import Store, check_disk
from tunesmith.hub.cache import RepoCache
from tunesmith.hub.made import models_dir


@dataclass(frozen=True)
class Collected:
    """What is to be collected: `request` tells what it is, `sources` maps names in the bundle to files."""

    part: str
    name: str
    root: str
    request: Mapping[str, Any]
    sources: Mapping[str, Path]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.sources.values())


def files_below(folder: Path) -> dict[str, Path]:
    """Relative name: path of every file below a folder, links followed, hidden and lock files left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[str(name)] = path
    return found


def describe_folder(folder: Path, *, part: str = "model") -> Collected | None:
    """How a folder of a model or data set in one of the caches is carried; None: it lies in no cache."""
    if folder.parent == models_dir():
        return Collected(
            part, folder.name, f"models/made/{folder.name}", {"kind": "made"}, files_below(folder)
        )
    if folder.parent.name != "snapshots" or folder.parents[2].resolve() != hub_cache().resolve():
        return None
    repo, commit = RepoCache(folder.parents[1]), folder.name
    kind, owner, *rest = repo.root.name.split("--")
    request = {
        "kind": "hub",
        "repo": repo.root.name,
        "commit": commit,
        "refs": _refs(repo, commit),
        "selections": repo.manifest(commit)["selections"],
    }
    root = f"{kind}/hub/{repo.root.name}/{commit}"
    return Collected(part, "/".join([owner, *rest]), root, request, files_below(folder))


def _refs(repo: RepoCache, commit: str) -> list[str]:
    """The branches and tags that stand for a commit in the cache."""
    refs = repo.root / "refs"
    found = [path for path in refs.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return sorted(str(path.relative_to(refs)) for path in found if path.read_text().strip() == commit)


def collect(store: Store, wanted: Collected) -> Item:
    """Copy the files into the bundle, if they are not there. Raises TunesmithError for a full disk."""
    sizes = {name: path.stat().st_size for name, path in wanted.sources.items()}
    request = dict(wanted.request) | {"sizes": sizes, "changed": _changed(wanted)}
    known = store.keep(wanted.part, wanted.name, request)
    if known is not None:
        return known
    check_disk(store.bundle, wanted.num_bytes, what=f"{wanted.part} {wanted.name}")
    staging = store.staging(wanted.part, wanted.name)
    with Meter(f"copy {wanted.name}", total=wanted.num_bytes) as meter:
        for name, source in wanted.sources.items():
            _copy(source, staging / name)
            meter.advance(sizes[name])
    return store.add(wanted.part, wanted.name, wanted.root, request, staging)


def _changed(wanted: Collected) -> dict[str, int]:
    """When the user's own files were last changed, in ns: what lies in a cache never changes."""
    own = wanted.request["kind"] == "project"
    return {name: path.stat().st_mtime_ns for name, path in wanted.sources.items()} if own else {}


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all; one of the same size is there from a call that was stopped."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


# -- on the machine that gets it -------------------------------------------------------------------------


def place_of(item: Item, project: Path) -> Path:
    """The folder that an item goes into. Raises UserError for a place outside of where it belongs."""
    if item.request["kind"] == "made":
        return models_dir() / safe(item.name)
    if item.request["kind"] == "hub":
        return RepoCache(hub_cache() / safe(item.request["repo"])).snapshot(safe(item.request["commit"]))
    place = item.request.get("place")
    return project / safe(place) if place else project


def is_placed(manifest: Manifest, item: Item, project: Path) -> bool:
    """True when every file of an item is in place, byte for byte."""
    folder = place_of(item, project)
    return all(is_put(manifest.files[path], folder / item.below(path)) for path in item.paths)


def conflicts(manifest: Manifest, item: Item, project: Path) -> list[Path]:
    """Files of the user that stand where an item's files go, with other contents."""
    if item.request["kind"] != "project":
        return []
    folder = place_of(item, project)
    pairs = [(manifest.files[path], folder / item.below(path)) for path in item.paths]
    return [target for entry, target in pairs if target.exists() and not is_put(entry, target)]


def place(bundle: Path, manifest: Manifest, item: Item, project: Path, *, count: Count = no_count) -> None:
    """Put an item in place: each file whole or absent, a model's folder only when all of it is there.

    Raises UserError when a file of the user stands in the way, TunesmithError when bytes are wrong.
    """
    target = place_of(item, project)
    if item.request["kind"] == "made":
        _place_made(bundle, manifest, item, target, count)
        return
    if item.request["kind"] == "hub":
        _place_hub(bundle, manifest, item, count)
        return
    for path in item.paths:
        entry, goal = manifest.files[path], target / item.below(path)
        if goal.exists() and not is_put(entry, goal):
            raise UserError(
                f"{goal}: is there already, and is another file than the bundle's",
                hint="move it away, or give another folder to --project",
            )
        if not goal.exists():
            put(bundle, entry, goal, count=count)


def _place_made(bundle: Path, manifest: Manifest, item: Item, target: Path, count: Count) -> None:
    """A model's folder, which gets its name last."""
    with locked(target):
        for left in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        with new_folder(target) as folder:
            for path in item.paths:
                put(bundle, manifest.files[path], folder / item.below(path), count=count)


def _place_hub(bundle: Path, manifest: Manifest, item: Item, count: Count) -> None:
    """The hub's cache layout: blobs, links to them, and last the note that says what is whole."""
    repo = RepoCache(hub_cache() / safe(item.request["repo"]))
    commit = safe(item.request["commit"])
    blobs: dict[str, Path] = {}
    with locked(repo.lock_target):
        for path in item.paths:
            entry = manifest.files[path]
            blobs[item.below(path)] = blob = repo.blobs / entry.sha256
            if not is_put(entry, blob):
                put(bundle, entry, blob, count=count)
        for name, blob in blobs.items():
            repo.link(commit, name, blob)
        for selection in item.request.get("selections", []):
            repo.note(commit, str(selection), blobs)
        for ref in item.request.get("refs", []):
            repo.remember(safe(str(ref)), commit)
