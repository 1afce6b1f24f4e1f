"""One repository, from what endpoints publish to a whole snapshot in the cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.core.hub_cache import COMMIT, hub_cache
from tunesmith.core.net import Http, NetError
from tunesmith.core.paths import locked, need_disk
from tunesmith.core.progress import say
from tunesmith.hub.cache import PART, RepoCache, content_fault, repo_cache
from tunesmith.hub.endpoint import Endpoint
from tunesmith.hub.listing import (
    Listing,
    RemoteFile,
    ask_for_file,
    check_name,
    file_url,
    folder_of,
    list_repo,
    modelscope_revision,
)
from tunesmith.hub.meter import DownloadMeter
from tunesmith.hub.mirror import Gauge, Mirror
from tunesmith.hub.model_files import content_hash
from tunesmith.hub.selection import WEIGHTS, is_pickle, select
from tunesmith.hub.transfer import Transfer, part_name, wait_before_retry
from tunesmith.hub.wish import AllFailed, Wish, all_failed, not_cached, reason

SPARE_BYTES = 64 * 1024**2
LIST_TRIES = 4


@dataclass(frozen=True)
class Plan:
    """What a fetch would do. `whole`: path in the repository: blob that is here already, checked."""

    listing: Listing
    files: list[RemoteFile]
    whole: dict[str, Path]
    part_bytes: int

    @property
    def missing(self) -> list[RemoteFile]:
        return [file for file in self.files if file.path not in self.whole]

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come; what has come of a file counts as here."""
        return max(0, sum(file.size or 0 for file in _distinct(self.missing)) - self.part_bytes)


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot in the cache."""

    folder: Path
    commit: str

    @cached_property
    def files(self) -> dict[str, dict[str, int | str]]:
        """Path in the repository: {"bytes", "sha256"} of every file of the snapshot."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {
            path.relative_to(self.folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": content_hash(path),
            }
            for path in paths
        }


def fetch_repo(wish: Wish) -> Snapshot:
    """The wanted files of a repository as a snapshot in the cache, brought or completed.

    Without network, or with `offline` or $HF_HUB_OFFLINE, a copy in the cache is taken, else one in a folder
    among the endpoints. Raises UserError when the name, revision or wanted files do not exist or access is
    refused; TunesmithError naming every endpoint and its fault when none can be reached, or when the disk is
    too small.
    """
    check_name(wish.name, wish.kind)
    pinned = wish.revision is not None and COMMIT.match(wish.revision) is not None
    here = cached(wish, whole=not wish.is_offline) if wish.is_offline or pinned else None
    if here is not None:
        return here
    places = wish.places()
    if not places:
        raise not_cached(wish)
    cache = repo_cache(wish.kind, wish.name)
    http = _http()
    try:
        plan = look(http, wish, places)
        with _turn(wish, cache):
            plan = _with_whole(plan, cache)  # another process may have brought some meanwhile
            return _complete(http, wish, places, plan, cache)
    except AllFailed as failed:
        found = None if failed.refused else cached(wish)
        if found is None:
            raise failed.error from None
        say(f"{wish.name}: no endpoint can be reached; the copy in the cache is used, commit {found.commit}")
        return found
    finally:
        http.close()


@contextmanager
def _turn(wish: Wish, cache: RepoCache) -> Iterator[None]:
    """Hold the repository's lock; a person who waits for it is told why."""
    notice = threading.Timer(
        2.0, say, [f"{wish.name}: another process is fetching it; waiting for it to end"]
    )
    notice.daemon = True
    notice.start()
    try:
        with locked(cache.lock_target):
            notice.cancel()
            yield
    finally:
        notice.cancel()


def plan_repo(wish: Wish) -> Plan:
    """What `fetch_repo` would bring. Raises what it raises, and UserError offline."""
    check_name(wish.name, wish.kind)
    places = wish.places()
    if not places:
        raise UserError("offline mode is on: nothing can be listed", hint="leave out --dry-run or --offline")
    http = _http()
    try:
        return _with_whole(look(http, wish, places), repo_cache(wish.kind, wish.name))
    except AllFailed as failed:
        raise failed.error from None
    finally:
        http.close()


