"""A registry of container images with one image in it: the part of the distribution API that a pull uses.

Docker takes registries on 127.0.0.0/8 without TLS.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def _blob(content: bytes, media_type: str) -> tuple[str, bytes, dict[str, object]]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return digest, content, {"mediaType": media_type, "size": len(content), "digest": digest}


def _blobs(saved: Path) -> tuple[bytes, dict[str, bytes]]:
    """Manifest and blobs of the image in a file of `docker save`."""
    with tarfile.open(saved) as tar:

        def read(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()

        (image,) = json.loads(read("manifest.json"))
        config = _blob(read(image["Config"]), CONFIG)
        layers = [_blob(read(name), LAYER) for name in image["Layers"]]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config[2],
        "layers": [entry for _, _, entry in layers],
    }
    return json.dumps(manifest).encode(), {digest: content for digest, content, _ in (config, *layers)}


@contextmanager
def registry(saved: Path) -> Iterator[tuple[str, str]]:
    """`127.0.0.1:PORT` of a registry that answers with this image for every name, and its manifest's digest."""
    manifest, blobs = _blobs(saved)
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            last = self.path.rpartition("/")[2]
            kind, content = "application/octet-stream", blobs.get(last)
            if "/manifests/" in self.path:
                # A manifest that is asked for by another digest is not here.
                kind, content = MANIFEST, None if last.startswith("sha256:") and last != digest else manifest
            elif self.path == "/v2/":
                kind, content = "application/json", b"{}"
            self.send_response(404 if content is None else 200)
            self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
            self.send_header("Docker-Content-Digest", digest if kind == MANIFEST else last)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body and content:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", digest
    finally:
        server.shutdown()
        server.server_close()
