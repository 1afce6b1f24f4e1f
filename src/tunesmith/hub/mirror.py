"""One endpoint as a source of file bytes: opens a file at an offset, and knows how well it does."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.core.net import Http, NetError, Reply
from tunesmith.hub.endpoint import Endpoint, Kind
from tunesmith.hub.listing import RemoteFile, file_url, published

CHUNK = 1 << 20


class WrongContent(TunesmithError):
    """A server's bytes, size or range are not what is published of the file."""


@dataclass(frozen=True)
class Stream:
    """The bytes of a file from `offset` on, and what the server says of the file."""

    offset: int
    told: RemoteFile
    chunks: Iterator[bytes]


class Gauge:
    """Bytes a second over the last `window_s` seconds, all streams of a mirror together."""

    def __init__(self, floor_bytes_per_s: float, window_s: float) -> None:
        self._floor, self._window_s = floor_bytes_per_s, window_s
        self._seen: deque[tuple[float, int]] = deque()
        self._open = 0
        self._since = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count the time during which at least one stream is open."""
        with self._lock:
            self._open += 1
            if self._open == 1:
                self._since = time.monotonic()
                self._seen.clear()
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._seen.append((time.monotonic(), num_bytes))

    def is_slow(self) -> bool:
        """True when a whole window passed with less than the floor."""
        now = time.monotonic()
        with self._lock:
            while self._seen and self._seen[0][0] < now - self._window_s:
                self._seen.popleft()
            if now - self._since < self._window_s:
                return False
            return sum(size for _, size in self._seen) < self._floor * self._window_s


class Mirror:
    """An endpoint that is asked for the files of one repository at one revision.

    down: it did not answer or was too slow, so others go first; ranges: it serves parts of files.
    """

    def __init__(
        self, http: Http, endpoint: Endpoint, kind: Kind, name: str, at: str, *, gauge: Gauge
    ) -> None:
        self.http, self.endpoint, self.kind, self.name, self.at = http, endpoint, kind, name, at
        self.gauge = gauge
        self.down = False
        self.ranges = True

    def __str__(self) -> str:
        return str(self.endpoint)

    def url(self, path: str) -> str:
        return file_url(self.endpoint, self.kind, self.name, self.at, path)

    @contextmanager
    def open(self, path: str, offset: int) -> Iterator[Stream]:
        """The file from `offset` on, or from 0 where the server does not serve parts.

        Raises NetError when the server does not answer well, WrongContent when it sends another range.
        """
        if self.endpoint.layout == "folder":
            with self._open_local(path, offset) as stream:
                yield stream
            return
        begin = offset if self.ranges else 0
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        with (
            self.http.open(self.url(path), headers=headers, secrets=self.endpoint.secrets()) as reply,
            self.gauge.stream(),
        ):
            yield self._stream(path, begin, reply)

    def _stream(self, path: str, begin: int, reply: Reply) -> Stream:
        told = published(path, reply.own_headers)
        total = _total(reply, begin)
        if reply.status == 206:
            start = re.match(r"bytes (\d+)-", reply.headers.get("content-range", ""))
            if start is None or int(start.group(1)) != begin:
                self.ranges = False
                raise WrongContent(
                    f"{self}: {path}: asked for bytes from {begin}, got "
                    f"'{reply.headers.get('content-range', 'no Content-Range')}'"
                )
            offset = begin
        else:
            offset = 0
        size = total if told.size is None or total is not None else told.size
        return Stream(offset, RemoteFile(path, size, told.sha256, told.git_sha1, told.tag), reply.chunks)

    @contextmanager
    def _open_local(self, path: str, offset: int) -> Iterator[Stream]:
        source = Path(self.at) / path
        try:
            file = source.open("rb")
        except OSError as error:
            raise NetError(f"{source}: {error.strerror}", status=404) from None
        with file, self.gauge.stream():
            file.seek(offset)
            chunks = iter(lambda: file.read(CHUNK), b"")
            yield Stream(offset, RemoteFile(path, source.stat().st_size), chunks)


def _total(reply: Reply, begin: int) -> int | None:
    """The size of the whole file as this answer tells it, None when it does not."""
    if "content-encoding" in reply.headers:
        return None
    total = re.search(r"/(\d+)$", reply.headers.get("content-range", ""))
    if reply.status == 206 and total:
        return int(total.group(1))
    length = reply.headers.get("content-length", "")
    if not length.isdigit():
        return None
    return int(length) + (begin if reply.status == 206 else 0)
