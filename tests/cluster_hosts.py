"""Several hosts on one machine: network namespaces, each with its own address, link and real ssh server.

They share the file system, the processors and the clock of this machine, and nothing of its network but a
bridge. Needs root, iproute2 and sshd: else its tests are skipped, or fail where TUNESMITH_REQUIRE_DOCKER is set
(as in CI). Mark tests that use it with `hosts`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docker_daemon import skip_or_fail

INTERFACE = "eth0"
CONFIG = """\
Port 22
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/pid-{number}
StrictModes no
PermitRootLogin yes
UsePAM no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
"""
SUBNETS = 512  # of 198.18.0.0/15, which is set apart for tests of networks (RFC 2544)


@dataclass(frozen=True)
class ClusterHost:
    """A host of its own: `root@address:port` with the private key `key`; `interface` is its network's name."""

    address: str
    port: int
    key: Path
    namespace: str
    link: str
    interface: str = INTERFACE

    def cut(self) -> None:
        """Pull its cable: nothing comes in or out, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        _ip("link", "set", self.link, "up")

    def processes(self) -> list[int]:
        """The ids of what runs on it, its ssh server included."""
        return [int(line) for line in _ip("netns", "pids", self.namespace).split()]

    @property
    def entry(self) -> dict[str, object]:
        """The host as cluster.yaml names it."""
        return {"host": self.address, "user": "root", "port": self.port, "key": str(self.key)}


@contextmanager
def cluster_hosts(tmp_path: Path, count: int, *, own: Path | None = None) -> Iterator[list[ClusterHost]]:
    """`count` hosts on one network, which this machine reaches too; all they run is killed at the end.

    own: a folder in place of which the last host has an empty one of its own. HOME is a new folder meanwhile:
    ssh notes there the keys of hosts that it meets.
    """
    skip_or_fail(missing())
    _sweep()
    folder = tmp_path / "cluster-hosts"
    folder.mkdir()
    for name in ("host", "user"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    with ExitStack() as stack:
        stack.enter_context(_home(folder / "home"))
        bridge, subnet = f"ts{os.getpid()}x{next(_numbers)}", _free_subnet()
        stack.enter_context(_bridge(bridge, f"{subnet}.254/24"))
        hosts = []
        for number in range(count):
            host = ClusterHost(
                f"{subnet}.{number + 1}", 22, folder / "user", f"{bridge}v{number}", f"{bridge}v{number}"
            )
            stack.enter_context(_namespace(host, bridge))
            stack.enter_context(_sshd(host, folder, number, own if number == count - 1 else None))
            hosts.append(host)
        yield hosts


def missing() -> str | None:
    """Why no such hosts can be had here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    names = ("ip", "sshd", "ssh", "ssh-keygen")
    lacking = [name for name in names if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: apt-get install iproute2 openssh-server)"
    name = f"ts{os.getpid()}x{next(_numbers)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def _sweep() -> None:
    """Remove what the tests of a killed process have left."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    names += [entry["ifname"] for entry in json.loads(_ip("-j", "link"))]
    for name in dict.fromkeys(names):
        made = re.fullmatch(r"ts(\d+)x\d+(?:v\d+)?", name)
        if made is None or Path(f"/proc/{made[1]}").exists():
            continue
        for pid in subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True
        ).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", name], capture_output=True)


_numbers = itertools.count()
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _run(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True, env=os.environ | {"PATH": _PATH})
    assert done.returncode == 0, f"{' '.join(args)}: {done.stderr}"
    return done.stdout


def _ip(*args: str) -> str:
    return _run("ip", *args)


def _free_subnet() -> str:
    """The first three numbers of a network that no interface of this machine is in."""
    taken = {
        entry["local"].rpartition(".")[0]
        for link in json.loads(_ip("-j", "-4", "addr"))
        for entry in link["addr_info"]
    }
    numbers = ((os.getpid() + step) % SUBNETS for step in range(SUBNETS))
    names = (f"198.{18 + number // 256}.{number % 256}" for number in numbers)
    return next(name for name in names if name not in taken)


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    folder.mkdir()
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HOME")
        os.environ.update({"HOME": before} if before is not None else {})


@contextmanager
def _bridge(name: str, address: str) -> Iterator[None]:
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("addr", "add", address, "dev", name)
        _ip("link", "set", name, "up")
        yield
    finally:
        _ip("link", "del", name)


@contextmanager
def _namespace(host: ClusterHost, bridge: str) -> Iterator[None]:
    _ip("netns", "add", host.namespace)
    try:
        peer = ("peer", "name", host.interface, "netns", host.namespace)
        _ip("link", "add", host.link, "type", "veth", *peer)
        _ip("link", "set", host.link, "master", bridge, "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
        for name in ("lo", host.interface):
            _ip("-n", host.namespace, "link", "set", name, "up")
        yield
    finally:
        _end_all(host)
        _ip("netns", "del", host.namespace)


def _end_all(host: ClusterHost) -> None:
    end = time.monotonic() + 10
    while (alive := host.processes()) and time.monotonic() < end:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    # The link goes with its namespace, and that with the last process of it.
    subprocess.run(["ip", "link", "del", host.link], capture_output=True)


@contextmanager
def _sshd(host: ClusterHost, folder: Path, number: int, own: Path | None) -> Iterator[None]:
    config = folder / f"config-{number}"
    config.write_text(CONFIG.format(address=host.address, folder=folder, number=number))
    Path("/run/sshd").mkdir(exist_ok=True)
    server = shutil.which("sshd", path=_PATH)
    assert server is not None
    # `ip netns exec` gives a mount table of its own, so nobody else sees what is mounted there.
    mount = f"mount -t tmpfs none '{own}' && " if own is not None else ""
    command = ["ip", "netns", "exec", host.namespace, "sh", "-c", f"{mount}exec {server} -D -e -f {config}"]
    with (folder / f"log-{number}").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait(host, process)
        yield
    finally:
        _end_all(host)
        process.kill()
        process.wait(10)


def _wait(host: ClusterHost, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert process.poll() is None, "sshd has ended"
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((host.address, host.port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"sshd does not answer at {host.address}")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ClusterHost]]:
    with cluster_hosts(tmp_path_factory.mktemp("hosts"), 2) as hosts:
        yield hosts
