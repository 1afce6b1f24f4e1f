"""Starts of the command that find their imports done.

Most of what a short training costs is the import of torch, transformers and peft: seconds each time. `start`
therefore forks a process that has done it, once for each test process; so does what `core.proc` starts here
(see `install`), and in a process that was started so: a server's engine, a launcher's workers. What it starts
is a process like any other, with its own pid, pipes, folder and environment, killed and waited for as
subprocess.Popen does it, and it calls the same module. Only what imports do is not shown by it: a command that
is not in WARM starts cold, and so does all where the environment differs in what packages read when they are
imported, or TUNESMITH_TEST_COLD is set.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COLD = {"TUNESMITH_TEST_COLD": "1"}
"""The environment of a start that does its own imports."""
WARM = {"train", "plan", "data", "eval", "export", "chat", "serve", "verify", "bench", "quickstart"}
MODULES = {"tunesmith.cli.engine", "tests.e2e.little_memory", "tests.e2e.forgetful"}
"""What else than `tunesmith` starts so."""
IMPORTS = (
    "tunesmith.workflows.train", "tunesmith.workflows.evaluate", "tunesmith.workflows.export",
    "tunesmith.workflows.serve", "tunesmith.workflows.engine_process", "openai",
    "transformers.models.llama.modeling_llama", "peft",
)  # fmt: skip
READ = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HOME", "XDG_", "PYTHON", "LD_", "OMP_", "MKL_", "CUDA_")
"""Beginnings of the variables that packages read while they are imported."""
READ_LATER = {"TRANSFORMERS_NO_ADVISORY_WARNINGS"}
"""Those of them that are read at each use; `tunesmith serve` sets it for the engines that it starts."""
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
ENVIRONMENT: dict[str, str] = {}
"""What the imports are done with: the environment before any test has changed it (see pytest_configure)."""
NAME = "with-imports"
"""What the system calls the processes that wait to be forked, as /proc/PID/comm shows it."""
_lock = threading.Lock()
_waiting: list[socket.socket] = []
"""The other end of a process with the imports, once there is one."""


def start(*args: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """`python -m tunesmith ARGS`, with `env` laid over this environment; `options` are those of Popen."""
    command = [sys.executable, "-m", "tunesmith", *map(str, args)]
    return popen(command, env=os.environ | (env or {}), text=True, **options)


def popen(command: list[str], *, env: dict[str, str] | None = None, **options: Any) -> Any:
    """subprocess.Popen, of which a command of ours starts with its imports done."""
    is_ours = command[:2] == [sys.executable, "-m"] and (
        command[2] in MODULES or (command[2] == "tunesmith" and not WARM.isdisjoint(command[3:4]))
    )
    whole = dict(os.environ if env is None else env)
    cold = not is_ours or COLD.keys() <= whole.keys()
    kind = subprocess.Popen if cold or _read_by_imports(whole) != _read_by_imports(ENVIRONMENT) else Warm
    return kind(command, env=env, **options)


def install() -> None:
    """From now on what `core.proc` starts in this process starts so too."""
    from tunesmith.core import proc

    proc.subprocess = SimpleNamespace(**(vars(subprocess) | {"Popen": popen}))  # type: ignore[assignment]


def children(pid: int) -> list[int]:
    """What a process has started and has not waited for, the oldest first; not the one that waits for it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            name, _, rest = path.read_text().rpartition(")")
            if int(rest.split()[1]) == pid and name.partition("(")[2] != NAME:
                found.append(int(path.parent.name))
    return sorted(found)


def _read_by_imports(env: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in env.items() if key.startswith(READ) and key not in READ_LATER}


class Warm(subprocess.Popen[Any]):
    """A fork of the process with the imports, and a child of this one."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any,
                       cwd: Any, env: Any, startupinfo: Any, creationflags: Any, shell: Any,
                       *pipes_and_rest: Any) -> None:  # fmt: skip
        ends = pipes_and_rest[:6]
        own = [end if end != -1 else number for number, end in enumerate((ends[0], ends[3], ends[5]))]
        job = {
            "module": args[2],
            "args": args[3:],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "numbers": [0, 1, 2, *pass_fds],
            "group": pipes_and_rest[-1],
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "parent": os.getpid(),
        }
        self.pid = _fork(json.dumps(job).encode(), [*own, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*ends)


def _fork(job: bytes, descriptors: list[int]) -> int:
    """The pid of a new child of this process that does the job with these descriptors."""
    libc = ctypes.CDLL(None)
    with _lock:
        if not _waiting:
            _waiting.append(_new_with_imports())
        # For this moment orphans of our children become our own children: the fork's parent ends at once.
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(_waiting[0], [job], descriptors)
            answer = _waiting[0].recv(100)
        finally:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert answer, "the process with the imports has ended: see its errors above"
    return int(answer)


def _new_with_imports() -> socket.socket:
    """The other end of a new process that does the imports, then forks; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    folder = Path(__file__).resolve().parent.parent
    number = theirs.fileno()
    subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, pass_fds=[number], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


# -- the process with the imports ------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for every job; returns, in the fork alone, what it is to do."""
    while True:
        content, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 16)
        if not content:
            os._exit(0)
        job = json.loads(content)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                connection.detach()
                become(job, descriptors)
                return job
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)
        connection.send(os.read(reader, 100))
        for number in (reader, writer, *descriptors):
            os.close(number)


def become(job: dict[str, Any], descriptors: list[int]) -> None:
    while os.getppid() != job["parent"]:  # as soon as the one between has ended
        time.sleep(0.001)
    # Above all numbers that are wanted, so that none is overwritten before it is copied.
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 1000) for number in descriptors]
    os.closerange(3, 1000)
    for wanted, number in zip(job["numbers"], high, strict=True):
        os.dup2(number, wanted)
    os.closerange(1000, os.sysconf("SC_OPEN_MAX"))
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if job["group"] != -1:
        os.setpgid(0, job["group"])
    signal.pthread_sigmask(signal.SIG_SETMASK, job["blocked"])


def keep_one_more() -> None:
    """A process that waits to be forked for what this one will start."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    be_called(NAME)
    if os.fork() == 0:
        ours.close()
        run(serve(theirs))
    be_called("python")
    theirs.close()
    _waiting[:] = [ours]
    install()


def be_called(name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def run(job: dict[str, Any]) -> None:
    """Be the command, to its end."""
    keep_one_more()
    sys.argv[1:] = job["args"]
    sys.path[0] = str(Path.cwd())  # as 'python -m' does
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    sys.exit()


def main() -> None:
    from tunesmith.core.optional import postpone

    postpone("bitsandbytes", "deepspeed")  # as the command does
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    ENVIRONMENT.update(os.environ)
    be_called(NAME)
    run(serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
