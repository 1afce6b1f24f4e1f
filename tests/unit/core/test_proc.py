from __future__ import annotations

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
