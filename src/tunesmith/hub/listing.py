"""What a repository holds at a revision: its commit, and for each file the size and hash that are published.

Hub layout: https://huggingface.co/docs/hub/api (info with `blobs=true`, the tree, and the headers of a
file). ModelScope layout: the routes that its own SDK calls (modelscope.hub.api).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.hub_cache import COMMIT
from tunesmith.core.net import Http, NetError
from tunesmith.core.paths import sha256_file
from tunesmith.hub.endpoint import Endpoint, Kind

HEX = re.compile(r"^(?:[0-9a-f]{40}|[0-9a-f]{64})$")
SAFE_TAG = re.compile(r"^[\w-]{8,128}$")
PAGE = 100
MAX_PAGES = 2000


@dataclass(frozen=True)
class RemoteFile:
    """A file as a server publishes it. `size` in bytes; hashes as lower-case hex; `tag`: its bare ETag."""

    path: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    tag: str | None = None

    @property
    def hash(self) -> str | None:
        """SHA-256, else the git blob SHA-1; huggingface_hub names the file's blob in the cache by it."""
        return self.sha256 or self.git_sha1

    def filled(self, other: RemoteFile) -> RemoteFile:
        """This file with what only `other` knows."""
        own = self.hash
        return replace(
            self,
            size=self.size if self.size is not None else other.size,
            sha256=self.sha256 or (None if own else other.sha256),
            git_sha1=self.git_sha1 or (None if own else other.git_sha1),
            tag=self.tag or other.tag,
        )


@dataclass(frozen=True)
class Listing:
    """`commit`: 40 hex digits; `at`: the revision under which `endpoint` serves the files."""

    endpoint: Endpoint
    commit: str
    at: str
    files: dict[str, RemoteFile]


def list_repo(http: Http, endpoint: Endpoint, kind: Kind, name: str, revision: str | None) -> Listing:
    """What `endpoint` holds of `name` at `revision` (None: its default branch).

    Raises NetError when it does not answer or has no such thing, TunesmithError when it names a file that
    would lie outside the repository's folder.
    """
    makers: dict[str, Callable[[Http, Endpoint, Kind, str, str | None], Listing]] = {
        "hub": _from_hub,
        "modelscope": _from_modelscope,
        "folder": _from_folder,
    }
    found = makers[endpoint.layout](http, endpoint, kind, name, revision)
    check_paths(found.files, str(endpoint))
    return found


def check_paths(paths: Iterable[str], place: str) -> None:
    """Raise TunesmithError for a path that would lie outside its folder, or a file that is a folder too."""
    known = set(paths)
    for path in known:
        parts = path.split("/")
        bad = not path or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 for c in path)
        if bad or any("/".join(parts[:n]) in known for n in range(1, len(parts))) or len(path) > 1000:
            raise TunesmithError(
                f"{place}: lists a file named {path[:120]!r}, which is refused: it would not lie safely "
                "inside the repository's folder",
                hint="this server is broken or hostile: use another endpoint",
            )


def file_url(endpoint: Endpoint, kind: Kind, name: str, at: str, path: str) -> str:
    """The address of one file."""
    if endpoint.layout == "modelscope":
        query = urlencode({"Revision": at, "FilePath": path})
        return f"{endpoint.place}/api/v1/{kind}s/{quote(name)}/repo?{query}"
    prefix = "datasets/" if kind == "dataset" else ""
    return f"{endpoint.place}/{prefix}{quote(name)}/resolve/{quote(at, safe='')}/{quote(path)}"


# -- hub --------------------------------------------------------------------------------------------


def _from_hub(http: Http, endpoint: Endpoint, kind: Kind, name: str, revision: str | None) -> Listing:
    base = f"{endpoint.place}/api/{kind}s/{quote(name)}"
    raw, headers = _hub_info(http, endpoint, base, revision)
    siblings = raw.get("siblings") if isinstance(raw, dict) else None
    if not isinstance(siblings, list):
        raise NetError(f"{endpoint}: its answer about {name} holds no list of files", status=200)
    files = dict(_hub_file(entry, "rfilename") for entry in siblings if isinstance(entry, dict))
    commit = str(raw.get("sha") or headers.get("x-repo-commit") or "")
    if not COMMIT.match(commit):
        commit = revision if revision and COMMIT.match(revision) else ""
    at = commit or revision or "main"
    check_paths(files, str(endpoint))
    if any(file.hash is None or file.size is None for file in files.values()):
        files = _with_tree(http, endpoint, f"{base}/tree/{quote(at, safe='')}?recursive=true", files)
    return Listing(endpoint, commit or _digest(files), at, files)


