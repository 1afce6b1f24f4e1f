"""Which pages may ask, as browsers put the question; and the headers that keep browsers careful."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.serve.asgi import Reply, Words, ask, bearer, get
from tunesmith.core.errors import UserError
from tunesmith.serve.guard import GuardOptions, guard

PAGE = "https://chat.example.org"


def preflight(origin: str, **options: Any) -> Reply:
    app = guard(Words().app, GuardOptions(api_key="k", **options))
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-lang",
    }
    return get_with(app, "OPTIONS", headers)


def get_with(app: Any, method: str, headers: dict[str, str]) -> Reply:
    return ask(app, "/v1/completions", method=method, headers=headers)


def test_a_preflight_needs_no_key() -> None:
    told = preflight(PAGE, cors_origins=[PAGE])
    assert told.status == 200 and told.body == b""
    assert told.headers["access-control-allow-origin"] == PAGE
    assert "POST" in told.headers["access-control-allow-methods"]
    assert told.headers["access-control-allow-headers"] == "authorization,x-stainless-lang"
    assert "Origin" in told.headers["vary"]


def test_other_origins_are_told_no() -> None:
    for origin in ("https://evil.example", PAGE + ".evil.example", PAGE.upper(), "null", PAGE + ":444"):
        told = preflight(origin, cors_origins=[PAGE])
        assert told.status == 400 and "access-control-allow-origin" not in told.headers


def test_every_origin() -> None:
    assert preflight("https://a.example", cors_origins=["*"]).headers["access-control-allow-origin"] == "*"


def test_without_origins_a_preflight_is_a_request_like_any_other() -> None:
    told = preflight(PAGE)
    assert told.status == 401 and "access-control-allow-origin" not in told.headers


def test_answers_and_refusals_can_be_read_by_the_page() -> None:
    app = guard(Words().app, GuardOptions(api_key="k", cors_origins=[PAGE]))
    for key, status in (("k", 200), ("wrong", 401)):
        told = ask(app, headers=bearer(key) | {"origin": PAGE})
        assert told.status == status
        assert told.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in told.headers["access-control-expose-headers"]
    other = ask(app, headers=bearer("k") | {"origin": "https://evil.example"})
    assert other.status == 200 and "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in ask(app, headers=bearer("k")).headers


@pytest.mark.parametrize(
    "origin", ["chat.example.org", "https://a/b", "https://a/", "", "ftp://a", "https://"]
)
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(UserError, match="is not scheme"):
        GuardOptions(cors_origins=[origin])


def test_browsers_are_kept_careful() -> None:
    headers = get(guard(Words().app, GuardOptions()), "/health").headers
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    stream = ask(guard(Words().app, GuardOptions()), chunks=[b'{"model":"a","tokens":0,"stream":true}'])
    assert stream.headers["cache-control"] == "no-cache"
