"""A hub on 127.0.0.1 over real HTTP: the layouts of huggingface.co and of ModelScope, and faults by schedule.

    with serve_hub({"owner/tiny": folder}) as hub:
        hub.faults.append(Fault("cut", path="model", after=1000))

Large files (by suffix) are redirected to a store on another port, as huggingface.co does. `served` notes the
bytes of every file that went out, so that a test can count what came twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
BRANCHES = (None, "main", "v1", "refs/pr/1", COMMIT)
LFS = (".safetensors", ".gguf", ".bin", ".parquet", ".large")
STEP = 4096


@dataclass
class Fault:
    """What goes wrong with requests for files whose path holds `path`, `times` times after `skip` good ones.

    kind: cut (after `after` bytes), status (`status`, with `retry_after`), wrong (the byte at `after`
    flipped), short (one byte less, announced so), no-range (200 in place of 206), shifted (a Content-Range
    that begins elsewhere), slow (`rate` bytes a second), silent (no answer), held (the last byte does not
    come before the fault is taken away).
    """

    kind: str
    path: str = ""
    times: int = 1_000_000
    skip: int = 0
    after: int = 0
    status: int = 500
    retry_after: str | None = None
    rate: int = 10_000


@dataclass
class Served:
    """Bytes [begin, end) of a file that were sent, and whether the client asked for a part."""

    path: str
    begin: int
    end: int
    asked: str | None = None


@dataclass
class State:
    """What the two ports of a hub share."""

    repos: dict[str, Path]
    datasets: dict[str, Path]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    headers: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    blobs: bool = True  # the info tells sizes and hashes
    tree: bool = True
    query: bool = True  # the info may be asked with a query
    head: bool = True
    redirect: bool = True
    extra_names: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str, *kinds: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind not in kinds or fault.path not in path or fault.times == 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, state: State, store: Hub | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state, self.store = state, store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["state"], name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bytes_of(self, path: str) -> list[tuple[int, int]]:
        """The parts of a file that went out, in order."""
        return [(s.begin, s.end) for s in self.state.served if s.path == path and s.end > s.begin]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self.server.state.head:
            return self.fail(405, "")
        self.answer(body=False)
        return None

    def do_GET(self) -> None:
        self.answer(body=True)

    # -- routes -----------------------------------------------------------------------------------

    def answer(self, *, body: bool) -> None:
        state = self.server.state
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        state.requests.append(f"{self.command} {path}")
        state.headers.append((f"{self.server.url}{path}", {k.lower(): v for k, v in self.headers.items()}))
        if path.startswith("/store/"):
            return self.send_file(Path(path.removeprefix("/store")), body=body, name=query["name"][0])
        if path.startswith("/api/v1/"):
            return self.modelscope(path, query, body=body)
        api = re.fullmatch(
            r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)(?:/(revision|tree)/([^/]+|refs/.+))?", path
        )
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path)
        if api:
            kind, name, route, revision = api.groups()
        elif file:
            kind, name, route, revision = (
                ("datasets" if file.group(1) else "models"),
                file.group(2),
                "",
                file.group(3),
            )
        else:
            return self.fail(404, "")
        folder = (state.datasets if kind == "datasets" else state.repos).get(name)
        if not self.may(folder, name, revision):
            return None
        assert folder is not None
        if file:
            return self.hub_file(folder, file.group(4), body=body)
        if fault := state.fault("/api", "status", "silent"):
            return self.go_wrong(fault)
        if query and route != "tree" and not state.query:
            return self.fail(404, "")
        if route == "tree":
            entries = [tree_entry(folder, path) for path in files_of(folder)]
            return self.json(entries) if state.tree else self.fail(404, "")
        return self.json(self.info(name, folder, blobs=state.blobs and "blobs" in query))

    def may(self, folder: Path | None, name: str, revision: str | None) -> bool:
        state = self.server.state
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if folder is None:
            self.fail(401, "RepoNotFound")  # as huggingface.co: unknown and private look the same
        elif name in state.gated and token not in state.tokens:
            self.fail(403 if token else 401, "GatedRepo")
        elif revision not in BRANCHES:
            self.fail(404, "RevisionNotFound")
        else:
            return True
        return False

    def info(self, name: str, folder: Path, *, blobs: bool) -> dict[str, Any]:
        siblings = []
        for path in files_of(folder):
            entry = tree_entry(folder, path)
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {
                        "sha256": entry["lfs"]["oid"],
                        "size": entry["size"],
                        "pointerSize": 130,
                    }
            siblings.append(sibling)
        siblings += [{"rfilename": extra} for extra in self.server.state.extra_names]
        return {"_id": "0", "id": name, "sha": COMMIT, "private": False, "siblings": siblings}

    def hub_file(self, folder: Path, name: str, *, body: bool) -> None:
        path = folder / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        if self.server.state.redirect and self.server.store and name.endswith(LFS):
            entry = tree_entry(folder, name)
            self.send_response(302)
            self.send_header(
                "Location", f"{self.server.store.url}/store{quote(str(path))}?name={quote(name)}"
            )
            self.send_header("X-Linked-Etag", f'"{entry["lfs"]["oid"]}"')
            self.send_header("X-Linked-Size", str(entry["size"]))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", '"' + "ab" * 16 + '"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.send_file(path, body=body, name=name, etag=True)

    def modelscope(self, path: str, query: dict[str, list[str]], *, body: bool) -> None:
        found = re.fullmatch(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(/files|/tree)?", path)
        state = self.server.state
        repos = state.datasets if found and found.group(1) == "datasets" else state.repos
        folder = repos.get(found.group(2)) if found else None
        revision = query.get("Revision", ["master"])[0]
        if found is None or folder is None or revision not in ("master", "v1"):
            return self.fail(404, "", {"Code": 10010205001, "Message": "not found", "Success": False})
        if not found.group(3):
            target = folder / query["FilePath"][0]
            return (
                self.send_file(target, body=body, name=query["FilePath"][0])
                if target.is_file()
                else self.fail(404, "")
            )
        entries: list[dict[str, Any]] = [{"Path": "sub", "Name": "sub", "Type": "tree", "Size": 0}]
        entries += [modelscope_entry(folder, name) for name in files_of(folder)]
        if found.group(3) == "/tree":
            page, size = int(query["PageNumber"][0]), int(query["PageSize"][0])
            entries = entries[(page - 1) * size : page * size]
        return self.json({"Code": 200, "Success": True, "Data": {"Files": entries}})

    # -- answers ----------------------------------------------------------------------------------

    def go_wrong(self, fault: Fault) -> None:
        if fault.kind == "silent":
            time.sleep(30)
            self.close_connection = True
            return
        self.send_response(fault.status)
        if fault.retry_after is not None:
            self.send_header("Retry-After", fault.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def fail(self, code: int, name: str, value: Any = None) -> None:
        content = json.dumps(value).encode() if value is not None else b""
        self.send_response(code)
        if name:
            self.send_header("X-Error-Code", name)
            self.send_header("X-Error-Message", name)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, path: Path, *, body: bool, name: str, etag: bool = False) -> None:
        state = self.server.state
        if fault := state.fault(name, "status", "silent"):
            return self.go_wrong(fault)
        content = path.read_bytes()
        total = len(content)
        if wrong := state.fault(name, "wrong"):
            content = content[: wrong.after] + bytes([content[wrong.after] ^ 1]) + content[wrong.after + 1 :]
        if state.fault(name, "short"):
            content, total = content[:-1], total - 1
        asked = self.headers.get("Range")
        begin = int(asked.split("=")[1].split("-")[0]) if asked else 0
        if asked and state.fault(name, "no-range"):
            begin, asked = 0, None
        if begin and begin >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        shift = 7 if asked and state.fault(name, "shifted") else 0
        self.send_response(206 if asked else 200)
        if etag:
            self.send_header("ETag", f'"{git_sha1(path.read_bytes())}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(total - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin + shift}-{total - 1}/{total}")
        self.end_headers()
        if body:
            self.send_body(name, content[begin:], begin, asked)
        return None

    def send_body(self, name: str, part: bytes, begin: int, asked: str | None) -> None:
        state = self.server.state
        cut = state.fault(name, "cut") if len(part) > 1 else None
        slow = state.fault(name, "slow")
        held = state.fault(name, "held")
        if cut and cut.after < len(part):
            part = part[: cut.after]
            self.close_connection = True
        note = Served(name, begin, begin, asked)
        state.served.append(note)
        step = min(STEP, max(1, slow.rate // 10)) if slow else 1 << 16
        free = len(part) - bool(held)
        for at in (*range(0, free, step), *range(free, len(part))):
            while at == free and held in state.faults:
                time.sleep(0.01)
            end = min(at + step, free) if at < free else len(part)
            self.wfile.write(part[at:end])
            note.end = begin + end
            if slow:
                time.sleep(step / slow.rate)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(folder: Path, name: str) -> dict[str, Any]:
    content = (folder / name).read_bytes()
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
    if name.endswith(LFS):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
        found["oid"] = git_sha1(pointer.encode())
        found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return found


def modelscope_entry(folder: Path, name: str) -> dict[str, Any]:
    content = (folder / name).read_bytes()
    return {
        "Path": name,
        "Name": name.rpartition("/")[2],
        "Type": "blob",
        "Size": len(content),
        "Sha256": hashlib.sha256(content).hexdigest(),
        "Revision": COMMIT,
        "CommittedDate": 1700000000,
        "IsLFS": name.endswith(LFS),
    }


@contextmanager
def serve_hub(repos: dict[str, Path] | None = None, datasets: dict[str, Path] | None = None) -> Iterator[Hub]:
    """A hub with its store of large files, both of one `State`."""
    state = State(repos or {}, datasets or {})
    store = Hub(state)
    hub = Hub(state, store)
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in (store, hub)
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in (hub, store):
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
