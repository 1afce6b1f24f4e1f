"""Whatever a route raises, and whatever the framework refuses by itself, as OpenAI's error object."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from tunesmith.core.errors import UserError
from tunesmith.serve.engine import EngineError
from tunesmith.serve.errors import ApiError, as_api_error, shown
from tunesmith.serve.record import record_of


def install_handlers(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return told(request, as_api_error(error))

    for kind in (ApiError, UserError, EngineError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)


def told(request: Request, error: ApiError) -> Response:
    """The error as a response; the request's record has its code."""
    record_of(request.scope).error = error.code or "bad_request"
    return error.response


async def _http_error(request: Request, error: Exception) -> Response:
    """404, 405 and whatever else the framework answers by itself."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = {404: f"{where}: there is no such path", 405: f"{where}: this method is not allowed here"}.get(
        error.status_code, str(error.detail)
    )
    response = told(
        request, ApiError(message, status=error.status_code, code=_HTTP_CODES.get(error.status_code))
    )
    response.headers.update(error.headers or {})
    return response


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


async def _invalid_body(request: Request, error: Exception) -> Response:
    """400 naming the first field at fault."""
    assert isinstance(error, RequestValidationError)
    return told(request, _first_fault(_most_specific(list(error.errors()))))


def _first_fault(first: dict[str, Any]) -> ApiError:
    where = [part for part in first["loc"] if part != "body"]
    param = _path(where)
    if first["type"] == "extra_forbidden":
        return ApiError(f"'{param}' is not supported", param=param, code="unsupported_parameter")
    given = "" if first["type"] == "missing" else f" (given: {shown(first.get('input'))})"
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{param or 'body'}: {said}{given}", param=param or None)


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
        elif parts[place - 1] not in _TAGGED and not _names_a_type(str(part)):
            text += f".{part}"
    return text


_TAGGED = ("response_format", "format", "prompt", "input")
"""Fields of several kinds; a location has the kind after the field's name."""


def _names_a_type(part: str) -> bool:
    return (
        part[:1].isupper()
        or part.startswith("constrained-")
        or any(mark in part for mark in "[(")
        or part in {"str", "int", "float"}
    )
