"""What the process of an engine does, from its first message on."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.serve import wire
from tunesmith.serve.engine_server import serve_engine
from tunesmith.serve.local_engine import LocalEngine
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.open_engine import load_engine, wait_until_ready


def run(number: int) -> int:
    """Be the engine that the first frame from the socket `number` describes; the process's exit code."""
    connection = socket.socket(fileno=number)
    message = wire.receive(connection)
    if message is None:
        return 1
    try:
        engine, facts = load_engine(_wants(message))
    except Exception as error:
        return _tell(connection, error)
    server = _Server(engine, connection, facts)
    server.start()
    engine.run(facts["probe"])
    server.join()
    return server.code


class _Server(threading.Thread):
    """Hears and answers, beside the process's first thread, which computes."""

    def __init__(self, engine: LocalEngine, connection: socket.socket, facts: Mapping[str, Any]) -> None:
        super().__init__(name="tunesmith-engine-server", daemon=True)
        self._engine, self._connection, self._facts = engine, connection, facts
        self.code = 0

    def run(self) -> None:
        try:
            wait_until_ready(self._engine)
        except TunesmithError as error:
            self.code = _tell(self._connection, error)
            return
        asyncio.run(serve_engine(self._engine, self._connection, self._facts))


def _tell(connection: socket.socket, error: Exception) -> int:
    """That it did not load; the process's exit code."""
    if not isinstance(error, (TunesmithError, OSError, ImportError)) or os.environ.get("TUNESMITH_DEBUG"):
        traceback.print_exc()
    connection.sendall(wire.encode("failed", error=wire.error_to_plain(error)))
    return 1


def _wants(message: Mapping[str, Any]) -> EngineWants:
    return EngineWants(**{name: value for name, value in message.items() if name != "kind"})
