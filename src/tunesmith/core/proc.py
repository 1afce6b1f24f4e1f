"""The only place that starts other programs. Commands are lists of arguments, never shell text."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from tunesmith.core.errors import TunesmithError, UserError

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
LAUNCHER = "TUNESMITH_LAUNCHER"  # variable of a training's process: pid of the one that started it

Process = subprocess.Popen[bytes]


def run(
    args: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    check: bool = True,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its output as text. `input`: text for its stdin, else none.

    Raises UserError when the program is not installed, TunesmithError when it fails (with the last
    lines of its error output) or takes longer than `timeout_s`.
    """
    _check_installed(args[0])
    try:
        done = subprocess.run(
            list(args),
            cwd=cwd,
            env=env,
            timeout=timeout_s,
            text=True,
            errors="replace",
            capture_output=True,
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        )
    except subprocess.TimeoutExpired:
        raise TunesmithError(f"'{args[0]}' did not end within {timeout_s:g} s") from None
    if check and done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise TunesmithError(f"'{' '.join(args[:4])}' ended with code {done.returncode}:\n{tail}")
    return done


def show(
    args: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    to_stdout: bool = False,
) -> int:
    """Run a program on this terminal, with its keyboard, and return its exit code.

    Its output goes to stderr unless `to_stdout`: stdout belongs to `--json`. Raises UserError when the
    program is not installed.
    """
    _check_installed(args[0])
    return subprocess.run(list(args), cwd=cwd, env=env, stdout=None if to_stdout else sys.stderr).returncode


def start(
    args: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    session: bool = False,
) -> Process:
    """Start a program in the background; its output goes to the file `log`.

    session: as the first of a session of its own, which Ctrl-C on this terminal does not reach and
    `end_session` ends whole.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            list(args),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=session,
        )


def spawn(
    args: Sequence[str], *, out: IO[bytes], errors: IO[bytes] | None, env: Mapping[str, str]
) -> Process:
    """Start a program that writes into open files; its errors on this terminal without `errors`."""
    return subprocess.Popen(list(args), env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)


def start_linked(args: Sequence[str], *, link: int, env: Mapping[str, str] | None = None) -> Process:
    """Start a program that has the descriptor `link` too; it writes to our stderr and ends when told to.

    In a process group of its own: Ctrl-C on this terminal reaches us alone.
    """
    return subprocess.Popen(
        list(args),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=(link,),
        process_group=0,
    )


def start_piped(args: Sequence[str]) -> Process:
    """Start a program whose stdin, stdout and stderr are pipes of ours; Ctrl-C here does not reach it.

    Raises UserError when the program is not installed.
    """
    _check_installed(args[0])
    pipe = subprocess.PIPE
    return subprocess.Popen(
        list(args), bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends, however that happens.

    parent: its process; when that has ended already, so does this one.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def stop(process: Process, *, grace_s: float = 20.0) -> int:
    """End a program that `start` began: SIGTERM, then SIGKILL after `grace_s`. Returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def end_session(process: Process, *, grace_s: float) -> int:
    """`stop`, then end whatever the program has left running in its session. Returns its exit code."""
    code = stop(process, grace_s=grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return code


def _check_installed(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"the program '{program}' is not on this machine", hint=f"install {program}")
