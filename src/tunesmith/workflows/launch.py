"""Several processes for one training: start them, pass signals on, end them all when one dies.

Each worker is the same `tunesmith train` with its place in the environment, as torchrun would set it. Rank 0
has the terminal; what the others print is kept, and shown when they fail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tunesmith.core import errors
from tunesmith.core.errors import Interrupted, RunFailed, TunesmithError, UserError
from tunesmith.core.net import free_port
from tunesmith.core.proc import LAUNCHER, Process, end_with_parent, spawn
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.train.ranks import ranks_from

PORT = 29500
# After the first failure the others have this long to tell their own before they are killed.
GRACE_S = 3.0
POLL_S = 0.05
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
SHOWN_LINES = 15


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines, of which this is number `node`; rendezvous: HOST:PORT of machine 0."""

    nodes: int = 1
    node: int = 0
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.node < self.nodes:
            raise UserError(
                f"--node-rank: {self.node} with --nnodes {self.nodes}", hint="nodes are numbered from 0"
            )
        if self.nodes > 1 and self.rendezvous is None:
            raise UserError(
                f"--nnodes {self.nodes} needs --rendezvous",
                hint="give every machine the same: --rendezvous HOST_OF_NODE_0:29500",
            )

    def address(self) -> tuple[str, int]:
        """(host, port) where the ranks meet."""
        if self.rendezvous is None:
            return "127.0.0.1", free_port()
        host, _, port = self.rendezvous.rpartition(":")
        if not host:
            return port, PORT
        if not port.isdigit():
            raise UserError(f"--rendezvous: '{self.rendezvous}' is not HOST:PORT", hint="such as node0:29500")
        return host, int(port)


@dataclass(frozen=True)
class Outcome:
    """How the workers ended. value: what rank 0 printed for `--json`; code: 0, or of an error that rank 0
    has already told."""

    value: dict[str, Any]
    code: int = 0


def processes_to_start(recipe_path: Path, overrides: list[str], cluster: Cluster) -> int:
    """Workers that this machine needs; 0 when the training runs in this process."""
    if ranks_from(os.environ).size > 1 or "RANK" in os.environ:
        if cluster.nodes > 1:
            raise UserError(
                "--nnodes under torchrun or srun", hint="leave it out: the processes are there already"
            )
        return 0
    count = processes_here(load_recipe(recipe_path, overrides))
    return count if count * cluster.nodes > 1 else 0


def processes_here(recipe: Recipe) -> int:
    """hardware.processes; auto: one a GPU when it computes on GPUs and the engine is not `single`."""
    if recipe.hardware.processes != "auto":
        return recipe.hardware.processes
    if recipe.hardware.device == "cpu" or recipe.parallel.engine == "single":
        return 1
    import torch  # slow to load, and not needed to start workers

    return max(1, torch.cuda.device_count())


def launch(
    recipe_path: Path, overrides: Sequence[str], *, fresh: bool, processes: int, cluster: Cluster
) -> Outcome:
    """Train in `processes` workers on this machine, and wait for their end.

    Raises the error of the worker that failed first; RunFailed when one was killed; Interrupted.
    """
    args = [sys.executable, "-m", "tunesmith", "train", str(recipe_path), "--json"]
    args += [part for override in overrides for part in ("--set", override)] + ["--fresh"] * fresh
    with Crew(args, processes, cluster) as crew:
        return crew.wait()


@dataclass
class Worker:
    rank: int
    process: Process
    out: IO[bytes]
    log: IO[bytes] | None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def failed(self) -> bool:
        return self.code is not None and self.code != 0 and self.code not in STOPPED

    def size_of_output(self) -> int:
        """Bytes on its stdout so far."""
        return os.fstat(self.out.fileno()).st_size

    def printed(self) -> dict[str, Any]:
        """The object on its stdout; empty when it ended without one."""
        self.out.seek(0)
        lines = self.out.read().decode(errors="replace").splitlines()
        try:
            found = json.loads(lines[-1]) if lines else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def last_lines(self) -> str:
        if self.log is None:
            return ""
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-SHOWN_LINES:])


