"""tunesmith keys, without its command line: what is made, shown and taken away."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.serve.keys import Keyring, read_keys
from tunesmith.serve.quota import TokenUsage
from tunesmith.workflows.keys import KeyOptions, add, expiry, list_all, revoke

NOW = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)


def test_a_key_from_birth_to_end(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    options = KeyOptions(rate="60/min", concurrency=4, tokens_per_day=1000, expires="30d", models="a, b")
    made = add("alice", options, file)
    add("root", KeyOptions(admin=True), file)
    found = Keyring(file).find(made["key"].encode())
    assert found is not None and (found.name, found.models) == ("alice", ("a", "b"))
    assert found.expires is not None and found.expires - found.created == timedelta(days=30)
    usage = TokenUsage(file)
    usage.add("alice", 77)
    usage.flush()
    listed = list_all(file)
    alice, root = listed["keys"]
    assert alice["tokens_today"] == 77 and root["tokens_today"] == 0
    assert root["admin"] and root["rate"] is None and not root["expired"]
    assert made["key"] not in str(listed) and "sha256" not in str(listed)
    assert revoke("alice", file) == {"revoked": "alice", "file": str(file)}
    assert [key.name for key in read_keys(file)] == ["root"]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90m", NOW + timedelta(minutes=90)),
        ("12h", NOW + timedelta(hours=12)),
        ("30d", NOW + timedelta(days=30)),
        ("2w", NOW + timedelta(days=14)),
        ("99999w", NOW + timedelta(weeks=99999)),
        ("2027-01-01", datetime(2027, 1, 1, tzinfo=UTC)),
    ],
)
def test_expiry(text: str, moment: datetime) -> None:
    assert expiry(text, NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "30", "0d", "-3d", "1.5h", "30 d", "tomorrow", "2027-13-01", "2026-11-23"]
)
def test_expiries_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--expires"):
        expiry(text, NOW)


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("", KeyOptions(), "key name ''"),
        ("a b", KeyOptions(), "key name 'a b'"),
        ("../x", KeyOptions(), "key name"),
        ("x" * 65, KeyOptions(), "key name"),
        ("a", KeyOptions(rate="fast"), "--rate fast"),
        ("a", KeyOptions(concurrency=0), "key concurrency '0'"),
        ("a", KeyOptions(models="a,,b"), "--models 'a,,b'"),
        ("a", KeyOptions(models=""), "--models"),
    ],
)
def test_what_cannot_be_made(tmp_path: Path, name: str, options: KeyOptions, fault: str) -> None:
    with pytest.raises(UserError) as error:
        add(name, options, tmp_path / "keys.json")
    assert fault in error.value.what and error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_others_may_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add("alice", KeyOptions(), file)
    assert list_all(file)["warnings"] == []
    file.chmod(0o640)
    assert "mode 0640" in list_all(file)["warnings"][0]


def test_the_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_KEYS_FILE", str(tmp_path / "k.json"))
    assert add("alice", KeyOptions())["file"] == str(tmp_path / "k.json")
    assert [key["name"] for key in list_all()["keys"]] == ["alice"]
    assert revoke("alice")["revoked"] == "alice"


def test_none_is_no_file_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_KEYS_FILE", "none")
    for call in (list_all, lambda: revoke("alice"), lambda: add("alice", KeyOptions())):
        with pytest.raises(UserError, match="'none' stands for no file"):
            call()
