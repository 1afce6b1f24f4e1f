"""The engine in a process of its own, from both sides: how it is started, and what it does then."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.serve import wire
from tunesmith.serve.engine_server import serve_engine
from tunesmith.serve.process_engine import ProcessEngine
from tunesmith.workflows.open_engine import EngineWants, open_engine


def process_engine(wants: EngineWants) -> ProcessEngine:
    """An engine that will load `wants` in a process of its own."""
    command = [sys.executable, "-m", "tunesmith.cli.engine", str(os.getpid())]
    # Not the key that clients send: it is none of the engine's business.
    env = {name: value for name, value in os.environ.items() if name != "TUNESMITH_API_KEY"}
    return ProcessEngine(command, asdict(wants), max_waiting=wants.max_waiting, env=env)


def run(number: int) -> int:
    """Be the engine that the first frame from the socket `number` describes; the process's exit code."""
    connection = socket.socket(fileno=number)
    message = wire.receive(connection)
    if message is None:
        return 1
    try:
        engine, facts = open_engine(_wants(message))
    except Exception as error:
        if not isinstance(error, (TunesmithError, OSError, ImportError)) or os.environ.get("TUNESMITH_DEBUG"):
            traceback.print_exc()
        connection.sendall(wire.encode("failed", error=wire.error_to_plain(error)))
        return 1
    asyncio.run(serve_engine(engine, connection, facts))
    return 0


def _wants(message: Mapping[str, Any]) -> EngineWants:
    return EngineWants(**{name: value for name, value in message.items() if name != "kind"})
