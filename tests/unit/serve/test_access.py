"""Who may do what: keys, admin paths, this machine, and pages of other origins."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve.asgi import LOCAL, REMOTE, Words, ask, bearer, get
from tunesmith.core.errors import UserError
from tunesmith.serve.admin import ADMIN_ALIASES
from tunesmith.serve.guard import Guard, GuardOptions, guard
from tunesmith.serve.keys import Key, add_key, hashed, remove_key


def made(**options: Any) -> Guard:
    return guard(Words().app, GuardOptions(**options))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Keys whose secrets are their names."""
    now = datetime.now(UTC)
    rights: dict[str, dict[str, Any]] = {
        "alice": {}, "root": {"admin": True}, "old": {"expires": now}, "few": {"models": ("tiny",)},
        "soon": {"expires": now + timedelta(hours=1)},
    }  # fmt: skip
    for name, given in rights.items():
        key = Key(name=name, sha256=hashed(name.encode()), created=now, **given)
        add_key(tmp_path / "keys.json", key)
    return tmp_path / "keys.json"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": ""}, "missing_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
        ({"Authorization": "Basic alice"}, "missing_api_key"),
        ({"Authorization": "Bearer Alice"}, "invalid_api_key"),
        ({"Authorization": "Bearer alice2"}, "invalid_api_key"),
        ({"x-api-key": "bob"}, "invalid_api_key"),
        ({"Authorization": "Bearer old"}, "expired_api_key"),
    ],
)
def test_without_a_right_key(keys: Path, headers: dict[str, str], code: str) -> None:
    refused = ask(made(keys_file=keys), headers=headers)
    assert refused.status == 401
    assert refused.error["type"] == "authentication_error" and refused.error["code"] == code
    assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [bearer("alice"), {"authorization": "bearer  alice "}, {"x-api-key": "alice"}, bearer("soon")]
)
def test_with_a_right_key(keys: Path, headers: dict[str, str]) -> None:
    assert ask(made(keys_file=keys), headers=headers).status == 200


def test_a_key_that_was_revoked_is_refused_at_once(keys: Path) -> None:
    app = made(keys_file=keys)
    assert ask(app, headers=bearer("alice")).status == 200
    remove_key(keys, "alice")
    assert ask(app, headers=bearer("alice")).status == 401


def test_the_single_key_alone_and_beside_a_file(keys: Path) -> None:
    alone, both = made(api_key="s3cret"), made(api_key="s3cret", keys_file=keys)
    assert [ask(alone, headers=bearer(k)).status for k in ("s3cret", "alice")] == [200, 401]
    assert [ask(both, headers=bearer(k)).status for k in ("s3cret", "alice", "x")] == [200, 200, 401]


def test_state_is_open_and_nothing_else(keys: Path) -> None:
    app = made(keys_file=keys, open_paths=["/v1/models/tiny"])
    assert get(app, "/health", address=REMOTE).status == 200
    assert get(app, "/v1/models/tiny").status == 200
    for path in ("/v1/models/other", "/docs", "/openapi.json", "/health/", "/nothing", "/admin/adapters"):
        assert get(app, path).status == 401, path


def test_a_key_for_some_models(keys: Path) -> None:
    app = made(keys_file=keys)
    assert ask(app, headers=bearer("few")).status == 200
    refused = ask(app, headers=bearer("few"), chunks=[b'{"model": "secret", "tokens": 1}'])
    assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
    assert refused.error["param"] == "model" and "few" in refused.error["message"]


