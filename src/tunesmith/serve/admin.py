"""Routes that change what is served, apart from those that use it: who may do so is decided elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field, StringConstraints

from tunesmith.core.errors import UserError
from tunesmith.serve.errors import ApiError, one_line, shown
from tunesmith.serve.gateway import Gateway, OpenAdapter, OpenedAdapter
from tunesmith.serve.json_body import JsonRoute
from tunesmith.serve.replies import ERRORS, DeletedReply, ModelCard, StateReply, json_reply
from tunesmith.serve.schema import Body

ADMIN_PREFIX = "/admin"
LOAD_ALIAS, UNLOAD_ALIAS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADMIN_ALIASES = frozenset({LOAD_ALIAS, UNLOAD_ALIAS})
"""The names that vLLM gave two of these routes; they change as much, and need the same right."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}$")]
Path = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=4096)]


def is_admin(path: str) -> bool:
    """Whether a request to this path may change what is served."""
    return path == ADMIN_PREFIX or path.startswith(f"{ADMIN_PREFIX}/") or path in ADMIN_ALIASES


class AdapterRequest(Body):
    """A LoRA adapter of the served base model: a run folder or an adapter folder on the server's disk."""

    name: Name = Field(description="Model name under which it answers; an adapter of that name is replaced.")
    path: Path


class LoadLora(Body):
    lora_name: Name
    lora_path: Path


class UnloadLora(Body):
    lora_name: Name
    lora_int_id: int | None = Field(None, description="Without effect.")


class Adapters:
    """Loads and unloads, one at a time, and keeps the gateway's models in step with the engine's."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._turn = asyncio.Lock()

    async def load(self, name: str, path: str) -> dict[str, Any]:
        """The new model's card. Raises ApiError and EngineError; then everything is as before."""
        engine = self._gateway.ready_engine()
        known = self._gateway.models.get(name)
        if known is not None and known.adapter is None:
            raise ApiError(
                f"name: {shown(name)} is the base model's", status=409, param="name", code="name_taken"
            )
        async with self._turn:
            opened = await asyncio.to_thread(_opened, self._gateway.open_adapter, name, path)
            try:
                await engine.load_adapter(name, opened.folder)
            except UserError as error:
                raise _does_not_load(error) from None
            self._gateway.models[name] = replace(opened.model, name=name, adapter=name)
        return self._gateway.models[name].card()

    async def unload(self, name: str) -> None:
        """Raises ApiError for a name that is no adapter's."""
        engine = self._gateway.ready_engine()
        async with self._turn:
            model = self._gateway.models.get(name)
            if model is None or model.adapter is None:
                raise ApiError(
                    f"there is no adapter {shown(name)}", status=404, param="name", code="adapter_not_found"
                )
            # No new requests from here on; those that run are finished by the engine.
            del self._gateway.models[name]
            try:
                await engine.unload_adapter(model.adapter)
            except Exception:  # not when the client left meanwhile: the engine goes on and forgets it
                self._gateway.models[name] = model
                raise


def _opened(open_adapter: OpenAdapter | None, name: str, path: str) -> OpenedAdapter:
    if open_adapter is None:
        raise ApiError("this server loads no adapters while it runs", code="adapters_not_supported")
    try:
        return open_adapter(name, path)
    except UserError as error:
        raise _does_not_load(error) from None
    except OSError as error:  # a path that no file system takes
        raise ApiError(
            f"path: {shown(path)}: {error.strerror or error}", param="path", code="adapter_refused"
        ) from None


def _does_not_load(error: UserError) -> ApiError:
    return ApiError(one_line(error), param="path", code="adapter_refused")


def admin_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["admin"], responses=ERRORS)
    adapters = Adapters(gateway)

    @router.post(f"{ADMIN_PREFIX}/adapters", responses=json_reply(ModelCard))
    async def load(body: AdapterRequest) -> Response:
        """Load an adapter from the server's disk; it answers under its name when this returns."""
        return JSONResponse(await adapters.load(body.name, body.path))

    @router.delete(f"{ADMIN_PREFIX}/adapters/{{name:path}}", responses=json_reply(DeletedReply))
    async def unload(name: str) -> Response:
        """Forget an adapter; requests that use it are finished first."""
        await adapters.unload(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    @router.get(f"{ADMIN_PREFIX}/state", responses=json_reply(StateReply))
    async def state() -> Response:
        """The engine's counters, and every model with what it is made of."""
        models = [model.card() for model in gateway.models.values()]
        engine = asdict(gateway.engine.status()) if gateway.engine else None
        return JSONResponse({"engine": engine, "models": models})

    @router.post(LOAD_ALIAS, response_class=PlainTextResponse)
    async def load_lora(body: LoadLora) -> Response:
        """As vLLM names it."""
        await adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"adapter '{body.lora_name}' is loaded")

    @router.post(UNLOAD_ALIAS, response_class=PlainTextResponse)
    async def unload_lora(body: UnloadLora) -> Response:
        """As vLLM names it."""
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"adapter '{body.lora_name}' is unloaded")

    return router
