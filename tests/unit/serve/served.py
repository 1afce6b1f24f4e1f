"""The API over the real engine and a tiny model, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import torch

from tests.unit.model.chat_templates import CHATML_TOOLS
from tests.unit.serve.replay import opened
from tunesmith.model.generate import Generator
from tunesmith.model.grammar import Grammars
from tunesmith.model.load import load_model
from tunesmith.serve.api import create_app
from tunesmith.serve.gateway import Gateway, OpenedAdapter
from tunesmith.serve.jobs import ServedModel
from tunesmith.serve.local_engine import LocalEngine


@asynccontextmanager
async def served(
    smol: Path, tiny: Path, *, length: int = 96, template: str = CHATML_TOOLS
) -> AsyncIterator[tuple[httpx.AsyncClient, LocalEngine]]:
    """A client of it, and the engine. smol: where the tokenizer is; length: the context, in tokens."""
    tokenizer = opened(smol, template)
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    grammars = Grammars(tokenizer, 49152, (2,))
    engine = LocalEngine(Generator(model, max_length=length, max_concurrent=8, grammars=grammars))
    engine.start([5, 6])
    card = ServedModel("tiny", tokenizer, length, (2,), 1)
    app = create_app(Gateway(engine, {"tiny": card}, lambda name, path: OpenedAdapter(card, Path(path))))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=None) as client:
            yield client, engine
    finally:
        await asyncio.to_thread(engine.close, grace_s=0)
