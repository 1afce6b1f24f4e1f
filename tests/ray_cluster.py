"""A real Ray cluster on this machine: its nodes have processors, workers and a raylet each of their own.

    with ray_cluster(folder) as cluster:
        cli("train", recipe, "--cluster", cluster.address, "--workers", "2")

All ports are free ones, so that several clusters run side by side. Files that use it have the marks `marks()`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = "127.0.0.1"
LOCK = Path("/tmp/ray-ts.lock")  # one node starts at a time: see `_start`
STORE_BYTES = 100_000_000  # of objects, on each node
START_S = 120
NOT_WORKERS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
HEAD = ("port", "ray-client-server-port", "dashboard-port")
AGENTS = (
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
    "metrics-export-port",
)  # fmt: skip
TRIES = 5


def marks(timeout_s: int) -> list[pytest.MarkDecorator]:
    """Of a file of tests on a cluster: by --whole, since a raylet does not start beside much other work, and
    one cluster at a time, since each takes all of a small machine."""
    mark = pytest.mark
    return [mark.slow, mark.hosts, mark.whole, mark.timeout(timeout_s), mark.xdist_group("ray")]


class Node(NamedTuple):
    """The session that its processes are in, and its ports."""

    session: int
    ports: dict[str, int]


@dataclass
class RayCluster:
    """Ray at `address` (HOST:PORT, for `--cluster`), also `client` (ray://HOST:PORT) and, if asked for, its
    `dashboard` (http://HOST:PORT).

    sessions: of each node that lives, the head first, the id of the session that all its processes are in.
    """

    address: str
    client: str
    dashboard: str | None
    env: dict[str, str]
    temp: Path
    logs: Path
    cpus: int
    sessions: list[int] = field(default_factory=list)

    @property
    def node_pids(self) -> list[int]:
        """The process of each node that stands for it, the head first: its raylet."""
        return [next(pid for pid in pids_of(session) if is_raylet(pid)) for session in self.sessions]

    def workers(self, node: int | None = None) -> list[int]:
        """The processes that compute, of all nodes or of one: those that have a task, or an actor."""
        sessions = self.sessions if node is None else [self.sessions[node]]
        return [pid for session in sessions for pid in pids_of(session) if is_busy(title(pid))]

    def add_node(self, cpus: int | None = None) -> None:
        # One log monitor reads the files of all nodes of a machine.
        args = ["--address", self.address, "--include-log-monitor", "false"]
        node = _start(args, self.cpus if cpus is None else cpus, AGENTS, self.env, self.logs)
        self.sessions.append(node.session)

    def remove_node(self, node: int = -1) -> None:
        """Kill all of a node at once, as a machine without power; not the head, number 0."""
        assert len(self.sessions) > 1
        end_session(self.sessions.pop(node))


@contextmanager
def ray_cluster(folder: Path, nodes: int = 2, cpus: int = 2, dashboard: bool = False) -> Iterator[RayCluster]:
    """`nodes` nodes with `cpus` processors each; all they run is killed at the end. folder: for logs."""
    pytest.importorskip("ray")
    _sweep()
    # The paths of Ray's sockets below it have at most 107 characters.
    temp = Path(tempfile.mkdtemp(prefix=f"ray-ts{os.getpid()}-", dir="/tmp"))
    sessions: list[int] = []
    try:
        cluster = _start_head(temp, folder, cpus, dashboard, sessions)
        for _ in range(nodes - 1):
            cluster.add_node()
        yield cluster
    finally:
        _end_all_of(temp)
        for session in sessions:
            end_session(session)
        shutil.rmtree(temp, ignore_errors=True)


def _start_head(temp: Path, folder: Path, cpus: int, dashboard: bool, sessions: list[int]) -> RayCluster:
    env = _env(temp, folder)
    web = ["--include-dashboard", str(dashboard).lower(), "--dashboard-host", HERE]
    fixed = ["--head", "--temp-dir", str(temp), "--no-monitor", *web]
    node = _start(fixed, cpus, HEAD + AGENTS, env, folder)
    sessions.append(node.session)
    address = (temp / "ray_current_cluster").read_text().strip()
    host = address.rpartition(":")[0]
    client = f"ray://{host}:{node.ports['ray-client-server-port']}"
    url = f"http://{HERE}:{node.ports['dashboard-port']}" if dashboard else None
    return RayCluster(address, client, url, env, temp, folder, cpus, sessions)


def _env(temp: Path, folder: Path) -> dict[str, str]:
    """Of all that a node starts; the workers of a training among it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = [str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
    code = [str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH", "")]
    return env | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join(filter(None, code)),
        "TUNESMITH_CACHE": str(folder / "cache"),
        "RAY_TMPDIR": str(temp),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_agent_register_timeout_ms": str(START_S * 1000),
        "RAY_raylet_start_wait_time_s": str(START_S // 2),
    }


def _ports(names: Sequence[str]) -> dict[str, int]:
    # 0: any free port. Not for agents, which would have to tell which.
    anywhere = ("object-manager-port", "node-manager-port", "min-worker-port", "max-worker-port")
    return dict.fromkeys(anywhere, 0) | dict(zip(names, free_ports(len(names)), strict=True))


def free_ports(count: int) -> list[int]:
    """Different TCP ports of this machine that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class NodeFailed(AssertionError):
    """A node that did not start; with what it said."""


def _start(fixed: list[str], cpus: int, names: Sequence[str], env: dict[str, str], folder: Path) -> Node:
    """Start a node; returns as soon as it is part of the cluster.

    Again with other ports where it fails: a port that was free may be taken, and a raylet ends itself when its
    agent has not come up within 15 s, which it may not on a machine with much to do.
    """
    size = ["--num-cpus", str(cpus), "--num-gpus", "0", "--object-store-memory", str(STORE_BYTES)]
    for left in reversed(range(TRIES)):
        ports = _ports(names)
        given = [part for name, port in ports.items() for part in (f"--{name}", str(port))]
        try:
            return Node(_try([*fixed, "--disable-usage-stats", *size, *given], env, folder), ports)
        except NodeFailed:
            if not left:
                raise
    raise AssertionError("TRIES is 0")


def _try(args: list[str], env: dict[str, str], folder: Path) -> int:
    """The session of the node that `ray start` with these arguments has started."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *args]
    with LOCK.open("w") as lock, tempfile.TemporaryFile() as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = _started(process)
        finally:
            if process.returncode != 0:
                end_session(process.pid)
                process.wait()
        if code == 0:
            return process.pid
        log.seek(0)
        raise NodeFailed(f"ray start ended with code {code}:\n{log.read().decode(errors='replace')}")


def _started(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of `ray start`; None when it will not come: its raylet is gone, or time is up."""
    end, seen = time.monotonic() + START_S, False
    while process.poll() is None and time.monotonic() < end:
        there = any(map(is_raylet, pids_of(process.pid)))
        if seen and not there:
            return None
        seen = there
        time.sleep(0.5)
    return process.returncode


# -- processes -------------------------------------------------------------------------------------------------


def pids_of(session: int) -> list[int]:
    """The processes of a session; not those that have ended and are not waited for."""
    return [pid for pid, (state, found) in _all_processes().items() if found == session and state not in "ZX"]


def end_session(session: int) -> None:
    """Kill all processes of a session, and wait until they are gone."""
    end = time.monotonic() + 60
    while alive := pids_of(session):
        assert time.monotonic() < end, f"not killed: {alive}"
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def title(pid: int) -> str:
    """What a process calls itself: its arguments."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:  # it has ended
        return ""


def is_raylet(pid: int) -> bool:
    return title(pid).partition(" ")[0].endswith("/raylet")


def is_busy(name: str) -> bool:
    """Whether it is the title of a worker that has something to do: ray::Name.method, ray::task."""
    return name.startswith("ray::") and not name.startswith(NOT_WORKERS)


def _all_processes() -> dict[int, tuple[str, int]]:
    """(state, session) of each process of this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            found[int(path.parent.name)] = fields[0], int(fields[3])
    return found


def _end_all_of(temp: Path) -> None:
    """End every node whose files are in this folder, whoever started it."""
    processes = _all_processes()
    for session in {processes[pid][1] for pid in processes if f"{temp}/" in title(pid)} - {os.getsid(0)}:
        end_session(session)


def _sweep() -> None:
    """End the clusters of test processes that were killed."""
    for temp in Path("/tmp").glob("ray-ts*-*"):
        made = re.match(r"ray-ts(\d+)-", temp.name)
        if made and not Path(f"/proc/{made[1]}").exists():
            _end_all_of(temp)
            shutil.rmtree(temp, ignore_errors=True)
