"""Request bodies as JSON, read strictly: what comes out can be rendered, tokenised and answered.

Python's reader takes more than JSON (NaN, Infinity, lone surrogates) and fails in its own ways on depth and
on long numbers; here each of these is one error that says what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tunesmith.serve.errors import ApiError

MAX_DEPTH = 64
MAX_DIGITS = 19
MAX_FIELDS = 256
LONG_NUMBER = re.compile(r"[0-9]{19}")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(raw: bytes) -> Any:
    """The value that `raw` says. Raises ApiError."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_json(f"byte {error.start} is not UTF-8") from None
    # The reader calls a function of ours for every number: only where one may be too long.
    integers = _integer if LONG_NUMBER.search(text) else None
    try:
        value = json.loads(text, parse_int=integers, parse_float=_finite, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise invalid_json(f"{error.msg}: line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ApiError(f"the body has {len(value)} fields, more than {MAX_FIELDS}")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if SURROGATE.search(text):
        _check_text(value)
    return value


def invalid_json(why: str) -> ApiError:
    return ApiError(f"the body is not valid JSON: {why}", code="invalid_json")


def _too_deep() -> ApiError:
    return ApiError(f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise invalid_json(f"a number of {len(text)} digits is out of range")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise invalid_json(f"the number {text[:40]} is out of range")
    return value


def _no_number(text: str) -> NoReturn:
    raise invalid_json(f"{text} is no number")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [child for each in level for child in _children(each)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_text(value: Any) -> None:
    """Half of a surrogate pair is no character: no tokenizer and no answer could hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise invalid_json("a string holds half of a surrogate pair, which is no character") from None


class _ReadRequest(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw, self._value = raw, value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route that reads its body with `read_json`, and takes none that is not called JSON.

    A page in a browser may send anything but JSON to another site, this machine included, unasked.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_first(request: Request) -> Response:
            raw = await request.body()
            _check_type(request)
            return await handle(_ReadRequest(request, raw, read_json(raw)))

        return read_first


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            f"Content-Type: {given[:80] or 'none'} is not possible; send application/json",
            status=415,
            code="unsupported_content_type",
        )
