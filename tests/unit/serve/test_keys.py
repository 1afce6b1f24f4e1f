"""Files of keys: what is stored, who is known, and that a change is seen at once."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.serve.keys import (
    Key,
    Keyring,
    Rate,
    add_key,
    default_keys_file,
    exposure,
    hashed,
    new_secret,
    read_keys,
    remove_key,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def add(file: Path, name: str, **limits: Any) -> str:
    secret = new_secret()
    add_key(file, Key(name=name, sha256=hashed(secret.encode()), created=NOW, **limits))
    return secret


def test_a_key_is_known_by_its_secret_and_stored_as_a_hash(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    alice, bob = add(file, "alice", rate="60/min", models=("a", "b")), add(file, "bob", admin=True)
    ring = Keyring(file)
    found = ring.find(alice.encode())
    assert found is not None and (found.name, found.models) == ("alice", ("a", "b"))
    assert found.request_rate == Rate(60, 60)
    assert ring.find(bob.encode()).admin  # type: ignore[union-attr]
    assert ring.find(alice[:-1].encode()) is None and ring.find(b"") is None
    assert alice not in file.read_text() and alice.removeprefix("ts-") not in file.read_text()


def test_secrets_have_256_bits_and_differ() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(s.startswith("ts-") and len(s) == 3 + 43 for s in secrets)


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    old = os.umask(0)
    try:
        add(file, "alice")
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert exposure(file) is None
    file.chmod(0o644)
    warning = exposure(file)
    assert warning is not None and "0644" in warning and "chmod 600" in warning


def test_a_name_that_is_taken_unknown_or_reserved(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add(file, "alice")
    with pytest.raises(UserError, match="'alice' is there already"):
        add(file, "alice")
    with pytest.raises(UserError, match="stands for the key of --api-key"):
        add(file, "api_key")
    with pytest.raises(UserError, match="there is no key 'alise'") as error:
        remove_key(file, "alise")
    assert error.value.hint == "did you mean 'alice'?"
    assert remove_key(file, "alice").name == "alice"
    assert read_keys(file) == []


def test_revoking_from_no_file_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file of keys"):
        remove_key(tmp_path / "none.json", "alice")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not a file of keys"),
        (b"{", "is not a file of keys"),
        (b"\xff\xfe", "is not a file of keys"),
        (b"[]", "the whole"),
        (b'{"version": 2, "keys": []}', "version"),
        (b'{"version": 1, "keys": [{"name": "a"}]}', r"keys\.0\.sha256"),
        (b'{"version": 1, "keys": [], "more": 1}', "more"),
    ],
)
def test_a_damaged_file_is_told_with_the_place(tmp_path: Path, content: bytes, fault: str) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        Keyring(file)
    assert str(file) in error.value.what
    with pytest.raises(UserError):
        add(file, "alice")
    assert file.read_bytes() == content


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    names = [f"key{number}" for number in range(12)]
    threads = [threading.Thread(target=add, args=(file, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read_keys(file)) == sorted(names)


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "keys.json"
    add(real, "alice")
    link.symlink_to(real)
    add(link, "bob")
    assert link.is_symlink() and [key.name for key in read_keys(real)] == ["alice", "bob"]


def test_a_running_server_sees_added_and_revoked_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    alice = add(file, "alice").encode()
    ring = Keyring(file)
    bob = add(file, "bob").encode()
    assert ring.find(bob) is not None
    remove_key(file, "alice")
    assert ring.find(alice) is None and ring.find(bob) is not None


def test_a_file_damaged_later_changes_nothing_and_a_file_gone_takes_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    alice = add(file, "alice").encode()
    whole = file.read_bytes()
    ring = Keyring(file)
    file.write_bytes(b"{")
    assert ring.find(alice) is not None and ring.find(alice) is not None
    assert capsys.readouterr().err.count("the keys read before stay valid") == 1
    file.unlink()
    assert ring.find(alice) is None and ring.asks
    assert "is gone" in capsys.readouterr().err
    file.write_bytes(whole)
    assert ring.find(alice) is not None


def test_the_single_key_stands_beside_a_file_and_is_an_admins(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    alice = add(file, "alice").encode()
    ring = Keyring(file, "gehëim")
    single = ring.find("gehëim".encode())
    assert single is not None and single.admin and single.name == "api_key"
    assert ring.find(alice) is not None
    assert not Keyring().asks and Keyring(None, "x").asks and Keyring(file).asks


def test_expiry() -> None:
    key = Key(name="a", sha256="0" * 64, created=NOW, expires=NOW + timedelta(days=1))
    assert not key.expired(NOW) and key.expired(NOW + timedelta(days=1))
    assert not Key(name="a", sha256="0" * 64, created=NOW).expired()


@pytest.mark.parametrize("text", ["", "60", "0/min", "-1/s", "60/fortnight", "6 0/min", "1.5/s", "60/MIN"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="rate"):
        Rate.parse(text)


def test_rates() -> None:
    assert [Rate.parse(t) for t in ("10/s", "1000/h", "5/day")] == [
        Rate(10, 1),
        Rate(1000, 3600),
        Rate(5, 86400),
    ]


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TUNESMITH_KEYS_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_keys_file() == tmp_path / "tunesmith" / "keys.json"
    monkeypatch.setenv("TUNESMITH_KEYS_FILE", "/etc/keys.json")
    assert default_keys_file() == Path("/etc/keys.json")


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add(file, "alice", tokens_per_day=5, expires=NOW)
    [stored] = json.loads(file.read_text())["keys"]
    assert stored["tokens_per_day"] == 5 and stored["expires"] == "2026-11-01T00:00:00Z"
