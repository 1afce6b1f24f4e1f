"""Tokens of the day: over midnight, over restarts, over several servers, over a broken file."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tunesmith.serve import quota
from tunesmith.serve.quota import TokenUsage, seconds_left_today, usage_file, used_today


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_two_servers_share_one_quota(keys: Path) -> None:
    one, other = TokenUsage(keys), TokenUsage(keys)
    one.add("a", 5)
    other.add("a", 7)
    one.flush()
    other.flush()
    one.add("b", 1)
    one.flush()
    assert used_today(keys) == {"a": 12, "b": 1}
    assert (one.used("a"), other.used("a")) == (12, 12)
    assert not one.unsaved
    assert TokenUsage(keys).used("a") == 12


def test_the_file_lies_beside_the_keys_and_is_private(keys: Path) -> None:
    usage = TokenUsage(keys)
    usage.add("a", 5)
    usage.flush()
    file = usage_file(keys)
    assert file.parent == keys.parent and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_midnight_begins_anew(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-01")
    usage = TokenUsage(keys)
    usage.add("a", 5)
    usage.flush()
    usage.add("a", 3)
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-02")
    assert usage.used("a") == 0
    usage.add("a", 2)
    usage.flush()
    assert json.loads(usage_file(keys).read_text()) == {"day": "2026-11-02", "tokens": {"a": 2}}


def test_a_clock_that_goes_back_over_midnight_gives_no_tokens_twice(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-02")
    usage = TokenUsage(keys)
    usage.add("a", 5)
    usage.flush()
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-01")
    behind = TokenUsage(keys)
    assert (usage.used("a"), behind.used("a"), used_today(keys)) == (5, 5, {"a": 5})
    behind.add("a", 2)
    usage.add("a", 1)
    behind.flush()
    usage.flush()
    assert json.loads(usage_file(keys).read_text()) == {"day": "2026-11-02", "tokens": {"a": 8}}
    # A clock that was wrong by more than that is no reason to refuse anybody for years.
    monkeypatch.setattr(quota, "_today", lambda: "2026-10-01")
    assert (usage.used("a"), TokenUsage(keys).used("a")) == (0, 0)


def test_a_server_whose_clock_is_behind_joins_the_day_of_the_other(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-01")
    behind = TokenUsage(keys)
    behind.add("a", 2)
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-02")
    ahead = TokenUsage(keys)
    ahead.add("a", 5)
    ahead.flush()
    monkeypatch.setattr(quota, "_today", lambda: "2026-11-01")
    behind.flush()
    assert behind.used("a") == 7 and used_today(keys) == {"a": 7}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"day": "TODAY", "tokens": [1]}', '{"day": "TODAY", "tokens": {"a": Infinity}}'],
)
def test_a_broken_file_is_told_and_begun_anew(
    keys: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usage_file(keys).write_text(content.replace("TODAY", datetime.now(UTC).date().isoformat()))
    usage = TokenUsage(keys)
    assert usage.used("a") == 0
    assert "today's quotas begin anew" in capsys.readouterr().err
    usage.add("a", 1)
    usage.flush()
    assert used_today(keys) == {"a": 1}


def test_a_file_that_cannot_be_written_loses_nothing(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = TokenUsage(keys)
    usage.add("a", 5)
    usage_file(keys).mkdir()
    usage.flush()
    usage.flush()
    assert capsys.readouterr().err.count("the tokens used are not saved") == 1
    usage_file(keys).rmdir()
    usage.flush()
    assert used_today(keys) == {"a": 5}


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    usage = TokenUsage()
    usage.add("api_key", 5)
    assert not usage.unsaved and usage.used("api_key") == 5
    usage.flush()
    assert list(tmp_path.iterdir()) == []


def test_the_day_has_an_end() -> None:
    assert 0 < seconds_left_today() <= 86400