def _hub_info(http: Http, endpoint: Endpoint, base: str, revision: str | None) -> tuple[Any, dict[str, str]]:
    """The repository's info. Simple servers know no query, or no default branch: they are asked again."""
    url = f"{base}/revision/{quote(revision, safe='')}" if revision else base
    urls = [f"{url}?blobs=true", url] + ([] if revision else [f"{base}/revision/main"])
    first: NetError | None = None
    for url in urls:
        try:
            return http.get_json(url, secrets=endpoint.secrets())
        except NetError as error:
            first = first or error
            if error.status not in (400, 404) or error.code:  # the hub itself names what is missing
                break
    assert first is not None
    raise first


def _hub_file(entry: Mapping[str, Any], key: str) -> tuple[str, RemoteFile]:
    """A sibling of the info (`blobId`), or an entry of the tree (`oid`)."""
    path = str(entry.get(key) or entry.get("path") or "")
    lfs = entry.get("lfs")
    if isinstance(lfs, dict):
        sha256 = str(lfs.get("sha256") or lfs.get("oid") or "").removeprefix("sha256:")
        return path, RemoteFile(path, _size(lfs.get("size", entry.get("size"))), sha256=_hex(sha256, 64))
    return path, RemoteFile(
        path, _size(entry.get("size")), git_sha1=_hex(entry.get("blobId") or entry.get("oid"), 40)
    )


def _with_tree(
    http: Http, endpoint: Endpoint, url: str, files: dict[str, RemoteFile]
) -> dict[str, RemoteFile]:
    """The files with what the tree says of them; a server without a tree takes nothing away."""
    found = dict(files)
    next_url: str | None = url
    for _ in range(MAX_PAGES):
        if next_url is None:
            break
        try:
            entries, headers = http.get_json(next_url, secrets=endpoint.secrets())
        except NetError:
            break
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("type", "file") == "file":
                path, file = _hub_file(entry, "path")
                if path in found:
                    found[path] = file.filled(found[path])
        link = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("link", ""))
        next_url = link.group(1) if link and link.group(1).startswith(endpoint.place) else None
    return found


def ask_for_file(http: Http, endpoint: Endpoint, url: str, file: RemoteFile) -> RemoteFile:
    """The file with what the headers of its address tell; unchanged where the server tells nothing."""
    try:
        with http.open(url, method="HEAD", secrets=endpoint.secrets()) as reply:
            return file.filled(published(file.path, reply.own_headers))
    except NetError:
        return file


def published(path: str, headers: Mapping[str, str]) -> RemoteFile:
    """What the hub's own headers say of a file: hash by X-Linked-Etag or ETag, size by X-Linked-Size."""
    tag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('" ')
    length = headers.get("x-linked-size")
    if length is None and "location" not in headers and "content-encoding" not in headers:
        total = re.search(r"/(\d+)$", headers.get("content-range", ""))
        length = total.group(1) if total else headers.get("content-length")
    return RemoteFile(
        path,
        _size(length),
        sha256=_hex(tag, 64),
        git_sha1=_hex(tag, 40),
        tag=tag if SAFE_TAG.match(tag) else None,
    )


# -- ModelScope -------------------------------------------------------------------------------------


def modelscope_revision(revision: str | None) -> str:
    """ModelScope's default branch is master where the hub's is main."""
    return "master" if revision in (None, "main") else str(revision)


def _from_modelscope(http: Http, endpoint: Endpoint, kind: Kind, name: str, revision: str | None) -> Listing:
    at = modelscope_revision(revision)
    base = f"{endpoint.place}/api/v1/{kind}s/{quote(name)}/repo"
    query = {"Revision": at, "Recursive": "True"}
    if kind == "model":
        entries = _modelscope_entries(http, endpoint, f"{base}/files?{urlencode(query)}")
    else:
        entries = _modelscope_pages(http, endpoint, f"{base}/tree?{urlencode({**query, 'Root': '/'})}")
    blobs = [entry for entry in entries if entry.get("Type", "blob") != "tree"]
    files = {
        str(entry.get("Path") or ""): RemoteFile(
            str(entry.get("Path") or ""), _size(entry.get("Size")), sha256=_hex(entry.get("Sha256"), 64)
        )
        for entry in blobs
    }
    commit = at if COMMIT.match(at) else _newest_commit(blobs) or _digest(files)
    return Listing(endpoint, commit, at, files)


