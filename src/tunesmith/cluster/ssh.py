"""ssh to the hosts of a cluster: one place makes its command line."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tunesmith.cluster.inventory import Host
from tunesmith.core.errors import TunesmithError
from tunesmith.core.proc import run

CONNECT_TIMEOUT_S = 15
# A connection that is silent this long, three times over, is taken for cut.
ALIVE_S = 5
AT_ONCE = 32
LOST = 255  # ssh's own exit code: the host was not reached, or the connection broke
TIMED_OUT = 124


@dataclass(frozen=True)
class Reply:
    """How a command ended on a host. code 255: no connection; 124: not back in time.

    began, ended: when it was sent and was back, by this machine's clock, in seconds since 1970.
    """

    host: Host
    code: int
    stdout: str
    stderr: str
    began: float
    ended: float

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def reason(self) -> str:
        """Why it failed, in the host's or ssh's own last words."""
        lines = self.stderr.strip().splitlines() or self.stdout.strip().splitlines()
        return lines[-1] if lines else f"ended with code {self.code}"


def ssh_command(host: Host, command: Sequence[str]) -> list[str]:
    """The ssh line that runs `command`, a list of arguments, on `host`: it never asks for anything.

    The key of a host that is new is noted in ~/.ssh/known_hosts; one that has changed is refused.
    """
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
        "ServerAliveInterval": str(ALIVE_S),
        "ServerAliveCountMax": "3",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": str(_known_hosts()),
        "LogLevel": "ERROR",
    }
    if host.key is not None:
        options["IdentitiesOnly"] = "yes"
    return [
        "ssh", "-T",
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
        *(["-i", host.key] if host.key is not None else []),
        "-p", str(host.port),
        *(["-l", host.user] if host.user is not None else []),
        "--", host.host,
        shlex.join(command),
    ]  # fmt: skip


def run_on(
    hosts: Sequence[Host], command: Sequence[str], *, input: str | None = None, timeout_s: float = 60.0
) -> list[Reply]:
    """Run a command on every host at once. Returns their replies in the order of the hosts.

    input: text for its stdin. Raises UserError where ssh is not installed; a host that cannot be reached is a
    reply of code 255.
    """
    return run_each([(host, command) for host in hosts], input=input, timeout_s=timeout_s)


def run_each(
    commands: Sequence[tuple[Host, Sequence[str]]], *, input: str | None = None, timeout_s: float = 60.0
) -> list[Reply]:
    """`run_on` with a command of its own for each host."""

    def one(wanted: tuple[Host, Sequence[str]]) -> Reply:
        return _reply(*wanted, input, timeout_s)

    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return list(pool.map(one, commands))


def _reply(host: Host, command: Sequence[str], input: str | None, timeout_s: float) -> Reply:
    began = time.time()
    try:
        done = run(ssh_command(host, command), check=False, input=input, timeout_s=timeout_s)
    except TunesmithError as error:
        if error.exit_code != TunesmithError.exit_code:
            raise
        return Reply(host, TIMED_OUT, "", f"no answer within {timeout_s:g} s", began, time.time())
    return Reply(host, done.returncode, done.stdout, done.stderr, began, time.time())


def _known_hosts() -> Path:
    """The file that the other commands note host keys in; its folder is made."""
    folder = Path.home() / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "known_hosts"