def cached(wish: Wish, *, whole: bool = False) -> Snapshot | None:
    """The copy in the cache, or None. `whole`: only one that is known to hold everything wanted."""
    cache = repo_cache(wish.kind, wish.name)
    commit = cache.commit_of(wish.revision)
    if commit is None or not cache.snapshot(commit).is_dir():
        return None
    folder = cache.snapshot(commit)
    if not cache.is_whole(commit, wish.selection.key):
        names = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
        usable = bool(names) if wish.kind == "model" else any(folder.iterdir())
        if whole or not usable:
            return None
    return Snapshot(folder, commit)


# -- listing ----------------------------------------------------------------------------------------


def look(http: Http, wish: Wish, places: Sequence[Endpoint]) -> Plan:
    """The wanted files as the first endpoint that answers publishes them. Raises AllFailed, UserError."""
    faults: list[tuple[Endpoint, NetError]] = []
    for number, place in enumerate(places):
        try:
            listing = _list(http, wish, place, alone=number == len(places) - 1)
        except NetError as error:
            faults.append((place, error))
            if len(places) > 1:
                say(f"{place}: {reason(error, wish)}")
            continue
        paths = select(wish.name, wish.kind, list(listing.files), wish.selection)
        _say_left_out(wish, listing, paths)
        return Plan(listing, _known(http, wish, listing, paths), {}, 0)
    raise all_failed(wish, faults)


def _list(http: Http, wish: Wish, place: Endpoint, *, alone: bool) -> Listing:
    number = 0
    while True:
        number += 1
        try:
            return list_repo(http, place, wish.kind, wish.name, wish.revision)
        except NetError as error:
            if number >= _list_tries(error, alone=alone) or not wait_before_retry(error, number, alone=alone):
                raise


def _list_tries(error: NetError, *, alone: bool) -> int:
    """A server that is not there is left at once for the next one, if there is one."""
    if alone:
        return 2 if error.refused else LIST_TRIES
    return 1 if error.status is None else 2


def _known(http: Http, wish: Wish, listing: Listing, paths: Sequence[str]) -> list[RemoteFile]:
    """The wanted files; where the listing lacks a hash or size, the file's own address is asked."""

    def ask(path: str) -> RemoteFile:
        file = listing.files[path]
        if listing.endpoint.layout == "folder" or (file.hash and file.size is not None):
            return file
        url = file_url(listing.endpoint, wish.kind, wish.name, listing.at, path)
        return ask_for_file(http, listing.endpoint, url, file)

    with ThreadPoolExecutor(wish.jobs) as pool:
        return list(pool.map(ask, paths))


def _say_left_out(wish: Wish, listing: Listing, paths: Sequence[str]) -> None:
    """A model's pickles beside its safetensors need no word; what a user may miss does."""
    pickles = sorted(path for path in listing.files if is_pickle(path) and path not in paths)
    asked = wish.kind == "dataset" or wish.selection.allow
    if pickles and asked and wish.progress and not wish.selection.allow_pickle:
        say(f"{wish.name}: pickles are left out: {', '.join(pickles[:3])}{', …' if len(pickles) > 3 else ''}")


# -- bringing ---------------------------------------------------------------------------------------


