"""Object stores: the only place that imports fsspec.

A folder is carried over atomically by its manifest. First goes PARTIAL, which lists what will come, then the
files, last `manifest.json`; PARTIAL is then removed. So for a reader

    manifest.json          a whole folder: exactly the files that it names
    PARTIAL alone          a folder that is on its way, or was cut off: it does not exist
    neither                a plain folder, put there by another program
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.core.errors import MissingExtra, TunesmithError, UserError
from tunesmith.core.events import DISK_FULL
from tunesmith.core.paths import need_disk, new_folder, write_json
from tunesmith.core.run_folder import MANIFEST, manifest_fault, manifest_of, read_manifest

URL = re.compile(r"^([a-z][a-z0-9+.-]*)://")
PARTIAL = ".partial.json"
NO_STORES = ("http", "https", "ray")
# They have no folders to make, and s3fs would make a bucket that is missing.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "oss", "abfs", "az", "memory")
OPTIONS: dict[str, dict[str, Any]] = {
    # Parts of 50 MiB that are in memory at a time.
    "s3": {"use_listings_cache": False, "max_concurrency": 4},
    "file": {"auto_mkdir": True},
}
CREDENTIALS = (
    "give $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws; a store that is not "
    "Amazon's also needs $AWS_ENDPOINT_URL"
)
ENDPOINT = "check $AWS_ENDPOINT_URL (now {}) and the network"
FREE_SPACE = "free space, or set $TUNESMITH_CACHE to another disk"


class StoreError(TunesmithError):
    """The store could not be reached or gave an error; the same call may succeed later."""


class Vanished(StoreError):
    """What was there a moment ago is not: another process changed it."""


@dataclass(frozen=True)
class Stored:
    """An object: its size, and a mark that is another when its content is."""

    num_bytes: int
    mark: str


def is_url(text: str) -> bool:
    """True for s3://bucket/name and the like; a path of this machine never begins so."""
    return URL.match(text) is not None


def join(url: str, name: str) -> str:
    """The URL of `name` below `url`."""
    return f"{url.rstrip('/')}/{name}" if name else url


