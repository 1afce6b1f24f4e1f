"""Starts of the command that find their imports done.

Most of what a short training costs is the import of torch, transformers and peft: seconds each time. `start`
therefore forks a process that has done it, once for each test process. What it starts is a process like any
other, with its own pid, pipes, folder and environment, killed and waited for as subprocess.Popen does it, and
it calls the same module. Only what imports do is not shown by it: a command that is not in WARM starts cold,
and so does all where the environment differs in what packages read when they are imported, or
TUNESMITH_TEST_COLD is set.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

COLD = {"TUNESMITH_TEST_COLD": "1"}
"""The environment of a start that does its own imports."""
WARM = {"train", "data", "eval", "export", "chat", "serve", "verify"}
IMPORTS = (
    "tunesmith.workflows.train", "tunesmith.workflows.evaluate", "tunesmith.workflows.export",
    "tunesmith.workflows.serve", "transformers.models.llama.modeling_llama", "peft",
)  # fmt: skip
READ = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HOME", "XDG_", "PYTHON", "LD_", "OMP_", "MKL_", "CUDA_")
"""Beginnings of the variables that packages read while they are imported."""
PR_SET_CHILD_SUBREAPER = 36
ENVIRONMENT: dict[str, str] = {}
"""What the imports are done with: the environment before any test has changed it (see pytest_configure)."""


def start(*args: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """`python -m tunesmith ARGS`, with `env` laid over this environment; `options` are those of Popen."""
    command = [sys.executable, "-m", "tunesmith", *map(str, args)]
    whole = os.environ | (env or {})
    cold = COLD.keys() <= whole.keys() or not WARM.intersection(command[3:4])
    if cold or _read_by_imports(whole) != _read_by_imports(ENVIRONMENT):
        return subprocess.Popen(command, env=whole, text=True, **options)
    return Warm(command, env=whole, text=True, **options)


def _read_by_imports(env: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in env.items() if key.startswith(READ)}


class Warm(subprocess.Popen[str]):
    """A fork of the process with the imports, and a child of this one."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any,
                       cwd: Any, env: Any, startupinfo: Any, creationflags: Any, shell: Any,
                       *pipes_and_rest: Any) -> None:  # fmt: skip
        ends = pipes_and_rest[:6]
        own = [end if end != -1 else number for number, end in enumerate((ends[0], ends[3], ends[5]))]
        job = {"args": args[3:], "cwd": str(cwd or Path.cwd()), "env": env}
        self.pid = _fork(json.dumps(job).encode(), own)
        self._child_created = True
        self._close_pipe_fds(*ends)


def _fork(job: bytes, descriptors: list[int]) -> int:
    """The pid of a new child of this process that does the job with these as its 0, 1 and 2."""
    with_imports = _with_imports()
    libc = ctypes.CDLL(None)
    # For this moment orphans of our children become our own children: the fork's parent ends at once.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(with_imports, [job], descriptors)
        answer = with_imports.recv(100)
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert answer, "the process with the imports has ended: see its errors above"
    return int(answer)


@cache
def _with_imports() -> socket.socket:
    """The other end of a new process that does the imports, then forks; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    folder = Path(__file__).resolve().parent.parent
    number = theirs.fileno()
    subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, pass_fds=[number], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


# -- the process with the imports ------------------------------------------------------------------------


def serve(connection: socket.socket) -> list[str]:
    """Fork for every job; returns, in the fork alone, the command's arguments."""
    while True:
        job, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 3)
        if not job:
            os._exit(0)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                return become(json.loads(job), descriptors)
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)
        connection.send(os.read(reader, 100))
        for number in (reader, writer, *descriptors):
            os.close(number)


def become(job: dict[str, Any], descriptors: list[int]) -> list[str]:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    return list(job["args"])


def main() -> None:
    from tunesmith.core.optional import postpone

    postpone("bitsandbytes", "deepspeed")  # as the command does
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = str(Path.cwd())  # as 'python -m' does
    runpy.run_module("tunesmith", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