def _complete(http: Http, wish: Wish, places: Sequence[Endpoint], plan: Plan, cache: RepoCache) -> Snapshot:
    commit = plan.listing.commit
    _check_disk(wish, plan)
    blobs = dict(plan.whole)
    if plan.missing:
        total = sum(file.size or 0 for file in _distinct(plan.missing))
        label = f"{wish.name} ({len(plan.missing)} file{'s' if len(plan.missing) > 1 else ''})"
        mirrors = _mirrors(http, wish, places, plan.listing)
        with DownloadMeter(label, total, have=plan.part_bytes, quiet=not wish.progress) as meter:
            blobs |= Transfer(wish.name, cache, mirrors, meter, jobs=wish.jobs).bring(plan.missing)
    # Links last and weights last of all: a snapshot that has its weights is whole.
    for path in sorted(blobs, key=lambda path: (path.endswith(".safetensors"), path)):
        cache.link(commit, path, blobs[path])
    cache.sync(commit)
    cache.note(commit, wish.selection.key, blobs)
    if wish.revision != commit:
        cache.remember(wish.revision or "main", commit)
    return Snapshot(cache.snapshot(commit), commit)


def _mirrors(http: Http, wish: Wish, places: Sequence[Endpoint], listing: Listing) -> list[Mirror]:
    """Every endpoint as a source of the listed files, in order; one that failed to list them goes last."""
    found = []
    for place in places:
        at: str | None = listing.at
        if place != listing.endpoint and place.layout == "modelscope":
            at = modelscope_revision(wish.revision)
        elif place != listing.endpoint and place.layout == "folder":
            folder = folder_of(place, wish.kind, wish.name, None)
            at = str(folder) if folder else None
        elif place != listing.endpoint and listing.endpoint.layout != "hub":
            at = wish.revision or "main"
        if at is not None:
            gauge = Gauge(wish.slow_kib_per_s * 1024, wish.slow_after_s)
            found.append(Mirror(http, place, wish.kind, wish.name, at, gauge=gauge))
    for mirror in found[: places.index(listing.endpoint)]:
        mirror.down = mirror.endpoint != listing.endpoint
    return found


def _with_whole(plan: Plan, cache: RepoCache) -> Plan:
    """The plan with the files that are here already, each checked once in its life."""
    verified = cache.verified_blobs()
    whole = {}
    for file in plan.files:
        blob = _whole_blob(cache, plan.listing.commit, file, verified)
        if blob is not None:
            whole[file.path] = blob
    missing = _distinct([file for file in plan.files if file.path not in whole and file.hash])
    parts = [cache.blobs / f"{part_name(file)}{PART}" for file in missing]
    part_bytes = sum(path.stat().st_size for path in parts if path.is_file())
    return Plan(plan.listing, plan.files, whole, part_bytes)


def _whole_blob(
    cache: RepoCache, commit: str, file: RemoteFile, verified: dict[str, tuple[int, int]]
) -> Path | None:
    name = file.hash or file.tag
    if name is None:
        return None
    blob = cache.blobs / name
    loose = cache.snapshot(commit) / file.path  # a cache on a file system without links
    if not blob.is_file() and loose.is_file() and not loose.is_symlink() and not content_fault(loose, file):
        cache.blobs.mkdir(parents=True, exist_ok=True)
        os.replace(loose, blob)
    if not blob.is_file():
        return None
    stat = blob.stat()
    if verified.get(name) == (stat.st_size, stat.st_mtime_ns):
        return blob
    fault = content_fault(blob, file)
    if fault is None:
        return blob
    say(f"{file.path}: the copy in the cache is damaged ({fault}) and is fetched again")
    blob.unlink()
    return None


def _distinct(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Files of the same content once: they come once."""
    return list({file.hash or file.path: file for file in files}.values())


def _check_disk(wish: Wish, plan: Plan) -> None:
    if plan.missing:
        need_disk(
            hub_cache(),
            plan.missing_bytes,
            what=wish.name,
            hint="free space, or set $HF_HOME to a folder on another disk",
            spare_bytes=SPARE_BYTES,
        )


def _http() -> Http:
    """Time limits as huggingface_hub reads them: seconds without a byte."""
    return Http(read_timeout_s=_seconds("HF_HUB_DOWNLOAD_TIMEOUT", 10.0))


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        return float(text) if float(text or default) > 0 and text else default
    except ValueError:
        raise UserError(f"${variable} is '{text}', which is no number of seconds") from None
