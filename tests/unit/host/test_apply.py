"""Plans are carried out for real, by pyinfra on this machine, with harmless steps."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tunesmith.host.apply import Session
from tunesmith.host.inventory import LOCAL, Target
from tunesmith.host.steps_types import Copy, Plan, Step, Write


def step(ident: str, *actions: object) -> Step:
    return Step(ident, ident.title(), "because", actions)  # type: ignore[arg-type]


def test_steps_run_in_order_and_words_stay_words(tmp_path: Path) -> None:
    odd = tmp_path / "it's $(touch bad); `id`"
    source = tmp_path / "source file"
    source.write_text("copied")
    plan = Plan(
        (
            step("write", Write(str(tmp_path / "new dir" / "file"), "it's $HOME\n\n", "0600")),
            step("touch", ("touch", str(odd)), Copy(source, str(tmp_path / "target file"))),
            step("env", ("sh", "-c", 'printf %s "$WORD" > "$1"', "sh", str(tmp_path / "env"))),
        ),
        env={"WORD": "it's $X"},
    )
    said: list[str] = []
    with Session([LOCAL]) as session:
        outcome = session.apply({LOCAL.name: plan}, lambda name, s: said.append(f"{name} {s.id}"))[LOCAL.name]
    assert outcome.done == ["write", "touch", "env"] and outcome.failed is None
    assert said == ["@local write", "@local touch", "@local env"]
    written = tmp_path / "new dir" / "file"
    assert written.read_text() == "it's $HOME\n\n" and written.stat().st_mode & 0o777 == 0o600
    assert odd.exists() and (tmp_path / "target file").read_text() == "copied"
    assert (tmp_path / "env").read_text() == "it's $X"
    assert not list(tmp_path.glob("**/*tunesmith-new"))


def test_a_failed_step_stops_and_tells_the_command_and_its_last_lines(tmp_path: Path) -> None:
    script = "for i in $(seq 40); do echo line $i >&2; done; exit 3"
    plan = Plan(
        (
            step("first", ("touch", str(tmp_path / "one"))),
            step("second", ("sh", "-c", script), ("touch", str(tmp_path / "two"))),
            step("third", ("touch", str(tmp_path / "three"))),
        )
    )
    with Session([LOCAL]) as session:
        outcome = session.apply({LOCAL.name: plan}, lambda *_: None)[LOCAL.name]
    assert outcome.done == ["first"]
    assert outcome.failed is not None and outcome.failed.id == "second"
    assert outcome.command == ("sh", "-c", script)
    assert outcome.output.splitlines()[-1] == "line 40" and len(outcome.output.splitlines()) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_answers_have_code_and_both_outputs() -> None:
    with Session([LOCAL]) as session:
        found = session.answer(LOCAL, "echo out; echo err >&2; false")
        assert (found.rc, found.stdout.strip(), found.stderr) == (1, "out", "err")
        assert session.answer(LOCAL, "no-such-program-anywhere").rc == 127
        begin = time.monotonic()
        assert session.answer(LOCAL, "sleep 30", timeout_s=1).rc == 124
        assert time.monotonic() - begin < 10


def test_a_host_that_cannot_be_reached_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    nowhere = Target("ada@127.0.0.1:1", "127.0.0.1", "ada", 1)
    with Session([nowhere, LOCAL]) as session:
        assert list(session.unreachable) == [nowhere.name]
        assert session.reached == [LOCAL]
        plan = Plan((step("touch", ("touch", str(tmp_path / "done"))),))
        assert session.apply({LOCAL.name: plan}, lambda *_: None)[LOCAL.name].done == ["touch"]
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is root already")
def test_root_needs_no_sudo() -> None:
    with Session([LOCAL]) as session:
        session.become_root(LOCAL)
        assert session.prefix(LOCAL) == []
