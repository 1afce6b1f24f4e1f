"""What is made of the hosts' output and ends; programs of this machine stand where ssh would."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import pytest

from tunesmith.core.errors import Interrupted, PlanRefused, RunFailed, UserError
from tunesmith.workflows.train_cluster import HINT, HostCrew, _differing, hosts_file

WAITS = "import sys; sys.stdin.buffer.read(); sys.exit(143)"


def tells(code: int, **value: Any) -> str:
    """A program that prints an object, and the same as words, as the command does."""
    return (
        f"import sys; sys.stderr.write('step 1\\nerror: in its words\\n\\nhint: in its words\\n'); "
        f"print({json.dumps(value)!r}); sys.exit({code})"
    )


def crew(**programs: str) -> HostCrew:
    return HostCrew({name: [sys.executable, "-c", text] for name, text in programs.items()})


def outcome(**programs: str) -> dict[str, Any]:
    with crew(**programs) as hosts:
        return hosts.wait()


def test_the_value_is_that_of_the_first_host_and_lines_have_their_hosts_name(
    capfd: pytest.CaptureFixture[str],
) -> None:
    done = "import sys; print('{\"run\": \"/x\"}'); sys.stderr.write('said here\\n'); print('plain')"
    assert outcome(a=done, b="import sys; sys.stderr.write('said there\\n')") == {"run": "/x"}
    out, errors = capfd.readouterr()
    assert sorted(errors.splitlines()) == ["a | plain", "a | said here", "b | said there"] and out == ""


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (PlanRefused, 3), (RunFailed, 4)])
def test_an_error_is_raised_as_its_own_and_shown_once(
    kind: type[Exception], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    error = {"type": kind.__name__, "what": "no such file", "hint": "find it"}
    with pytest.raises(kind, match=r"^a: no such file\n\nhint: find it$"):
        outcome(a=tells(code, error=error), b=WAITS)
    assert capfd.readouterr().err == "a | step 1\n"


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            tells(137, ended={"rank": 3, "pid": 77, "code": -9}),
            r"b: rank 3 \(process 77\) was killed by SIGKILL; the others were ended; its last lines:\nstep 1\n",
        ),
        (tells(1, ended={"what": "port taken"}), "b: torchrun could not begin: port taken"),
        ("import sys; sys.exit(255)", "b: its connection broke, or gave no answer for 15 s; the others were ended"),
        ("import sys; sys.exit(7)", "b: torchrun ended with code 7"),
        (tells(143, ended={"code": 143}), "b: torchrun ended with code 143"),
    ],
)  # fmt: skip
def test_a_host_that_fails_ends_the_others_with_its_reason(program: str, told: str) -> None:
    with pytest.raises(RunFailed, match=told) as caught:
        outcome(a=WAITS, b=program)
    assert str(caught.value.hint).endswith(HINT)


def test_ctrl_c_is_passed_on_and_what_was_saved_is_told() -> None:
    error = {"type": "Interrupted", "what": "stopped after step 6", "hint": "go on with: CMD"}
    saves = (
        "import sys\nprint('{}', flush=True)\nwhile (got := sys.stdin.buffer.read(1)) == b'.': pass\n"
        f"assert got == b't'\nprint({json.dumps({'error': error})!r})\nsys.exit(143)"
    )
    with pytest.raises(Interrupted, match="stopped after step 6") as caught, crew(a=saves, b=WAITS) as hosts:
        while not hosts.hosts[0].told:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        hosts.hosts[1].let_go()
        hosts.wait()
    assert (caught.value.exit_code, caught.value.hint) == (130, "go on with: CMD")


def test_versions_that_differ_are_named_for_each_host() -> None:
    first = {"torch": "2.6", "numpy": "2.0"}
    found = _differing([("a", first), ("b", first), ("c", {"torch": "2.5"})])
    assert [fault.what for fault in found] == [
        "c: has other versions than a: numpy missing, not 2.0, torch 2.5, not 2.6"
    ]


def test_what_cluster_names() -> None:
    assert [hosts_file(name) for name in ("auto", "ray://h:10001")] == [None, None]
    assert str(hosts_file("cluster.yaml")) == "cluster.yaml"
