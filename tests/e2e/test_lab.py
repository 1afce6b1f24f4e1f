"""`tunesmith lab --here`: a real JupyterLab of this environment, locked by its token, ended by a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Cli

Lab = tuple[subprocess.Popen[str], dict[str, Any]]


@contextmanager
def lab(folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Lab]:
    """A JupyterLab on a free port: its process, and the object that it printed once it answered."""
    command = [sys.executable, "-m", "tunesmith", "lab", "--here", "--port", "0", "--json", *options]
    settings = os.environ | {"HOME": str(folder), "JUPYTER_TOKEN": ""} | (env or {})
    with (folder / "stderr").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "stderr").read_text()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_it_answers_with_its_token_alone_and_ends_on_sigterm(tmp_path: Path) -> None:
    with lab(tmp_path) as (process, found):
        base = f"http://127.0.0.1:{found['port']}"
        token_file = Path(found["token_file"])
        token = token_file.read_text()
        assert len(token) >= 40 and token_file.stat().st_mode & 0o777 == 0o600
        assert found["url"] == f"{base}/lab/tree/notebooks/quickstart.ipynb?token={token}"

        with httpx.Client(base_url=base) as stranger:
            assert stranger.get("/lab").status_code == 302  # to the page that asks for the token
            for path in ("/api/contents", "/api/kernels", "/api/contents?token=", "/api/contents?token=x"):
                assert stranger.get(path).status_code == 403, path
        with httpx.Client(base_url=base) as owner:
            assert owner.get(found["url"]).status_code == 200
            notebook = owner.get("/api/contents/notebooks/quickstart.ipynb").json()
            assert notebook["content"]["cells"][0]["cell_type"] == "markdown"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{own_address()}:{found['port']}/api", trust_env=False)

        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not is_alive(found["pid"]) and not token_file.exists()
        log = (token_file.parent / "jupyter.log").read_text() + (tmp_path / "stderr").read_text()
        assert token not in log and "ssh -N -L" in log


def own_address() -> str:
    """An address of this machine other than 127.0.0.1; one that nothing listens on where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return "127.0.0.9"
        return str(probe.getsockname()[0])


def test_ctrl_c_ends_it_and_a_changed_notebook_and_a_password_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    notebook = tmp_path / "notebooks" / "quickstart.ipynb"
    notebook.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (tmp_path / "password").write_text("correct horse battery\n")
    token = "a-token-of-my-own-choice"
    options = ("--token", token, "--bind", "0.0.0.0", "--password-file", str(tmp_path / "password"))
    with lab(tmp_path, *options) as (process, found):
        base = f"http://127.0.0.1:{found['port']}"
        assert found["url"].startswith(base) and found["url"].endswith(token)
        assert httpx.get(f"{base}/api/contents", params={"token": token}).status_code == 200
        assert httpx.get(f"{base}/api/contents").status_code == 403
        for password, status in (("wrong password", 401), ("correct horse battery", 302)):
            with httpx.Client(base_url=base) as client:
                client.get("/login")
                form = {"password": password, "_xsrf": client.cookies["_xsrf"]}
                assert client.post("/login", data=form).status_code == status, password
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert not is_alive(found["pid"])
    assert json.loads(notebook.read_text())["cells"] == []
    assert not list(tmp_path.rglob("password.json"))


def test_a_configuration_that_switches_the_token_off_is_found(tmp_path: Path) -> None:
    """As the page with copied commands says: c.ServerApp.token = ''."""
    (tmp_path / ".jupyter").mkdir()
    settings = "c.IdentityProvider.token = ''\nc.ServerApp.token = ''\n"
    (tmp_path / ".jupyter" / "jupyter_server_config.py").write_text(settings)
    done = Cli()("lab", "--here", "--port", "0", cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert "without the token" in done.stderr and "configuration" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--token", ""], ["without a token anyone who reaches the port", "leave --token out"]),
        (["--token", "short"], ["at least 16"]),
        (["--bind", "0.0.0.0"], ["needs a password", "--password-file", "ssh tunnel"]),
        (["--bind", "0.0.0.0", "--password-file", "nowhere"], ["nowhere", "No such file"]),
        (["--notebooks", "file"], ["is a file"]),
        (["--container"], ["exclude each other"]),
    ],
)
def test_what_it_refuses(tmp_path: Path, cli: Cli, options: list[str], words: list[str]) -> None:
    (tmp_path / "file").touch()
    done = cli("lab", "--here", "--port", "0", *options, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.rglob("token"))


def test_a_taken_port(tmp_path: Path, cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("lab", "--here", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2 and f"port {port}" in done.stderr and "another program" in done.stderr
