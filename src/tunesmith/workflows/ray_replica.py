"""What runs in the processes of Ray Serve: the whole gateway with an engine, and the front that asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.cluster.ray_serve import NO_REPLICA, answers, answers_of_all, replica_name
from tunesmith.core.errors import RunFailed
from tunesmith.serve.access import METRICS_PATH
from tunesmith.serve.admin import is_admin
from tunesmith.serve.api import create_app
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.errors import ApiError
from tunesmith.serve.forward import Call, ReplicaLost, forwarding, replay
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.guard import guard
from tunesmith.serve.metrics import CONTENT_TYPE, joined
from tunesmith.serve.refuse import refuse, route_path
from tunesmith.workflows.fill_gateway import fill, guard_options
from tunesmith.workflows.serve_settings import ServeOptions, deployment, engine_wants
from tunesmith.workflows.start_engine import StartedEngine

REPLICA_HEADER = b"x-tunesmith-replica"
LARGEST_BODY = 64 * 1024**2
"""Bytes that the front takes in; a replica takes what max_body_mib says."""


class Replica:
    """The gateway of `tunesmith serve` with an engine of its own, asked by `Call` in place of HTTP.

    sent: `path` and, as `options`, the fields of ServeOptions. Made when the model has answered once.
    """

    def __init__(self, sent: dict[str, Any]) -> None:
        self._sent, self._name = sent, replica_name().encode()
        options = ServeOptions(**sent["options"])
        wanted = deployment(sent["path"], options)
        self._grace_s = wanted.settings.grace_s
        self._engine = StartedEngine(
            engine_wants(wanted, options), engine=wanted.settings.engine, replicas=1, open_here=None
        )
        self._gateway = Gateway()
        self._guard = guard(create_app(self._gateway), guard_options(wanted, self._engine))
        self._app = for_all(self._guard)
        facts = self._engine.start()
        if facts is None:
            raise RunFailed(f"{sent['path']}: the engine was stopped while it loaded")
        self._facts = fill(self._gateway, self._engine, facts)

    async def answer(self, call: Call) -> AsyncIterator[Message]:
        async for message in replay(self._app, call):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLICA_HEADER, self._name)]
            yield message

    async def answer_whole(self, call: Call) -> tuple[str, list[Message]]:
        """Its name, and its answer as `answer` gives it."""
        return self._name.decode(), [message async for message in self.answer(call)]

    def describe(self) -> dict[str, Any]:
        """What it was made of, and what it serves."""
        return {"sent": self._sent, "facts": self._facts}

    def check_health(self) -> None:
        """Asked by Ray: a replica whose engine cannot be started again is replaced."""
        for name, status in self._engine.statuses().items():
            if not status.alive:
                raise RuntimeError(f"engine {name}: {status.failure}")

    def __del__(self) -> None:
        if hasattr(self, "_guard"):
            self._guard.close()
            self._engine.stop(self._grace_s)


def for_all(app: ASGIApp) -> ASGIApp:
    """Without the routes that would change one replica among several."""

    async def without_admin(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_admin(route_path(scope)):
            message = "replicas are changed together: tunesmith serve --cluster with another --adapter"
            await refuse(scope, receive, send, ApiError(message, status=501, code="not_on_a_cluster"))
            return
        await app(scope, receive, send)

    return without_admin


def front() -> ASGIApp:
    """What clients ask. It bounds what it takes in by what any replica does, and leaves the rest to them."""
    return forwarding(_ask, Bounds(max_body_bytes=LARGEST_BODY))


def _ask(call: Call) -> AsyncIterator[Message]:
    if (call.method, call.path) == ("GET", METRICS_PATH):
        return metrics_of_all(call)
    return answers(call, ReplicaLost)


async def metrics_of_all(call: Call) -> AsyncIterator[Message]:
    """The metrics of every replica as one answer; the refusal where one refuses."""
    told: list[tuple[str, list[Message]]] = await answers_of_all("answer_whole", call)
    if not told:
        raise ReplicaLost(NO_REPLICA)
    for _, messages in told:
        if messages[0]["status"] != 200:
            for message in messages:
                yield message
            return
    texts = {name: b"".join(m.get("body", b"") for m in messages).decode() for name, messages in told}
    body = joined(texts)
    headers = [(b"content-type", CONTENT_TYPE), (b"content-length", str(len(body)).encode())]
    yield {"type": "http.response.start", "status": 200, "headers": headers}
    yield {"type": "http.response.body", "body": body}
