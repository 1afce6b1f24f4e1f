from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError, UserError


def test_run_returns_output_and_takes_arguments_literally() -> None:
    done = proc.run([sys.executable, "-c", "import sys; print(sys.argv[1])", "$HOME; `x`"])
    assert done.stdout == "$HOME; `x`\n"


def test_failures_are_named() -> None:
    with pytest.raises(UserError, match="no-such-program-here"):
        proc.run(["no-such-program-here"])
    with pytest.raises(TunesmithError, match=r"code 3:\nlast words"):
        proc.run([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(TunesmithError, match="did not end within"):
        proc.run([sys.executable, "-c", "import time; time.sleep(30)"], timeout_s=0.2)


def test_stop_ends_a_program_that_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = proc.start([sys.executable, "-c", code], log=log)
    while "up" not in log.read_text():
        assert process.poll() is None
    assert proc.stop(process, grace_s=0.2) == -9
    assert proc.stop(process) == -9


def test_run_hands_text_to_stdin_and_none_by_default() -> None:
    assert proc.run(["cat"], input="äöü\n").stdout == "äöü\n"
    assert proc.run(["cat"]).stdout == ""


def test_show_keeps_stdout_free_and_returns_the_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert proc.show(["sh", "-c", "echo seen; exit 3"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "seen" in err


def test_show_can_write_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert proc.show(["echo", "seen"], to_stdout=True) == 0
    assert capfd.readouterr().out == "seen\n"


def test_show_of_an_unknown_program_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no-such-program"):
        proc.show(["no-such-program"])


CHILD = """
import os, socket, sys, time
from tunesmith.core.proc import end_with_parent
end_with_parent(int(sys.argv[1]))
socket.socket(fileno=int(sys.argv[2])).sendall(str(os.getpid()).encode())
time.sleep(600)
"""
PARENT = """
import os, socket, sys, time
from tunesmith.core.proc import start_linked
ours, theirs = socket.socketpair()
parent = os.getpid() if sys.argv[2] == "alive" else 1 << 22
with theirs:
    number = theirs.fileno()
    start_linked([sys.executable, "-c", sys.argv[1], str(parent), str(number)], link=number)
print(ours.recv(100).decode(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("parent", ["alive", "gone"])
def test_a_linked_program_ends_with_its_parent(parent: str) -> None:
    args = [sys.executable, "-c", PARENT, CHILD, parent]
    pipe = subprocess.PIPE
    with subprocess.Popen(args, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        told = process.stdout.readline().strip()
        assert told.isdigit() == (parent == "alive")
        process.kill()
        # The end comes when nobody can write there any more: the linked program has ended too.
        assert process.stderr.read() == ""


def test_a_linked_program_is_in_a_group_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    code = "import os, sys; print(os.getpgrp() == os.getpid(), os.fstat(int(sys.argv[1])).st_ino)"
    with ours, theirs:
        number, inode = theirs.fileno(), os.fstat(theirs.fileno()).st_ino
        assert proc.start_linked([sys.executable, "-c", code, str(number)], link=number).wait() == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"True {inode}\n")


def test_a_session_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    process = proc.start([sys.executable, "-c", code], log=log, session=True)
    while not log.read_text().endswith("\n"):
        assert process.poll() is None
    child = int(log.read_text())
    assert os.getpgid(child) == process.pid != os.getpgid(0)
    process.kill()
    assert proc.end_session(process, grace_s=5.0) == -9
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        pass
    assert proc.end_session(process, grace_s=5.0) == -9
