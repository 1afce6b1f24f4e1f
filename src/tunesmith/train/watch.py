"""A process whose peer has vanished ends too, with a word, even while it waits in a GPU's collective.

`tunesmith train` on one machine, and torchrun, end the others themselves; this is for several machines and
srun, where nobody else would before the collective's own time limit.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from torch._C._distributed_c10d import TCPStore

from tunesmith.core.errors import RunFailed
from tunesmith.train.ranks import Ranks

BEAT_S = 5.0
SILENT_S = 45.0


class Watch:
    """`with Watch(ranks):` while training, in a process group. Every rank counts up a number of its own in
    the store that they met at, and looks at those of the others."""

    def __init__(
        self, ranks: Ranks, *, beat_s: float = BEAT_S, silent_s: float = SILENT_S,
        end: Callable[[int], None] = os._exit,
    ) -> None:  # fmt: skip
        self.ranks, self.beat_s, self.silent_s, self.end = ranks, beat_s, silent_s, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.ranks.size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():  # a thread inside the store would crash the end of the process
            self._thread.join(2 * self.beat_s)

    def _run(self) -> None:
        store: TCPStore | None = None
        is_lost = False
        beats = [0] * self.ranks.size
        heard = [time.monotonic()] * self.ranks.size
        while not self._over.wait(self.beat_s):
            now = beats
            try:
                store = store or self._connect()
                if not is_lost:
                    store.add(f"beat/{self.ranks.rank}", 1)
                    now = [store.add(f"beat/{rank}", 0) for rank in range(self.ranks.size)]
            except (RuntimeError, OSError):
                is_lost = store is not None  # with rank 0 its store is gone for good: nobody is heard
            heard = [
                time.monotonic() if new != old else at for new, old, at in zip(now, beats, heard, strict=True)
            ]
            beats = now
            if time.monotonic() - min(heard) > self.silent_s and not self._over.is_set():
                self._give_up(heard.index(min(heard)))
                return

    def _connect(self) -> TCPStore:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=self.beat_s)
        return TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)

    def _give_up(self, rank: int) -> None:
        sys.stderr.write(
            f"error: rank {self.ranks.rank}: rank {rank} has given no sign of life for {self.silent_s:g} s; "
            "this process ends too\n\nhint: see what that process or its machine says; the same command goes "
            "on from the last checkpoint\n"
        )
        sys.stderr.flush()
        self.end(RunFailed.exit_code)
