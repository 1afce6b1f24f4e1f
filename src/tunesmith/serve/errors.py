"""Every failure as OpenAI's error object: message, type, param, code."""

from __future__ import annotations

import json
import traceback
from typing import Any

from fastapi.responses import JSONResponse

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.serve.engine import EngineBusy, EngineError


class ApiError(Exception):
    """A failure with its HTTP status and its fields in the error object.

    retry_after_s: when to try again; by default a second for 429 and 503.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code = _cut(message, MOST_SAID), status, code
        self.param = param and _cut(param, MOST_NAMED)
        self.retry_after_s = 1 if retry_after_s is None and status in (429, 503) else retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def event(self) -> bytes:
        """As the last event of a stream."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"

    @property
    def response(self) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse(self.body, self.status, headers)


MOST_SAID, MOST_NAMED = 1000, 200
"""Characters of a message and of a field's name: what a client sent is not sent back at any length."""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 60]} ... {text[-40:]}"


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def as_api_error(error: Exception) -> ApiError:
    """Any exception as the error that the client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(one_line(error))
    if isinstance(error, EngineBusy):
        return ApiError(str(error), status=429, code="server_busy")
    if isinstance(error, EngineError):
        return ApiError(str(error), status=503, code="engine_unavailable")
    say("".join(traceback.format_exception(error)))
    return ApiError(f"internal error: {type(error).__name__}", status=500, code="internal_error")


def one_line(error: UserError) -> str:
    return str(error).replace("\n\nhint:", ". Hint:")


def shown(value: Any) -> str:
    """A given value, short enough for a message; of a large one no more is written than is shown."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += part
        if len(text) > 80:
            return text[:77] + "..."
    return text
