"""The ssh line of a host."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tunesmith.cluster.inventory import Host
from tunesmith.cluster.ssh import LOST, run_on, ssh_command


def test_the_line_quotes_the_command_and_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "id").touch()
    host = Host(host="gpu1", user="ada", port=2222, key=str(tmp_path / "id"))
    command = ["env", "A=x y", "python", "it's"]
    line = ssh_command(host, command)
    assert line[:2] == ["ssh", "-T"] and "BatchMode=yes" in line
    assert line[-3:] == ["--", "gpu1", shlex.join(command)] and shlex.split(line[-1]) == command
    for option, value in (("-p", "2222"), ("-l", "ada"), ("-i", str(tmp_path / "id"))):
        assert line[line.index(option) + 1] == value
    assert f"UserKnownHostsFile={tmp_path}/.ssh/known_hosts" in line and (tmp_path / ".ssh").is_dir()
    assert not {"-l", "-i"} & set(ssh_command(Host(host="gpu1"), ["true"]))


def test_a_host_that_is_not_there_is_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (reply,) = run_on([Host(host="127.0.0.1", port=1)], ["true"])
    assert not reply.ok and reply.code == LOST and "Connection refused" in reply.reason
