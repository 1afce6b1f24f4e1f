"""tunesmith lab: JupyterLab behind a token, in a container or in the current environment."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from tunesmith.core import proc
from tunesmith.core.errors import MissingExtra, TunesmithError, UserError
from tunesmith.core.net import local_status
from tunesmith.core.progress import say
from tunesmith.image.docker import find_image
from tunesmith.workflows.compose_project import IMAGES, open_project, write_secret
from tunesmith.workflows.lab_files import (
    HASH,
    address_of,
    check_locked,
    check_port,
    check_token,
    free_port,
    password_config,
    put_notebook,
    refuse_open,
)

START_S = 60.0
POLL_S = 0.1
LOG_LINES = 15


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """notebooks: JupyterLab's work folder; port 0 takes a free one; token: None generates one."""

    notebooks: Path = Path("notebooks")
    project: Path | None = None
    bind: str = "127.0.0.1"
    port: int = 8888
    token: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that answers. `url` holds the token, which the file `token_file` (mode 0600) keeps."""

    url: str
    port: int
    token_file: Path
    notebook: Path
    pid: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "port": self.port,
            "token_file": str(self.token_file),
            "notebook": str(self.notebook),
            "pid": self.pid,
        }


def image_is_here(image: str | None) -> bool:
    """True when docker answers and has the image of the lab."""
    try:
        return find_image(image or IMAGES["lab"]) is not None
    except TunesmithError:
        return False


def lab_here(options: LabOptions, on_ready: Callable[[Lab], None]) -> int:
    """Run JupyterLab in this environment until a signal comes; returns the signal's number.

    on_ready is called once JupyterLab answers with the token and was seen to refuse without it. Raises
    MissingExtra without jupyterlab, UserError for a bad token, bind or port, TunesmithError with the last
    lines of its log when it ends by itself.
    """
    _refuse(options)
    if options.port == 0:
        options = replace(options, port=free_port(options.bind))
    check_port(options.bind, options.port)
    options.notebooks.mkdir(parents=True, exist_ok=True)
    notebook = put_notebook(options.notebooks)
    folder = open_project(options.project).folder / f"lab-{options.port}"
    token_file = _write_secrets(folder, options)
    log = folder / "jupyter.log"
    log.unlink(missing_ok=True)
    process = None
    try:
        with _signals_raise():
            process = proc.start(_command(options, notebook, folder), log=log, env=_env(token_file))
            _wait_until_up(process, options, log, token_file)
            url = _address(options)
            token = token_file.read_text(encoding="utf-8")
            place = f"{options.notebooks.name}/{notebook.name}"
            on_ready(
                Lab(f"{url}/lab/tree/{place}?token={token}", options.port, token_file, notebook, process.pid)
            )
            raise TunesmithError(
                f"JupyterLab ended with code {process.wait()}; its last lines:\n{_tail(log)}"
            )
    except _Stopped as stop:
        return stop.number
    finally:
        if process is not None:
            proc.stop(process)
        for path in (token_file, folder / "password.json"):
            path.unlink(missing_ok=True)


def _refuse(options: LabOptions) -> None:
    if importlib.util.find_spec("jupyterlab") is None:
        raise MissingExtra("jupyterlab", "host")
    check_token(options.token)
    refuse_open(options.bind, options.password)
    if options.notebooks.exists() and not options.notebooks.is_dir():
        raise UserError(f"--notebooks {options.notebooks}: is a file", hint="give a folder")


def _write_secrets(folder: Path, options: LabOptions) -> Path:
    """The token, and the hashed password, in files of `folder` that only this user reads."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = (os.geteuid(), os.getegid())
    token_file = folder / "token"
    write_secret(token_file, options.token or secrets.token_urlsafe(32), *owner)
    if options.password is not None:
        hashed = proc.run([sys.executable, "-c", HASH], input=options.password).stdout.strip()
        write_secret(folder / "password.json", password_config(hashed), *owner)
    return token_file


def _command(options: LabOptions, notebook: Path, folder: Path) -> list[str]:
    if os.geteuid() == 0:
        say("warning: JupyterLab runs as root: what its notebooks do, they do as root")
    return [
        *(sys.executable, "-m", "jupyterlab", "--no-browser"),
        f"--ServerApp.ip={options.bind}",
        f"--ServerApp.port={options.port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={options.notebooks.absolute().parent}",
        f"--LabApp.default_url=/lab/tree/{options.notebooks.name}/{notebook.name}",
        *([f"--config={folder / 'password.json'}"] if options.password is not None else []),
        *(["--allow-root"] if os.geteuid() == 0 else []),
    ]


def _env(token_file: Path) -> dict[str, str]:
    """JUPYTER_TOKEN of the caller's shell would go before the file."""
    kept = {key: value for key, value in os.environ.items() if key != "JUPYTER_TOKEN"}
    return kept | {"JUPYTER_TOKEN_FILE": str(token_file)}


def _address(options: LabOptions) -> str:
    return f"http://{address_of(options.bind)}:{options.port}"


def _wait_until_up(process: proc.Process, options: LabOptions, log: Path, token_file: Path) -> None:
    end = time.monotonic() + START_S
    while local_status(f"{_address(options)}/api") != 200:
        if process.poll() is not None:
            raise TunesmithError(f"JupyterLab did not start; its last lines:\n{_tail(log)}")
        if time.monotonic() > end:
            raise TunesmithError(f"JupyterLab did not answer within {START_S:g} s:\n{_tail(log)}")
        time.sleep(POLL_S)
    check_locked(_address(options), token_file.read_text(encoding="utf-8"))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT, SIGTERM and a closed terminal as an exception, once, so that JupyterLab is always ended."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