@dataclass
class Crew:
    """The workers of this machine, alive as long as the `with` block."""

    args: list[str]
    processes: int
    cluster: Cluster
    workers: list[Worker] = field(default_factory=list)
    asked: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Crew:
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        host, port = self.cluster.address()
        common = {"MASTER_ADDR": host, "MASTER_PORT": str(port), LAUNCHER: str(os.getpid())}
        try:
            # Ctrl-C goes to every process of the terminal, but is for this one to pass on: once, not twice.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for local in range(self.processes):
                self.workers.append(self._start(local, common))
        except BaseException:
            self.__exit__()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            if worker.code is None:
                worker.process.kill()
            worker.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _start(self, local: int, common: Mapping[str, str]) -> Worker:
        rank = self.cluster.node * self.processes + local
        env = os.environ | dict(common)
        env |= {"RANK": str(rank), "WORLD_SIZE": str(self.cluster.nodes * self.processes)}
        env |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(self.processes)}
        if self.cluster.nodes == 1:
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Files without a name: nothing is left of them, whatever kills this process.
        out, log = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        process = spawn(self.args, out=out, errors=log if local else None, env=env)
        return Worker(rank, process, out, log if local else None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None and number == signal.SIGINT
        self.asked = self.asked or number
        for worker in self.workers:
            if worker.code is None:
                worker.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def wait(self) -> Outcome:
        """Until all have ended: by themselves, or killed a moment after the first that failed."""
        first: Worker | None = None
        while any(worker.code is None for worker in self.workers):
            failed = [worker for worker in self.workers if worker.failed()]
            if first is None and failed:
                first, deadline = failed[0], time.monotonic() + GRACE_S
            if first is not None and time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        first = first or next((worker for worker in self.workers if worker.failed()), None)
        return self._outcome(first)

    def _outcome(self, first: Worker | None) -> Outcome:
        head = self.workers[0]
        if self.asked and (first is None or (first.code or 0) < 0):
            if head.code in STOPPED:
                return Outcome(head.printed(), 128 + self.asked)
            raise Interrupted(self.asked, "stopped before a step was done; nothing new was saved")
        if first is None:
            return Outcome(head.printed(), head.code or 0)
        if head.log is None and head.failed() and "error" in head.printed() and (first.code or 0) > 0:
            return Outcome(head.printed(), head.code or 1)
        raise _error_of(first)


def _error_of(worker: Worker) -> TunesmithError:
    """The error of a worker whose own words went nowhere."""
    told = worker.printed().get("error")
    if isinstance(told, dict):
        return as_error(told, f"rank {worker.rank}")
    lines = worker.last_lines()
    what, hint = how_it_ended(worker.code or 0, "the same command goes on from the last checkpoint")
    return RunFailed(
        f"rank {worker.rank} (process {worker.process.pid}) {what}; the others were ended"
        + (f"; its last lines:\n{lines}" if lines else ""),
        hint,
    )


def as_error(told: Mapping[str, Any], who: str) -> TunesmithError:
    """The error that `who` has printed with `--json`, as one of its kind."""
    kind = getattr(errors, str(told["type"]), TunesmithError)
    cls = kind if kind in (UserError, RunFailed, errors.PlanRefused) else TunesmithError
    found: TunesmithError = cls(f"{who}: {told['what']}", told["hint"])
    return found


def how_it_ended(code: int, hint: str) -> tuple[str, str]:
    """(what, hint) of a process that ended with `code`: negative for a signal."""
    what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    kernel = "the kernel kills when memory runs out ('dmesg' tells); " if code == -signal.SIGKILL else ""
    return what, kernel + hint


def enter_worker(env: Mapping[str, str]) -> None:
    """In a worker: end with the process that started it, however that ends."""
    if LAUNCHER in env:
        end_with_parent(int(env[LAUNCHER]))


def wait_for_the_end(env: Mapping[str, str], sleep: Callable[[float], None] = time.sleep) -> None:
    """In a worker whose peers are gone: the launcher knows which one died first, and ends this one."""
    if LAUNCHER in env:
        sleep(60)
