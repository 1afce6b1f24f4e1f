"""The API over an engine that says what a test wrote: what a model cannot be relied upon to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from tunesmith.core.errors import UserError
from tunesmith.model.requests import Logprobs, TokenEvent
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.serve.api import create_app
from tunesmith.serve.engine import Ask, EngineBusy, EngineError, EngineStatus
from tunesmith.serve.gateway import Gateway, OpenedAdapter
from tunesmith.serve.jobs import ServedModel


class Replay:
    """An engine whose answers are `texts`, one after the other; `asked` is what it was asked.

    fails_after: tokens after which it dies. broken: every answer ends at once with "error". Vectors are [1, 0, ...] rotated by the prompt's length.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str] = (),
        *,
        fails_after: int | None = None,
        broken: bool = False,
    ) -> None:
        self._tokenizer, self.texts, self._fails_after = tokenizer, list(texts), fails_after
        self._broken = broken
        self.asked: list[Ask] = []
        self.adapters: dict[str, Path] = {}
        self.busy = False

    def submit(self, asks: Sequence[Ask]) -> ReplayStream:
        if self.busy:
            raise EngineBusy("3 requests are waiting already")
        self.asked += asks
        texts = [self.texts[len(self.asked) - len(asks) + i] for i in range(len(asks))]
        return ReplayStream([list(self._events(*pair)) for pair in zip(asks, texts, strict=True)])

    def _events(self, ask: Ask, text: str) -> list[TokenEvent]:
        if self._broken:
            return [TokenEvent(0, None, "error")]
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        ids = [*ids, ask.params.stop_ids[0]][: ask.params.max_new_tokens]
        events = []
        for place, token in enumerate(ids):
            reason = "stop" if token in ask.params.stop_ids else "length" if place + 1 == len(ids) else None
            logprobs = (
                Logprobs(token, -0.5 * len(text), ((token, -0.5),))
                if ask.params.logprobs is not None
                else None
            )
            events.append(TokenEvent(0, token, reason, logprobs))  # type: ignore[arg-type]
        if self._fails_after is not None:
            return events[: self._fails_after]
        return events

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        return [[0.6, 0.8, 0.0, 0.0] if len(prompt) % 2 else [0.0, 0.0, 1.0, 0.0] for prompt in prompts]

    async def load_adapter(self, name: str, folder: Path) -> None:
        if folder.name == "bad":
            raise UserError("bad: the adapter was trained on another base", hint="serve it by itself")
        self.adapters[name] = folder

    async def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def status(self) -> EngineStatus:
        return EngineStatus(True, True, 0, 0, len(self.asked), 0, 0, adapters=tuple(self.adapters))

    def close(self, *, grace_s: float) -> None:
        pass


class ReplayStream:
    """Gives one token of every answer at a time."""

    def __init__(self, answers: list[list[TokenEvent]]) -> None:
        self._answers = answers
        self.cancelled: set[int] = set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, TokenEvent]]]:
        for step in range(max(map(len, self._answers))):
            batch = [(i, events[step]) for i, events in enumerate(self._answers) if step < len(events)]
            await asyncio.sleep(0)
            yield [(i, event) for i, event in batch if i not in self.cancelled]
        if any(events[-1].finish_reason is None for events in self._answers):
            raise EngineError("the engine stopped: it was told to")

    def cancel(self, index: int | None = None) -> None:
        self.cancelled |= set(range(len(self._answers))) if index is None else {index}


@cache
def opened(folder: Path, template: str | None) -> Any:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


class Api:
    """The application in this process, asked over its ASGI interface."""

    def __init__(
        self, folder: Path, texts: Sequence[str] = (), *, template: str | None = None, **options: Any
    ) -> None:
        self.tokenizer = tokenizer = opened(folder, template)
        self.engine = Replay(tokenizer, texts, **options)
        self.model = ServedModel("tiny", tokenizer, 1024, (2,), 1, {"run": "runs/x", "data_hash": "d"})
        self.gateway = Gateway(self.engine, {"tiny": self.model}, self._open)
        self.app = create_app(self.gateway)

    def _open(self, name: str, path: str) -> OpenedAdapter:
        if path == "nothing":
            raise UserError("nothing: there is no such folder", hint="check the path")
        return OpenedAdapter(self.model, Path(path))

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **options)

        return asyncio.run(once())

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.ask("POST", path, json=body)

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The data of every event of a streamed answer, but the last [DONE]."""
        answer = self.post(path, body | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def prompt(self, number: int = 0) -> str:
        return str(self.tokenizer.decode(self.engine.asked[number].prompt))
