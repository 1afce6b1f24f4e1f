"""What doctor runs on a host of a cluster: the script itself, by its stdin, as ssh hands it over."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunesmith.cluster.host_probe import listen, send
from tunesmith.cluster.probe import SCRIPT
from tunesmith.core.net import free_port


def ask(*args: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-", *args], input=SCRIPT.read_text(), capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_facts_of_this_python() -> None:
    found = ask("facts")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] == version("torch")


def test_a_file_is_written_read_and_removed(tmp_path: Path) -> None:
    for action in ("write", "read", "remove"):
        assert ask(action, str(tmp_path), "mark") == {"error": None}
    assert ask("read", str(tmp_path), "mark") == {"error": "No such file or directory"}
    assert ask("write", str(tmp_path / "none"), "mark") == {"error": "No such file or directory"}


def test_what_is_sent_arrives() -> None:
    port = free_port()
    taken: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: taken.update(listen(port, 2)))
    thread.start()
    sent = send(port, ["127.0.0.1", "localhost"])
    thread.join()
    assert taken == {"taken": 2}
    assert all(isinstance(speed, float) and speed > 0 for speed in sent.values()), sent


def test_a_port_that_is_taken_is_told_with_its_reason() -> None:
    with socket.create_server(("", 0)) as server:
        assert listen(server.getsockname()[1], 1) == {"error": "Address already in use"}
