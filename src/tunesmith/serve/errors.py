"""Every failure as OpenAI's error object: message, type, param, code."""

from __future__ import annotations

import json
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.serve.engine import EngineBusy, EngineError


class ApiError(Exception):
    """A failure with its HTTP status and its fields in the error object."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body, self.status, headers)


_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def as_api_error(error: Exception) -> ApiError:
    """Any exception as the error that the client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(str(error).replace("\n\nhint:", ". Hint:"))
    if isinstance(error, EngineBusy):
        return ApiError(str(error), status=429, code="server_busy")
    if isinstance(error, EngineError):
        return ApiError(str(error), status=503, code="engine_unavailable")
    say("".join(traceback.format_exception(error)))
    return ApiError(f"internal error: {type(error).__name__}", status=500, code="internal_error")


def install_handlers(app: FastAPI) -> None:
    async def known(_: Request, error: Exception) -> Response:
        return as_api_error(error).response

    for kind in (ApiError, UserError, EngineError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)


async def _http_error(request: Request, error: Exception) -> Response:
    """404, 405 and whatever else the framework answers by itself."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = {404: f"{where}: there is no such path", 405: f"{where}: this method is not allowed here"}.get(
        error.status_code, str(error.detail)
    )
    response = ApiError(message, status=error.status_code, code=_HTTP_CODES.get(error.status_code)).response
    response.headers.update(error.headers or {})
    return response


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


async def _invalid_body(_: Request, error: Exception) -> Response:
    """400 naming the first field at fault; a body that is not JSON is one too."""
    assert isinstance(error, RequestValidationError)
    first = _most_specific(list(error.errors()))
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        return ApiError(f"the body is not valid JSON: {detail}", code="invalid_json").response
    where = [part for part in first["loc"] if part != "body"]
    param = _path(where)
    if first["type"] == "extra_forbidden":
        return ApiError(f"'{param}' is not supported", param=param, code="unsupported_parameter").response
    given = "" if first["type"] == "missing" else f" (given: {_shown(first.get('input'))})"
    return ApiError(f"{param or 'body'}: {first['msg']}{given}", param=param or None).response


def _most_specific(errors: list[dict[str, Any]]) -> dict[str, Any]:
    """The deepest fault: of a value that fits no member of a union, that of the nearest member."""
    field = next((e["loc"][1] for e in errors if len(e["loc"]) > 1), None)
    same = [e for e in errors if field is None or field in e["loc"][1:2]]
    return max(same, key=lambda e: len([part for part in e["loc"] if isinstance(part, int)]))


def _path(parts: list[Any]) -> str:
    """`messages[0].content` of a location; the names that pydantic gives union members are left out."""
    text = ""
    for place, part in enumerate(parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif place == 0:
            text = str(part)
        elif not any(mark in str(part) for mark in "[(") and str(part) not in {"str", "int", "float"}:
            text += f".{part}"
    return text


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