@pytest.mark.parametrize("path", ["/admin/adapters", *sorted(ADMIN_ALIASES)])
def test_admin_paths_want_an_admins_key(keys: Path, path: str) -> None:
    app = made(keys_file=keys, api_key="single")
    assert ask(app, path).status == 401
    refused = ask(app, path, headers=bearer("alice"))
    assert (refused.status, refused.error["code"]) == (403, "admin_key_required")
    found = {200, 404}  # the small application has only one of them
    assert ask(app, path, headers=bearer("root"), address=REMOTE).status in found
    assert ask(app, path, headers=bearer("single")).status in found


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 200),
        ({"address": ("::1", 1), "headers": {"host": "[::1]:8000"}}, 200),
        ({"address": ("::ffff:127.0.0.1", 1)}, 200),
        ({"headers": {"host": "127.0.0.1"}}, 200),
        ({"headers": {"origin": "https://friend.example"}}, 200),
        ({"address": REMOTE}, 403),
        ({"address": None}, 403),
        # A proxy on this machine asks for somebody else.
        ({"headers": {"x-forwarded-for": "192.0.2.7"}}, 403),
        ({"headers": {"Forwarded": "for=192.0.2.7"}}, 403),
        # A page in this machine's browser, whose name resolves to this machine.
        ({"headers": {"host": "evil.example"}}, 403),
        ({"headers": {"host": ""}}, 403),
        ({"headers": {"origin": "https://evil.example"}}, 403),
        ({"headers": {"origin": "null"}}, 403),
    ],
)
def test_without_any_key_admin_paths_are_for_this_machine(options: dict[str, Any], status: int) -> None:
    app = made(cors_origins=["https://friend.example"])
    assert ask(app, "/admin/adapters", **options).status == status


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, None),
        ({"address": REMOTE, "headers": {"host": "models.example.org"}}, None),
        ({"headers": {"host": "workstation:8000"}}, None),
        ({"headers": {"host": "192.0.2.1:8000"}}, None),
        ({"headers": {"host": "me.localhost"}}, None),
        ({"headers": {"origin": "http://localhost:3000"}}, None),
        ({"headers": {"host": "192.0.2.1:8000", "origin": "http://192.0.2.1:8000"}}, None),
        ({"headers": {"origin": "https://friend.example"}}, None),
        ({"headers": {"origin": "vscode-webview://x"}}, None),
        (
            {"headers": {"host": "evil.example:8000", "origin": "http://evil.example:8000"}},
            "host_not_allowed",
        ),
        ({"headers": {"host": "localhost.evil.example"}}, "host_not_allowed"),
        ({"headers": {"origin": "https://evil.example"}}, "origin_not_allowed"),
        ({"headers": {"origin": "https://127.0.0.1.evil.example"}}, "origin_not_allowed"),
        ({"address": REMOTE, "headers": {"origin": "https://evil.example"}}, "origin_not_allowed"),
    ],
)
def test_without_any_key_pages_from_elsewhere_are_refused(options: dict[str, Any], code: str | None) -> None:
    told = ask(made(cors_origins=["https://friend.example"]), **options)
    assert told.status == (403 if code else 200)
    if code:
        assert told.error["code"] == code and told.error["type"] == "permission_error"
    # With a key it is the key that decides: no page from elsewhere has it.
    with_key = options | {"headers": options.get("headers", {}) | bearer("k")}
    assert ask(made(api_key="k"), **with_key).status == 200


def test_metrics_are_for_this_machine_or_a_key(keys: Path) -> None:
    app, is_open = made(keys_file=keys), made(keys_file=keys, metrics_open=True)
    assert get(app, "/metrics", address=LOCAL).status == 200
    assert get(app, "/metrics", address=REMOTE).status == 401
    assert get(app, "/metrics", address=REMOTE, headers=bearer("alice")).status == 200
    assert get(is_open, "/metrics", address=REMOTE).status == 200


def test_faults_of_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the API key is empty"):
        GuardOptions(api_key=" ")
    with pytest.raises(UserError, match="only into an access log"):
        GuardOptions(log_prompts=True)
    with pytest.raises(UserError, match="there is no such file of keys"):
        made(keys_file=tmp_path / "none.json")
    with pytest.raises(UserError, match="--log-requests"):
        made(access_log=tmp_path)


def test_a_body_that_came_with_a_refusal_leaves_the_connection_usable(keys: Path) -> None:
    app = made(keys_file=keys)
    assert "connection" not in ask(app).headers
    large = ask(app, chunks=[b"x" * 100_000, b"x" * 100_000])
    assert large.status == 401 and large.headers["connection"] == "close" and large.ended
