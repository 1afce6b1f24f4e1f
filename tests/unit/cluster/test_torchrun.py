"""torchrun on a host: it tells what failed, and ends with the one who started it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import children
from tunesmith.cluster.torchrun import BEAT, END, interface_toward, surroundings
from tunesmith.core.proc import LAUNCHER

SLEEPER = """
import os, signal, sys, time
from tunesmith.workflows.launch import enter_worker
enter_worker(os.environ)
signal.signal(signal.SIGTERM, {on_sigterm})
print("ready", flush=True)
time.sleep(600)
"""


def start(folder: Path, program: str) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "program.py").write_text(program)
    args = ["--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(port), "program.py"]
    command = [sys.executable, "-m", "tunesmith.cluster.torchrun", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the training outlived torchrun"
        time.sleep(0.02)


def test_the_process_that_was_killed_is_told_and_nothing_else(tmp_path: Path) -> None:
    process = start(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    out, errors = process.communicate(timeout=120)
    ended = json.loads(out)["ended"]
    assert (ended["rank"], ended["code"]) == (0, -signal.SIGKILL) and ended["pid"] != process.pid
    assert (process.returncode, errors) == (128 + signal.SIGKILL, b"")


def test_told_to_end_it_lets_the_training_save(tmp_path: Path) -> None:
    saves = "lambda *_: (time.sleep(0.5), print('saved', flush=True), sys.exit(143))"
    with start(tmp_path, SLEEPER.format(on_sigterm=saves)) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(BEAT)
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(END)
        assert process.stdout.readline() == b"saved\n"
        assert json.loads(process.stdout.readline()) == {"ended": {"code": 143}}
        assert process.wait(60) == 143


def test_it_ends_with_the_one_who_started_it_and_by_force(tmp_path: Path) -> None:
    """The training does not heed SIGTERM, as one that waits for a host that is gone."""
    with start(tmp_path, SLEEPER.format(on_sigterm="signal.SIG_IGN")) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(BEAT)
        assert process.stdout.readline() == b"ready\n"
        (trained,) = children(process.pid)
        process.stdin.close()
        assert process.wait(60) == 143
        wait_until_gone(trained)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_an_interface_that_no_other_host_reaches_is_not_taken(host: str) -> None:
    assert interface_toward(host) is None


def test_what_is_set_already_is_kept() -> None:
    own = {LAUNCHER: str(os.getpid())}
    given = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "GLOO_SOCKET_IFNAME": "eth7", LAUNCHER: "1"}
    assert surroundings("127.0.0.1", 1, given) == own | {"NCCL_SOCKET_IFNAME": "lo"}
    assert surroundings("127.0.0.1", 2, {}) == own | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}
