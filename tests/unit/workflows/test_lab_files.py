"""Token, password, port and notebook of JupyterLab."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT
from tunesmith.cli.main import COMMANDS
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.workflows.lab_files import (
    address_of,
    check_locked,
    check_port,
    check_token,
    free_port,
    is_loopback,
    password_config,
    put_notebook,
    read_password,
    say_tunnel,
)

NOTEBOOK = ROOT / "examples/quickstart/quickstart.ipynb"


@pytest.mark.parametrize(
    "token", ["", "   ", "\n", "short", "has a space in its middle", "ünïcödé-ünïcödé-ü", "a" * 15]
)
def test_weak_tokens(token: str) -> None:
    with pytest.raises(UserError):
        check_token(token)


def test_good_tokens() -> None:
    check_token(None)
    check_token("a" * 16)


@pytest.mark.parametrize(
    ("bind", "loopback"),
    [
        *[("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)],
        *[("0.0.0.0", False), ("::", False), ("192.168.1.5", False), ("gpu-server", False)],
    ],
)
def test_loopback(bind: str, loopback: bool) -> None:
    assert is_loopback(bind) is loopback


def test_a_password_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("correct horse \n")
    assert read_password("0.0.0.0", file) == "correct horse "
    assert read_password(None, None) is None and read_password("127.0.0.1", None) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe"])
def test_passwords_that_are_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(UserError):
        read_password("0.0.0.0", file)


def test_without_a_terminal_nobody_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/null") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UserError, match="needs a password"):
            read_password("0.0.0.0", None)


def test_the_password_is_jupyters_own_hash() -> None:
    from jupyter_server.auth.security import passwd, passwd_check

    found = json.loads(password_config(passwd("correct horse")))
    assert passwd_check(found["PasswordIdentityProvider"]["hashed_password"], "correct horse")


def test_ports() -> None:
    port = free_port("127.0.0.1")
    check_port("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UserError, match="another program listens there"):
            check_port("127.0.0.1", port)
    with pytest.raises(UserError, match=f"port {port} of 198.51.100.7"):
        check_port("198.51.100.7", port)  # an address that this machine does not have


@pytest.mark.parametrize(
    ("bind", "address"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.2", "10.0.0.2")],
)
def test_where_this_machine_reaches_it(bind: str, address: str) -> None:
    assert address_of(bind) == address


def test_a_server_that_lets_everyone_in_is_not_locked(tmp_path: Path) -> None:
    """Python's own web server answers 200 to everyone."""
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "contents").touch()
    port = free_port("127.0.0.1")
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert server.poll() is None
            with pytest.raises(TunesmithError, match="answers 200 to a request without the token"):
                check_locked(f"http://127.0.0.1:{port}", "token")
        finally:
            server.terminate()
    with pytest.raises(TunesmithError, match="answers None"):
        check_locked(f"http://127.0.0.1:{port}", "token")


def test_the_tunnel_names_the_address_that_ssh_came_in_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 55555 10.0.0.2 22")
    monkeypatch.setenv("USER", "ada")
    say_tunnel(8888)
    assert "ssh -N -L 8888:127.0.0.1:8888 ada@10.0.0.2" in capsys.readouterr().err


# -- the notebook ----------------------------------------------------------------------------------------


def test_a_notebook_that_is_there_is_not_touched(tmp_path: Path) -> None:
    made = put_notebook(tmp_path)
    assert made.read_bytes() == NOTEBOOK.read_bytes()
    made.write_text("changed")
    assert put_notebook(tmp_path).read_text() == "changed"
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.ipynb"]


def cells() -> list[dict[str, Any]]:
    return [dict(cell) for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_holds_no_outputs() -> None:
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())
    assert NOTEBOOK.stat().st_size < 20_000


def test_the_notebook_calls_commands_that_exist() -> None:
    source = "\n".join(str(cell["source"]) for cell in cells())
    ast.parse(source)
    called = set(re.findall(r'tunesmith\("(\w+)"', source))
    assert called == {"data", "eval", "train"} and called <= set(COMMANDS)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tiny: Path, tmp_path: Path) -> None:
    """Executed by a real kernel, on a tiny model and a few rows in place of the settings in its first cell."""
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.get("id") == "settings")
    settings.source = (
        f'MODEL = "{tiny}"\nROWS, TEST_ROWS = 24, 6\nSETTINGS = ["--set", "train.max_steps=3"]\n'
    )
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "⟦" in printed["show-rows"]
    assert len(re.findall(r"^step +\d+ +loss \d", printed["loss"], re.MULTILINE)) == 3
    assert printed["ask"].count("->") == 3 and "answers at http://127.0.0.1" in printed["ask"]
    assert (tmp_path / "quickstart/runs/quickstart/events.jsonl").is_file()
