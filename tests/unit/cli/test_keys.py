"""tunesmith keys: what it prints, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.keys import app
from tunesmith.core.errors import UserError
from tunesmith.serve.keys import Keyring

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command on one file; returns what it put on stdout and stderr."""

    def call(*args: str) -> tuple[str, str]:
        app(args=[*args, "--file", str(tmp_path / "keys.json")], standalone_mode=False)
        said = capsys.readouterr()
        return said.out, said.err

    return call


def test_the_key_alone_is_on_stdout(run: Run, tmp_path: Path) -> None:
    out, err = run("add", "alice", "--rate", "60/min")
    assert out.startswith("ts-") and out.count("\n") == 1
    assert "alice" in err and out.strip() not in err
    found = Keyring(tmp_path / "keys.json").find(out.strip().encode())
    assert found is not None and found.rate == "60/min"


def test_json(run: Run) -> None:
    made: dict[str, Any] = json.loads(run("add", "alice", "--tokens-per-day", "9", "--json")[0])
    assert made["name"] == "alice" and made["tokens_per_day"] == 9 and made["key"].startswith("ts-")
    [listed] = json.loads(run("list", "--json")[0])["keys"]
    assert listed["name"] == "alice" and "key" not in listed and "sha256" not in listed
    assert json.loads(run("revoke", "alice", "--json")[0])["revoked"] == "alice"
    assert json.loads(run("list", "--json")[0])["keys"] == []


def test_the_list_for_people(run: Run, tmp_path: Path) -> None:
    run("add", "alice", "--concurrency", "4", "--models", "orders,base", "--tokens-per-day", "100000")
    run("add", "root", "--admin", "--expires", "2099-01-01")
    (tmp_path / "keys.json").chmod(0o644)
    out, err = run("list")
    assert "chmod 600" in err
    alice, root = (line.split() for line in out.splitlines()[1:])
    assert alice == ["alice", "any", "4", "0", "of", "100,000", "never", "orders,base"]
    assert root == ["root", "any", "any", "0", "2099-01-01", "00:00", "all", "yes"]


def test_an_empty_list(run: Run) -> None:
    run("add", "alice")
    assert run("revoke", "alice")[0] == ""
    out, err = run("list")
    assert out == "" and "has no keys" in err


def test_faults_are_user_errors(run: Run) -> None:
    with pytest.raises(UserError, match="there is no such file of keys"):
        run("list")
    run("add", "alice")
    with pytest.raises(UserError, match="'alice' is there already"):
        run("add", "alice")
    with pytest.raises(UserError, match="there is no key 'bob'"):
        run("revoke", "bob")
