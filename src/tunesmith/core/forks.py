"""Jobs side by side in copies of this process, so that what it has loaded need not be loaded again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from tunesmith.core.errors import TunesmithError

T = TypeVar("T")
FORK = get_context("fork")


def side_by_side(jobs: Sequence[Callable[[], T]], processes: int) -> Iterator[tuple[int, T]]:
    """(number of the job, what it returned), each as soon as it is known.

    With fewer than two processes or jobs all is done here, one after the other. The copies end with this
    generator, whatever ends it, and by Ctrl-C. Raises what a job raises, and TunesmithError when a copy was
    killed. To be called before this process has threads that a job needs.
    """
    if min(processes, len(jobs)) < 2:
        yield from ((number, job()) for number, job in enumerate(jobs))
        return
    following = FORK.Value("i", 0)
    pipes = [FORK.Pipe(duplex=False) for _ in range(min(processes, len(jobs)))]
    copies = [FORK.Process(target=_work, args=(jobs, following, end), daemon=True) for _, end in pipes]
    try:
        for copy, (_, end) in zip(copies, pipes, strict=True):
            copy.start()
            end.close()
        yield from _results([start for start, _ in pipes], len(jobs))
    finally:
        for copy in copies:
            if copy.pid is not None:
                copy.terminate()
                copy.join()


def _work(jobs: Sequence[Callable[[], Any]], following: Any, results: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    while os.getppid() == parent:  # else it was killed
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(jobs):
            return
        try:
            results.send((number, jobs[number](), None))
        except Exception as error:
            results.send((number, None, error))


def _results(pipes: list[Connection], count: int) -> Iterator[tuple[int, Any]]:
    while count and pipes:
        ready = wait(pipes)
        for pipe in [pipe for pipe in pipes if pipe in ready]:
            try:
                number, result, error = pipe.recv()
            except EOFError:
                pipes.remove(pipe)
                continue
            if error is not None:
                raise error
            count -= 1
            yield number, result
    if count:
        raise TunesmithError(
            "a process that was started to help was killed", hint="see whether memory ran out: dmesg | tail"
        )