class Store:
    """The objects below a URL, by their names relative to it ("" is the URL itself).

    Every method raises UserError for missing credentials, permissions or bucket, and StoreError when the
    store cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._scheme = _scheme(url)
        self.url = f"{self._scheme}://" + url.partition("://")[2].rstrip("/")
        self._fs, self._root = _open(self.url, self._scheme)

    def list(self) -> dict[str, Stored]:
        """All objects, sorted by name. A store that is itself one object is {"": ...}."""
        with _told(self.url):
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
        names = {path[len(self._root) :].strip("/"): entry for path, entry in found.items()}
        return {
            name: Stored(int(entry["size"]), _mark(entry))
            for name, entry in sorted(names.items())
            if not _is_folder(entry)
        }

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None where there is none."""
        with _told(join(self.url, name)):
            try:
                found: bytes = self._fs.cat_file(self._at(name))
            except FileNotFoundError as error:
                if _is_bucket(error):
                    raise
                return None
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a small object: a reader sees the old content or the new."""
        with _told(join(self.url, name)):
            self._make_room(name)
            self._fs.pipe_file(self._at(name), content)

    def put(self, path: Path, name: str) -> None:
        """Carry a file over; an object appears when it is complete."""
        with path.open("rb"), _told(join(self.url, name)):  # its own absence is no fault of the store
            self._make_room(name)
            self._fs.put_file(str(path), self._at(name))

    def get(self, name: str, path: Path) -> None:
        """Bring an object into a new file. Raises Vanished where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _told(join(self.url, name)):
            self._fs.get_file(self._at(name), str(path))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects one after the other, in this order; one that is gone already is passed over."""
        for name in names:
            with _told(join(self.url, name)):
                try:
                    self._fs.rm_file(self._at(name))
                except FileNotFoundError as error:
                    if _is_bucket(error):
                        raise

    def copy(self, name: str, to: str) -> None:
        """Copy an object to another name below the same URL, inside the store."""
        with _told(join(self.url, name)):
            self._make_room(to)
            self._fs.cp_file(self._at(name), self._at(to))

    def drop_uploads(self) -> None:
        """On S3: remove the parts of uploads that never ended. They are in no listing, but are paid for."""
        if self._scheme not in ("s3", "s3a"):
            return
        bucket, key, _ = self._fs.split_path(self._root)
        with _told(self.url):
            found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
            for upload in found.get("Uploads", []):
                self._fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_room(self, name: str) -> None:
        if self._scheme not in OBJECT_STORES:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)


# -- whole folders -----------------------------------------------------------------------------------------


def put_folder(folder: Path, url: str) -> None:
    """Carry a folder over, whole or not at all; what is at `url` is replaced, if it was carried over too.

    Its manifest is the folder's own, else one is made. A folder that is there already, unchanged, is left.
    Raises UserError when `url` holds anything else.
    """
    store, manifest = Store(url), read_manifest(folder) or manifest_of(folder)
    wanted = list(manifest["files"])
    if _unchanged(store, manifest):
        return
    remains = _remains(store)
    store.drop_uploads()
    store.write(PARTIAL, json.dumps(sorted({*remains, *wanted})).encode())
    store.remove([MANIFEST])
    store.remove([name for name in remains if name not in wanted])
    for name in wanted:
        store.put(folder / name, name)
    store.write(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())
    store.remove([PARTIAL])


def _unchanged(store: Store, manifest: Mapping[str, Any]) -> bool:
    found = store.list()
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return (
        MANIFEST in found
        and PARTIAL not in found
        and all(name in found and found[name].num_bytes == size for name, size in sizes.items())
        and stored_manifest(store) == manifest
    )


def _remains(store: Store) -> list[str]:
    """The files below the store that an earlier `put_folder` left. Raises UserError for files of others."""
    found = store.list()
    known = set(_partial_names(store) if PARTIAL in found else [])
    known |= set((stored_manifest(store) or {"files": {}})["files"])
    strange = [name for name in found if name not in known and name not in (MANIFEST, PARTIAL)]
    if strange:
        raise UserError(
            f"{store.url}: holds other files ({join(store.url, strange[0])}), which would be replaced",
            hint="give a name that is not in use",
        )
    return [name for name in found if name not in (MANIFEST, PARTIAL)]


def check_replaceable(url: str) -> None:
    """Raise UserError where `put_folder` would refuse `url`, since it holds files of others."""
    _remains(Store(url))


def _partial_names(store: Store) -> list[str]:
    found = _json(store.read(PARTIAL))
    return found if isinstance(found, list) else []


def remove_folder(url: str) -> None:
    """Remove what `put_folder` carried over, or left of it; a reader sees it whole or not at all."""
    store = Store(url)
    names = [name for name in store.list() if name not in (MANIFEST, PARTIAL)]
    store.write(PARTIAL, json.dumps(names).encode())
    store.remove([MANIFEST, *names, PARTIAL])
    store.drop_uploads()


def stored_manifest(store: Store) -> dict[str, Any] | None:
    """The manifest of a whole folder; None where the store holds none, or a damaged one."""
    content = store.read(MANIFEST)
    if content is None:
        return None
    found = _json(content)
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(files, dict):
        return None
    for name, entry in files.items():
        check_name(store.url, name)
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            return None
    return found


def get_folder(url: str, target: Path) -> None:
    """Bring a folder that `put_folder` carried over, every file checked by its hash, or nothing.

    Raises UserError when there is no whole folder at `url`, StoreError for a damaged one, and TunesmithError
    when the disk has no room.
    """
    store = Store(url)
    manifest = stored_manifest(store)
    if manifest is None:
        raise UserError(f"{url}: no whole folder (it has no {MANIFEST})", hint="check the URL")
    size = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    need_disk(target, size, what=url, hint=FREE_SPACE)
    with new_folder(target) as draft:
        for name in manifest["files"]:
            store.get(name, draft / name)
        write_json(draft / MANIFEST, manifest)
        fault = manifest_fault(draft)
        if fault:
            raise StoreError(f"{url}: {fault}", hint="it was changed or harmed in the store")


def check_name(url: str, name: str) -> None:
    """Raise UserError for an object whose name would lead out of the folder that it is brought to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{url}: an object has the name '{name}', which leads out of its folder")


