"""A hub on 127.0.0.1 that answers as huggingface.co does, as far as a download asks: info, tree, files.

`fail_after` cuts the first download of a file after that many bytes; `requests` lists the paths asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS = (".safetensors", ".gguf", ".bin")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.requests: list[str] = []
        self.fail_after: int | None = None
        self.corrupt = False
        self.gated: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = tree or file or info
        folder = self.server.repos.get(found.group(1)) if found else None
        if found is None or folder is None:
            return self.fail(404, "RepoNotFound")
        if found.group(1) in self.server.gated:
            return self.fail(403, "GatedRepo")
        if found.group(2) not in (None, "main", "v1", COMMIT):
            return self.fail(404, "RevisionNotFound")
        if tree:
            return self.json([self.entry(path) for path in sorted(folder.iterdir())])
        if file:
            return self.file(folder / file.group(3), body=body)
        names = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        return self.json({"id": found.group(1), "sha": COMMIT, "siblings": names})

    def entry(self, path: Path) -> dict[str, Any]:
        oid = hashlib.sha1(path.name.encode()).hexdigest()
        found: dict[str, Any] = {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}
        if path.name.endswith(LFS):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            found["lfs"] = {"oid": sha256, "size": path.stat().st_size, "pointerSize": 130}
        return found

    def fail(self, code: int, name: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Error-Message", name)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def file(self, path: Path, *, body: bool) -> None:
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        content = path.read_bytes()
        entry = self.entry(path)
        if self.server.corrupt and path.name.endswith(LFS):
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return None
        part = content[begin:]
        limit = self.server.fail_after
        if limit is not None and path.name.endswith(LFS) and len(part) > limit:
            self.server.fail_after = None
            part = part[:limit]
            self.close_connection = True
        self.wfile.write(part)
        return None


@contextmanager
def serve_hub(repos: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repos)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
