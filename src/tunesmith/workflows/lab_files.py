"""What JupyterLab needs wherever it runs: token, password, port, notebook, the proof that it is locked."""

from __future__ import annotations

import errno
import getpass
import ipaddress
import json
import os
import shutil
import socket
import sys
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.net import local_status
from tunesmith.core.progress import say
from tunesmith.image.services import NOTEBOOK
from tunesmith.workflows.shipped import shipped

SHIPPED_NOTEBOOK = f"examples/quickstart/{NOTEBOOK}"
MIN_TOKEN = 16
MIN_PASSWORD = 8
# A program that hashes the password on its stdin: the command line would show it to everyone.
HASH = "import sys; from jupyter_server.auth import passwd; print(passwd(sys.stdin.read()))"


def check_token(token: str | None) -> None:
    """None: a token is generated. Raises UserError for an empty or a short one."""
    if token is None:
        return
    if not token.strip():
        raise UserError(
            "--token '': without a token anyone who reaches the port, each user and each web page on this "
            "machine included, could run commands as you and read and change all your files",
            hint="leave --token out: one is generated and kept in a file that only you can read",
        )
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"--token: must have at least {MIN_TOKEN} printable ASCII characters without spaces",
            hint="leave --token out: one is generated",
        )


def is_loopback(bind: str) -> bool:
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"


def refuse_open(bind: str, password: str | None) -> None:
    """Raises UserError for an address that other machines reach when there is no password."""
    if password is None and not is_loopback(bind):
        raise UserError(
            f"--bind {bind}: other machines reach this address, so JupyterLab needs a password there",
            hint="give --password-file FILE, or keep 127.0.0.1 and come in through an ssh tunnel",
        )


def read_password(bind: str | None, file: Path | None) -> str | None:
    """The password of `file`, else asked for when `bind` is an address that other machines reach.

    Raises UserError for a short password, a file that cannot be read, and where nobody can be asked.
    """
    if file is not None:
        password = _password_of(file)
    elif bind is None or is_loopback(bind):
        return None
    else:
        password = _ask_password(bind)
    if len(password) < MIN_PASSWORD:
        raise UserError(
            f"JupyterLab's password has {len(password)} characters", hint=f"take at least {MIN_PASSWORD}"
        )
    return password


def _password_of(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UserError(f"--password-file {file}: {reason}", hint="give a text file of one line") from None


def _ask_password(bind: str) -> str:
    if not sys.stdin.isatty():
        refuse_open(bind, None)
    password = getpass.getpass("Password for JupyterLab: ")
    if getpass.getpass("The same again: ") != password:
        raise UserError("the two passwords are not the same", hint="try again")
    return password


def password_config(hashed: str) -> str:
    """Jupyter's configuration, as JSON, with a password that its own `passwd` has hashed."""
    return json.dumps({"PasswordIdentityProvider": {"hashed_password": hashed}})


def put_notebook(folder: Path, owner: tuple[int, int] | None = None) -> Path:
    """The quickstart notebook in `folder`; one that is there already is never touched."""
    target = folder / NOTEBOOK
    if target.exists():
        return target
    part = folder / f".{NOTEBOOK}.part"
    shutil.copyfile(shipped(SHIPPED_NOTEBOOK), part)
    if owner is not None and owner != (os.geteuid(), os.getegid()):
        os.chown(part, *owner)
    os.replace(part, target)
    return target


def free_port(bind: str) -> int:
    """A TCP port that is free now."""
    with _bound(bind, 0) as listener:
        return int(listener.getsockname()[1])


def check_port(bind: str, port: int) -> None:
    """Raises UserError when `port` cannot be listened on."""
    _bound(bind, port).close()


def _bound(bind: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UserError(
            f"port {port} of {bind}: {'another program listens there' if taken else error.strerror or error}",
            hint="take another port (0 takes a free one), or end that program",
        ) from None


def address_of(bind: str) -> str:
    """Where a program on this machine reaches what listens on `bind`, ready for a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)
    return f"[{host}]" if ":" in host else host


def check_locked(url: str, token: str) -> None:
    """Raises TunesmithError unless the JupyterLab at `url` refuses a stranger and lets the token in."""
    stranger = local_status(f"{url}/api/contents")
    if stranger not in (401, 403):
        raise TunesmithError(
            f"JupyterLab at {url} answers {stranger} to a request without the token: some Jupyter "
            "configuration switches its token off; it has been stopped",
            hint="'jupyter --paths' lists the configuration folders; remove 'token' from them",
        )
    known = local_status(f"{url}/api/contents", headers={"Authorization": f"token {token}"})
    if known != 200:
        raise TunesmithError(
            f"JupyterLab at {url} answers {known} to its own token; it has been stopped",
            hint="is another JupyterLab on this port, or a token in a Jupyter configuration file?",
        )


def say_tunnel(port: int) -> None:
    """How to reach a port of this machine's 127.0.0.1 from another one."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "user"
    here = (os.environ.get("SSH_CONNECTION") or "").split()
    host = here[2] if len(here) == 4 else socket.gethostname()
    say(f"from another machine:  ssh -N -L {port}:127.0.0.1:{port} {user}@{host}")
