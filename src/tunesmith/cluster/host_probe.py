"""What `doctor --cluster` runs on a host: `python - ACTION ARGS`, with this text on its stdin.

Only the standard library is used, since a host that lacks all else must be looked at too. One JSON object
goes to stdout.

facts               its Python and packages
listen PORT COUNT   take in what COUNT hosts send to PORT, or whatever came within LISTEN_S
send PORT ADDRESS…  send to each address in turn for SEND_S; its bytes a second, or why it failed
write FOLDER NAME   make the file FOLDER/NAME
read FOLDER NAME    whether it is there
remove FOLDER NAME  remove it
"""

from __future__ import annotations

import importlib.metadata
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LISTEN_S = 30.0
CONNECT_S = 15.0
SEND_S = 0.5
MOST_BYTES = 1 << 28
CHUNK = 1 << 20


def facts() -> dict[str, Any]:
    """The Python of the host and its packages: names in small letters, and versions."""
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name.lower(): version for name, version in packages.items() if name},
    }


def listen(port: int, count: int) -> dict[str, Any]:
    """Take connections in. Returns {"taken": how many}, or {"error"} when the port cannot be listened on."""
    try:
        server = _server(port, count + 8)
    except OSError as error:
        return {"error": _reason(error)}
    end = time.monotonic() + LISTEN_S
    taken: list[threading.Thread] = []
    with server:
        while len(taken) < count and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                link, _ = server.accept()
            except TimeoutError:
                break
            taken.append(threading.Thread(target=_drain, args=(link,), daemon=True))
            taken[-1].start()
    for thread in taken:
        thread.join(CONNECT_S)
    return {"taken": len(taken)}


def _server(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)


def _drain(link: socket.socket) -> None:
    """Read to the end, then tell how much it was."""
    total, buffer = 0, bytearray(CHUNK)
    with link:
        link.settimeout(CONNECT_S)
        try:
            while read := link.recv_into(buffer):
                total += read
            link.sendall(b"%d\n" % total)
        except OSError:
            return


def send(port: int, addresses: list[str]) -> dict[str, Any]:
    """Send to each address. Returns bytes a second that arrived there, or the reason as text."""
    return {address: _send(port, address) for address in addresses}


def _send(port: int, address: str) -> float | str:
    try:
        with _connected(port, address) as link:
            begin = time.monotonic()
            sent = _pour(link, begin + SEND_S)
            link.shutdown(socket.SHUT_WR)
            arrived = int(link.makefile().readline() or 0)
            seconds = time.monotonic() - begin
    except OSError as error:
        return _reason(error)
    return arrived / seconds if arrived == sent else f"{arrived} of {sent} bytes arrived"


def _connected(port: int, address: str) -> socket.socket:
    """A connection; the other side may not listen yet. Raises OSError after CONNECT_S."""
    end = time.monotonic() + CONNECT_S
    while True:
        try:
            return socket.create_connection((address, port), max(0.1, end - time.monotonic()))
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _pour(link: socket.socket, end: float) -> int:
    link.settimeout(CONNECT_S)
    sent, chunk = 0, bytes(CHUNK)
    while sent < MOST_BYTES and time.monotonic() < end:
        link.sendall(chunk)
        sent += CHUNK
    return sent


def write(folder: str, name: str) -> dict[str, Any]:
    return _try(lambda: Path(folder, name).write_text(name))


def read(folder: str, name: str) -> dict[str, Any]:
    return _try(lambda: Path(folder, name).read_text())


def remove(folder: str, name: str) -> dict[str, Any]:
    return _try(lambda: Path(folder, name).unlink())


def _try(act: Callable[[], object]) -> dict[str, Any]:
    """{"error": None}, or why the file system refuses."""
    try:
        act()
    except OSError as error:
        return {"error": _reason(error)}
    return {"error": None}


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).partition(" (while attempting")[0]


def main(args: list[str]) -> None:
    action, *rest = args
    sys.stdout.write(json.dumps(_answer(action, iter(rest))))


def _answer(action: str, rest: Iterator[str]) -> dict[str, Any]:
    if action == "facts":
        return facts()
    if action == "listen":
        return listen(int(next(rest)), int(next(rest)))
    if action == "send":
        return send(int(next(rest)), list(rest))
    return {"write": write, "read": read, "remove": remove}[action](next(rest), next(rest))


if __name__ == "__main__":
    main(sys.argv[1:])