def _json(content: bytes | None) -> Any:
    try:
        return json.loads(content or b"null")
    except ValueError:
        return None


# -- fsspec ------------------------------------------------------------------------------------------------


def _scheme(url: str) -> str:
    found = URL.match(url)
    if found is None or found[1] in NO_STORES:
        raise UserError(f"{url}: not the URL of a store", hint="such as s3://BUCKET/NAME")
    return found[1]


def _open(url: str, scheme: str) -> tuple[Any, str]:
    """(file system, path in it) of a URL."""
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("fsspec", "s3") from None
    try:
        fs, root = fsspec.url_to_fs(url, **OPTIONS.get(scheme, {}))
    except ImportError as error:
        if scheme in ("s3", "s3a"):
            raise MissingExtra("s3fs", "s3") from None
        raise UserError(
            f"{url}: {error}", hint=f"install the package that fsspec needs for {scheme}://"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{url}: {_line(error)}", hint="such as s3://BUCKET/NAME") from None
    root = str(root).rstrip("/")
    if not root:
        raise UserError(f"{url}: names no bucket", hint="such as s3://BUCKET/NAME")
    return fs, root


def _is_folder(entry: Mapping[str, Any]) -> bool:
    """Web consoles make empty objects whose names end in / to show a folder."""
    return str(entry.get("name", "")).endswith("/") or entry.get("type") == "directory"


def _mark(entry: Mapping[str, Any]) -> str:
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    return next((str(entry[key]) for key in keys if entry.get(key) is not None), "")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Errors of whatever library serves the store, in our words."""
    try:
        yield
    except TunesmithError:
        raise
    except FileNotFoundError as error:
        raise _not_there(url, error) from None
    except PermissionError as error:
        raise UserError(f"{url}: the store refuses it: {_line(error)}", hint=CREDENTIALS) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise StoreError(f"{url}: {_line(error)}", hint=_endpoint_hint()) from None
    except Exception as error:  # botocore's errors have no parent that other stores share
        raise _other(url, error) from None


def _not_there(url: str, error: FileNotFoundError) -> TunesmithError:
    if _is_bucket(error):
        return UserError(
            f"{url}: there is no such bucket",
            hint=f"create it, or check its name; {_endpoint_hint()}",
        )
    if type(error.__cause__).__name__ == "ClientError":  # a 404 without a word of S3
        return UserError(f"{url}: the endpoint answers '{error}', as no store does", hint=_endpoint_hint())
    return Vanished(f"{url}: there is no such object", hint="check the URL")


def _is_bucket(error: Exception) -> bool:
    return "NoSuchBucket" in (type(error.__cause__).__name__, getattr(error, "code", ""))


def _other(url: str, error: Exception) -> TunesmithError:
    kind = type(error).__name__
    if "Credential" in kind or "Token" in kind or "Profile" in kind:
        return UserError(f"{url}: no credentials for the store: {_line(error)}", hint=CREDENTIALS)
    if isinstance(error, ValueError) or "ParamValidation" in kind or "Invalid" in kind:
        return UserError(f"{url}: {_line(error)}", hint=_endpoint_hint())
    return StoreError(f"{url}: the store cannot be reached: {_line(error)}", hint=_endpoint_hint())


def _endpoint_hint() -> str:
    return ENDPOINT.format(os.environ.get("AWS_ENDPOINT_URL") or "not set: Amazon's own")


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
