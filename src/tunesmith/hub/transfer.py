"""From mirrors into the blobs of the cache: parallel, resumed, checked, and in place only when right.

A file comes into `HASH.tunesmith.incomplete` and gets its name when its size and published hash are right.
What a kill leaves behind is taken up by the next call, at any mirror: the hash at the end decides.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.core.net import NetError
from tunesmith.core.paths import sha256_file
from tunesmith.core.progress import say
from tunesmith.hub.cache import PART, RepoCache, content_fault
from tunesmith.hub.listing import RemoteFile
from tunesmith.hub.meter import DownloadMeter
from tunesmith.hub.mirror import Mirror, Stream, WrongContent

RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
TRIES = 6  # in a row without a new byte, at the last mirror that is left
TRIES_WITH_OTHERS = 2
LONGEST_WAIT_S = 120.0  # a server that asks for a longer pause has failed


class TooSlow(TunesmithError):
    """A mirror is slower than the floor, and another is left."""


class Stopped(Exception):
    """Another file has failed, or the user wants to stop."""


@dataclass
class Try:
    """One file on its way. `tag`: ETag of the server that `part` came from, where no hash is published."""

    file: RemoteFile
    part: Path
    tag: str | None = None
    faults: dict[str, TunesmithError] = field(default_factory=dict)

    @property
    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0


class Transfer:
    """Brings files of one repository. The caller holds the repository's lock."""

    def __init__(
        self, name: str, cache: RepoCache, mirrors: Sequence[Mirror], meter: DownloadMeter, *, jobs: int
    ) -> None:
        self.name, self.cache, self.mirrors, self.meter, self.jobs = name, cache, list(mirrors), meter, jobs
        self._stop = threading.Event()

    def bring(self, files: Sequence[RemoteFile]) -> dict[str, Path]:
        """Path in the repository: its verified blob. Raises TunesmithError that names the first file lost."""
        self.cache.blobs.mkdir(parents=True, exist_ok=True)
        same: dict[str, list[RemoteFile]] = {}
        for file in sorted(files, key=lambda file: -(file.size or 0)):
            same.setdefault(file.hash or f"path {file.path}", []).append(file)
        todo: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[RemoteFile, Path | BaseException]] = queue.SimpleQueue()
        for group in same.values():
            todo.put(group[0])
        # Daemons, so that Ctrl-C ends the program at once and not after a silent server's time limit.
        workers = [
            threading.Thread(target=self._work, args=(todo, done), daemon=True)
            for _ in range(min(self.jobs, len(same)))
        ]
        for worker in workers:
            worker.start()
        blobs: dict[str, Path] = {}
        try:
            for _ in range(len(same)):
                file, found = done.get()
                if isinstance(found, BaseException):
                    raise found
                blobs |= {twin.path: found for twin in same[file.hash or f"path {file.path}"]}
        finally:
            self._stop.set()
            for worker in workers:
                worker.join(0.2)
        return blobs

    def _work(
        self,
        todo: queue.SimpleQueue[RemoteFile],
        done: queue.SimpleQueue[tuple[RemoteFile, Path | BaseException]],
    ) -> None:
        while not self._stop.is_set():
            try:
                file = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((file, self._bring(file)))
            except Stopped:
                return
            except BaseException as error:  # raised again in the thread that waits
                done.put((file, error))
                return

    def _bring(self, file: RemoteFile) -> Path:
        job = Try(file, self.cache.blobs / f"{part_name(file)}{PART}")
        if file.hash is None:
            job.part.unlink(missing_ok=True)  # nothing could tell whether it is the same file
        for mirror_round in range(2 if len(self.mirrors) > 1 else 1):
            left = [m for m in self.mirrors if mirror_round == 0 or _may_pass(job.faults.get(str(m)))]
            while left:
                left.sort(key=lambda mirror: mirror.down)
                mirror = left.pop(0)
                try:
                    return self._from(mirror, job, alone=all(other.down for other in left))
                except (NetError, WrongContent, TooSlow) as error:
                    job.faults[str(mirror)] = error
                    if left:
                        say(f"{file.path}: {error.what}; {left[0]} is asked next")
        raise self._failure(job)

    def _from(self, mirror: Mirror, job: Try, *, alone: bool) -> Path:
        """The file from one mirror, as long as it brings new bytes."""
        fruitless = wrong = 0
        best = job.have
        while True:
            try:
                self._stream(mirror, job, alone=alone)
                return self._place(job, mirror)
            except WrongContent:
                wrong += 1
                if wrong > 1:
                    raise
            except NetError as error:
                if error.status == 416:  # nothing lies behind what is here: it is not a part of this file
                    self._drop(job)
                fruitless = 0 if job.have > best else fruitless + 1
                best = max(best, job.have)
                if not (_may_pass(error) or error.status == 416) or (error.refused and not alone):
                    mirror.down = mirror.down or error.refused
                    raise
                if fruitless >= (TRIES if alone else TRIES_WITH_OTHERS):
                    mirror.down = mirror.down or error.status is None
                    raise
                self._wait(error, fruitless, alone=alone)

    def _stream(self, mirror: Mirror, job: Try, *, alone: bool) -> None:
        """Append what is missing. Leaves what came also when the connection breaks."""
        size = job.file.size
        if (size is not None and job.have > size) or (job.file.hash is None and job.tag is None):
            self._drop(job)
        if size is not None and job.have == size and (size > 0 or job.part.exists()):
            return
        with mirror.open(job.file.path, job.have) as stream:
            self._agree(mirror, job, stream)
            self._receive(mirror, job, stream, alone=alone)

    def _agree(self, mirror: Mirror, job: Try, stream: Stream) -> None:
        """Refuse a stream of another file before its first byte is taken."""
        told, file = stream.told, job.file
        expected, found = (file.sha256, told.sha256) if file.sha256 else (file.git_sha1, told.git_sha1)
        if expected and found and expected != found:
            raise WrongContent(f"{mirror}: {file.path}: expected hash {expected}, it offers {found}")
        if file.size is not None and told.size is not None and told.size != file.size:
            raise WrongContent(f"{mirror}: {file.path}: expected {file.size} bytes, it offers {told.size}")
        if file.hash is None:
            if stream.offset and told.tag != job.tag:
                self._drop(job)
                raise WrongContent(f"{mirror}: {file.path}: the file changed while it came")
            job.tag = told.tag

    def _receive(self, mirror: Mirror, job: Try, stream: Stream, *, alone: bool) -> None:
        end = stream.told.size if job.file.size is None else job.file.size
        at = stream.offset
        self.meter.add(at - job.have)  # bytes that come again from a server without ranges
        with job.part.open("r+b" if job.part.exists() else "w+b") as out:
            out.truncate(at)
            out.seek(at)
            for chunk in stream.chunks:
                if self._stop.is_set():
                    raise Stopped
                at += len(chunk)
                if end is not None and at > end:
                    raise WrongContent(f"{mirror}: {job.file.path}: expected {end} bytes, it sends more")
                out.write(chunk)
                self.meter.add(len(chunk))
                mirror.gauge.add(len(chunk))
                if not alone and mirror.gauge.is_slow():
                    mirror.down = True
                    raise TooSlow(f"{mirror}: too slow")
        if end is not None and at < end:
            raise NetError(f"{mirror}: {job.file.path}: the connection ended at byte {at} of {end}")

    def _place(self, job: Try, mirror: Mirror) -> Path:
        """Check the whole file and give it its name; a wrong one is thrown away."""
        fault = content_fault(job.part, job.file)
        if fault:
            self._drop(job)
            raise WrongContent(f"{mirror}: {job.file.path}: damaged on its way: {fault}")
        blob = self.cache.blobs / (job.file.hash or job.tag or sha256_file(job.part))
        with job.part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(job.part, blob)
        return blob

    def _drop(self, job: Try) -> None:
        self.meter.add(-job.have)
        job.part.unlink(missing_ok=True)

    def _wait(self, error: NetError, fruitless: int, *, alone: bool) -> None:
        if fruitless == 0 and error.retry_after_s is None:
            return
        pause = min(8.0, 0.5 * 2 ** max(0, fruitless - 1)) * random.uniform(0.8, 1.2)
        if error.retry_after_s is not None:
            if error.retry_after_s > (LONGEST_WAIT_S if alone else 5.0):
                raise error
            pause = max(error.retry_after_s, 0.1)
        if self._stop.wait(pause):
            raise Stopped

    def _failure(self, job: Try) -> TunesmithError:
        tried = "; ".join(
            fault.what if fault.what.startswith(mirror) else f"{mirror}: {fault.what}"
            for mirror, fault in job.faults.items()
        )
        return TunesmithError(
            f"{self.name}: the file '{job.file.path}' could not be brought: {tried}",
            hint="what came is kept: the same command goes on where this one ended; --endpoint names another "
            "mirror, and several are tried in order",
        )


def part_name(file: RemoteFile) -> str:
    """The name under which a file comes: its hash, so that any mirror can go on with it."""
    return file.hash or "path-" + hashlib.sha256(file.path.encode()).hexdigest()


def _may_pass(error: TunesmithError | None) -> bool:
    """True for a fault that may be gone at the next try."""
    return isinstance(error, TooSlow) or (
        isinstance(error, NetError) and (error.status is None or error.status in RETRY_STATUS)
    )


def wait_before_retry(error: NetError, number: int, *, alone: bool) -> bool:
    """Wait as long as try `number` and the server ask for; False when another try is of no use."""
    asked = error.retry_after_s
    if not _may_pass(error) or (asked or 0) > (LONGEST_WAIT_S if alone else 5.0):
        return False
    time.sleep(asked if asked is not None else min(8.0, 0.5 * 2.0 ** (number - 1)))
    return True
