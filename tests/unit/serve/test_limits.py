"""Rates, concurrency, quotas: what is refused, with which headers, and that what was held is given back."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve.asgi import Client, Words, ask, bearer, get
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.guard import Guard, GuardOptions, guard
from tunesmith.serve.keys import Key, Rate, add_key, hashed
from tunesmith.serve.limits import Bucket, duration
from tunesmith.serve.quota import used_today

STREAM = b'{"model": "tiny", "tokens": 2, "stream": true}'


def made(tmp_path: Path, words: Words, *, bounds: Bounds | None = None, **limits: Any) -> Guard:
    """A guard whose one key is `alice`."""
    key = Key(name="alice", sha256=hashed(b"alice"), created=datetime.now(UTC), **limits)
    add_key(tmp_path / "keys.json", key)
    return guard(words.app, GuardOptions(keys_file=tmp_path / "keys.json", bounds=bounds or Bounds()))


ALICE = bearer("alice")


def test_a_bucket_gives_its_count_at_once_and_then_at_its_rate() -> None:
    bucket = Bucket(Rate(3, 60), now=100.0)
    assert [bucket.take(100.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(100.0) == pytest.approx(20)
    assert bucket.take(110.0) == pytest.approx(10)
    assert bucket.take(120.0) == 0
    assert bucket.level(1e6) == 3 and bucket.full_in_s(1e6) == 0


@pytest.mark.parametrize(
    ("count", "period_s"), [(7, 60), (3, 1), (1000, 86400), (11, 3600), (1, 86400), (999_999, 1)]
)
def test_waiting_as_long_as_told_is_always_enough(count: int, period_s: int) -> None:
    now = 12_345.678
    bucket = Bucket(Rate(count, period_s), now)
    for _ in range(count if count < 2000 else 2000):
        bucket.take(now)
    bucket._level = 0.3
    for _ in range(200):
        if wait_s := bucket.take(now):
            now += wait_s
            assert bucket.take(now) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.2501, "251ms"), (1, "1s"), (8.64, "8.7s"), (59.96, "60s"), (60, "1m0s"), (360, "6m0s"),
     (86399.5, "24h0m0s"), (3599.2, "1h0m0s"), (47593, "13h13m13s")],
)  # fmt: skip
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_over_the_rate(tmp_path: Path) -> None:
    app = made(tmp_path, Words(), rate="2/h")
    first = ask(app, headers=ALICE)
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].startswith(("30m", "29m"))
    assert ask(app, headers=ALICE).headers["x-ratelimit-remaining-requests"] == "0"
    refused = ask(app, headers=ALICE)
    assert refused.status == 429
    assert refused.error["code"] == "rate_limit_exceeded" and refused.error["type"] == "rate_limit_error"
    assert 1790 <= int(refused.headers["retry-after"]) <= 1800
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert get(app, "/health").status == 200
    assert get(app, "/v1/models/x", headers=ALICE).status == 429


def test_a_changed_rate_counts_at_once(tmp_path: Path) -> None:
    app = made(tmp_path, Words(), rate="1/h")
    assert [ask(app, headers=ALICE).status for _ in range(2)] == [200, 429]
    file = tmp_path / "keys.json"
    file.write_text(file.read_text().replace("1/h", "9/h"))
    assert ask(app, headers=ALICE).headers["x-ratelimit-remaining-requests"] == "8"


def test_fifty_at_once_with_a_concurrency_of_four(tmp_path: Path) -> None:
    words = Words()
    app = made(tmp_path, words, concurrency=4, rate="60/day")

    async def everything() -> list[Any]:
        clients = [Client(headers=ALICE, chunks=[STREAM]) for _ in range(50)]
        tasks = [asyncio.create_task(client.run(app)) for client in clients]
        while words.open < 4 or sum(task.done() for task in tasks) < 46:
            await asyncio.sleep(0)
        assert app.num_running == 4
        for _ in range(8):
            words.step.release()
        return await asyncio.gather(*tasks)

    replies = asyncio.run(everything())
    statuses = [reply.status for reply in replies]
    assert (statuses.count(200), statuses.count(429)) == (4, 46)
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.error["code"] == "concurrency_limit_exceeded" and refused.headers["retry-after"] == "1"
    assert all(r.body.endswith(b"[DONE]\n\n") and r.ended for r in replies if r.status == 200)
    assert app.num_running == 0 and words.open == 0
    # What was refused for being too many at once has cost none of the rate.
    assert ask(app, headers=ALICE).headers["x-ratelimit-remaining-requests"] == "55"


def test_clients_that_leave_in_mid_stream_give_back_what_they_held(tmp_path: Path) -> None:
    words = Words()
    app = made(tmp_path, words, concurrency=3, tokens_per_day=1000)

    async def one_round() -> None:
        clients = [Client(headers=ALICE, chunks=[STREAM]) for _ in range(3)]
        tasks = [asyncio.create_task(client.run(app)) for client in clients]
        words.step.release()
        await asyncio.wait([asyncio.create_task(c.reply.began.wait()) for c in clients],
                           return_when="FIRST_COMPLETED")  # fmt: skip
        for client, task in zip(clients, tasks, strict=True):
            client.leave()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    for number in range(5):
        asyncio.run(one_round())
        assert (app.num_running, words.open) == (0, 0)
        # 3 prompts of 5 tokens, and the one token that was sent.
        assert app.limiter.usage.used("alice") == 16 * (number + 1)
        words.step = asyncio.Semaphore(0)


def test_an_application_that_fails_gives_back_too(tmp_path: Path) -> None:
    app = made(tmp_path, Words(), concurrency=1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a bug"):
            ask(app, "/fail", headers=ALICE)
    assert app.num_running == 0
    assert ask(app, headers=ALICE).status == 200


def test_over_the_quota_of_the_day(tmp_path: Path) -> None:
    app = made(tmp_path, Words(), tokens_per_day=10)
    first = ask(app, headers=ALICE)
    assert first.headers["x-ratelimit-limit-tokens"] == "10"
    assert first.headers["x-ratelimit-remaining-tokens"] == "2"
    assert ask(app, headers=ALICE).status == 200
    refused = ask(app, headers=ALICE)
    assert refused.status == 429
    assert refused.error["type"] == refused.error["code"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false"
    assert 0 < int(refused.headers["retry-after"]) <= 86400
    assert get(app, "/v1/models/x", headers=ALICE).status == 200


def test_the_quota_outlives_the_server(tmp_path: Path) -> None:
    words = Words()
    app = made(tmp_path, words, tokens_per_day=20)
    assert [ask(app, headers=ALICE).status for _ in range(2)] == [200, 200]
    app.close()
    assert used_today(tmp_path / "keys.json") == {"alice": 16}
    again = guard(words.app, GuardOptions(keys_file=tmp_path / "keys.json"))
    assert ask(again, headers=ALICE).status == 200
    assert ask(again, headers=ALICE).status == 429


def test_use_is_saved_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.serve.limits.SAVE_EVERY_S", 0.01)
    app = made(tmp_path, Words(), tokens_per_day=20)

    async def ask_and_wait() -> None:
        await Client(headers=ALICE).run(app)
        while not used_today(tmp_path / "keys.json"):
            await asyncio.sleep(0.01)

    asyncio.run(ask_and_wait())
    assert used_today(tmp_path / "keys.json") == {"alice": 8}


def test_the_gateway_takes_only_so_many_whoever_asks(tmp_path: Path) -> None:
    words = Words()
    app = guard(words.app, GuardOptions(bounds=Bounds(max_requests=2)))

    async def everything() -> None:
        clients = [Client(chunks=[STREAM]) for _ in range(2)]
        tasks = [asyncio.create_task(client.run(app)) for client in clients]
        while words.open < 2:
            await asyncio.sleep(0)
        refused = await Client().run(app)
        assert (refused.status, refused.error["code"]) == (429, "server_busy")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await Client("/health", method="GET").run(app)).status == 200
        for _ in range(4):
            words.step.release()
        await asyncio.gather(*tasks)
        assert (await Client().run(app)).status == 200

    asyncio.run(everything())