def _modelscope_entries(http: Http, endpoint: Endpoint, url: str) -> list[dict[str, Any]]:
    raw, _ = http.get_json(url, secrets=endpoint.secrets())
    if isinstance(raw, dict) and raw.get("Code", 200) not in (
        200,
        "200",
    ):  # an error may come with status 200
        code = str(raw.get("Code"))
        status = int(code) if re.fullmatch(r"[45]\d\d", code) else 404
        raise NetError(f"{endpoint}: answers with code {code}", status=status)
    data = raw.get("Data") if isinstance(raw, dict) else None
    files = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(files, list):
        raise NetError(f"{endpoint}: its answer holds no list of files", status=404)
    return [entry for entry in files if isinstance(entry, dict)]


def _modelscope_pages(http: Http, endpoint: Endpoint, url: str) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for page in range(1, MAX_PAGES):
        entries = _modelscope_entries(http, endpoint, f"{url}&PageNumber={page}&PageSize={PAGE}")
        new = {str(entry.get("Path")): entry for entry in entries if str(entry.get("Path")) not in found}
        found |= new
        if len(entries) < PAGE or not new:
            break
    return list(found.values())


def _newest_commit(entries: list[dict[str, Any]]) -> str | None:
    """Each entry names the commit that changed it last; the newest of them is the repository's."""
    dated = [
        (e.get("CommittedDate") or 0, str(e.get("CommitId") or e.get("Revision") or "")) for e in entries
    ]
    commits = [(when, commit) for when, commit in dated if isinstance(when, int) and COMMIT.match(commit)]
    return max(commits)[1] if commits else None


# -- folder -----------------------------------------------------------------------------------------


def folder_of(endpoint: Endpoint, kind: Kind, name: str, revision: str | None) -> Path | None:
    """Where a folder holds the repository: a copied hub cache, FOLDER/owner/name, or FOLDER/name."""
    root = Path(endpoint.place)
    repo = root / f"{kind}s--{name.replace('/', '--')}"
    if (repo / "snapshots").is_dir():
        reference = repo / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else (revision or "")
        found = repo / "snapshots" / commit
        return found if commit and found.is_dir() else None
    plain = (root / name, root / name.rpartition("/")[2])
    return None if revision else next((folder for folder in plain if folder.is_dir()), None)


def _from_folder(http: Http, endpoint: Endpoint, kind: Kind, name: str, revision: str | None) -> Listing:
    folder = folder_of(endpoint, kind, name, revision)
    if folder is None:
        at = f" at revision '{revision}'" if revision else ""
        raise NetError(f"{endpoint}: holds no folder of {name}{at}", status=404)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _is_visible(path, folder))
    files = {}
    for path in paths:
        name_in_repo = PurePosixPath(path.relative_to(folder)).as_posix()
        files[name_in_repo] = RemoteFile(name_in_repo, path.stat().st_size, sha256=sha256_file(path))
    commit = folder.name if COMMIT.match(folder.name) else _digest(files)
    return Listing(endpoint, commit, str(folder), files)


def _is_visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


# -- small things -----------------------------------------------------------------------------------


def _digest(files: Mapping[str, RemoteFile]) -> str:
    """A stand-in for a commit that nobody tells: the same for the same files."""
    lines = [f"{path}\0{file.hash}\0{file.size}" for path, file in sorted(files.items())]
    return hashlib.sha1("\n".join(lines).encode(), usedforsecurity=False).hexdigest()


def _size(value: Any) -> int | None:
    try:
        return int(value) if int(value) >= 0 else None
    except (TypeError, ValueError):
        return None


def _hex(value: Any, length: int) -> str | None:
    text = str(value or "").lower()
    return text if len(text) == length and HEX.match(text) else None


def check_name(name: str, kind: Kind) -> None:
    """Raise UserError unless `name` is an id as the hubs write it."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or ".." in name:
        raise UserError(
            f"'{name}' is no id of a {'data set' if kind == 'dataset' else 'model'}",
            hint="an id is owner/name, as the hub's page shows it",
        )
