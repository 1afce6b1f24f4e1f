"""What a key may ask for: requests a minute, at once, and tokens a day; and what the gateway bears."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.serve.keys import Key, Rate
from tunesmith.serve.quota import TokenUsage, seconds_left_today
from tunesmith.serve.record import RequestRecord, record_of
from tunesmith.serve.refuse import Refused, refuse

KEY = "tunesmith.key"
"""Where the scope has the request's key."""
SAVE_EVERY_S = 5.0


class Bucket:
    """A token bucket: holds at most `rate.count`, and fills again within `rate.period_s`.

    Times are seconds of a monotonic clock.
    """

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate, self._level, self._at = rate, float(rate.count), now

    @property
    def _per_s(self) -> float:
        return self.rate.count / self.rate.period_s

    def level(self, now: float) -> float:
        self._level = min(float(self.rate.count), self._level + (now - self._at) * self._per_s)
        self._at = now
        return self._level

    def take(self, now: float) -> float:
        """0 when one was taken, else the seconds until there is one."""
        level = self.level(now)
        # Rounded: a client that waits exactly as long as it was told must not find 0.9999999.
        if level < 1 - 1e-6:
            return (1 - level) / self._per_s
        self._level = level - 1
        return 0.0

    def full_in_s(self, now: float) -> float:
        return (self.rate.count - self.level(now)) / self._per_s


@dataclass
class _Use:
    """What one key has under way."""

    records: set[RequestRecord] = field(default_factory=set)
    bucket: Bucket | None = None


class Limiter:
    """Admits requests. max_requests: most that the whole gateway has under way, in line or running.

    A quota of tokens is looked at before a request; those under way when it is used up are finished.
    """

    def __init__(self, usage: TokenUsage, max_requests: int) -> None:
        self.usage, self.max_requests = usage, max_requests
        self.records: set[RequestRecord] = set()
        self._uses: dict[str, _Use] = {}

    @property
    def running(self) -> int:
        return len(self.records)

    @contextmanager
    def admitted(self, key: Key | None, record: RequestRecord, *, works: bool) -> Iterator[None]:
        """Inside, the request counts; afterwards its tokens do. Raises Refused.

        works: it is more than a look at some state.
        """
        use = _Use() if key is None else self._uses.setdefault(key.name, _Use())
        if works:
            self._check_gateway()
        if key is not None:
            self._check_key(key, use, works=works)
        if works:
            self.records.add(record)
            use.records.add(record)
        try:
            yield
        finally:
            self.records.discard(record)
            use.records.discard(record)
            if key is not None and record.total_tokens:
                self.usage.add(key.name, record.total_tokens)

    def used(self, key: Key) -> int:
        """Tokens of today, those of requests under way included."""
        use = self._uses.get(key.name, _Use())
        return self.usage.used(key.name) + sum(record.total_tokens for record in use.records)

    def _check_gateway(self) -> None:
        if self.running >= self.max_requests:
            raise Refused(
                f"the server has {self.running} requests under way, as many as it takes; try again soon",
                status=429,
                code="server_busy",
                retry_after_s=2,
            )

    def _check_key(self, key: Key, use: _Use, *, works: bool) -> None:
        """What the key has at the moment first: a request refused for that costs none of its rate."""
        if works and key.concurrency is not None and len(use.records) >= key.concurrency:
            raise Refused(
                f"the API key '{key.name}' has {len(use.records)} requests under way, as many as it may",
                status=429,
                code="concurrency_limit_exceeded",
                headers=self.headers(key),
            )
        if works and key.tokens_per_day is not None and self.used(key) >= key.tokens_per_day:
            self._refuse_quota(key)
        if (rate := key.request_rate) is not None:
            self._take(key, use, rate)

    def _take(self, key: Key, use: _Use, rate: Rate) -> None:
        now = time.monotonic()
        if use.bucket is None or use.bucket.rate != rate:
            use.bucket = Bucket(rate, now)
        wait_s = use.bucket.take(now)
        if wait_s > 0:
            raise Refused(
                f"the API key '{key.name}' has used its rate of {key.rate} requests; "
                f"try again in {duration(wait_s)}",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
                headers=self.headers(key),
            )

    def _refuse_quota(self, key: Key) -> None:
        left_s = seconds_left_today()
        raise Refused(
            f"the API key '{key.name}' has used its {key.tokens_per_day} tokens of today; "
            f"the next day (UTC) begins in {duration(left_s)}",
            status=429,
            code="insufficient_quota",
            kind="insufficient_quota",
            retry_after_s=math.ceil(left_s),
            # The official clients would otherwise try again within seconds.
            headers=self.headers(key) | {"x-should-retry": "false"},
        )

    def headers(self, key: Key) -> dict[str, str]:
        """The key's limits and what is left of them, under OpenAI's names."""
        told: dict[str, str] = {}
        use = self._uses.get(key.name)
        if use is not None and use.bucket is not None and key.rate is not None:
            now = time.monotonic()
            left = str(math.floor(use.bucket.level(now) + 1e-6))
            told |= _told("requests", str(use.bucket.rate.count), left, use.bucket.full_in_s(now))
        if key.tokens_per_day is not None:
            left = str(max(0, key.tokens_per_day - self.used(key)))
            told |= _told("tokens", str(key.tokens_per_day), left, seconds_left_today())
        return told


def _told(what: str, limit: str, left: str, reset_s: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": limit,
        f"x-ratelimit-remaining-{what}": left,
        f"x-ratelimit-reset-{what}": duration(reset_s),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes times in headers: `250ms`, `8.6s`, `6m0s`, `23h59m1s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


class Limited:
    """Lets requests through as the limiter admits them, and counts what they used when they have ended."""

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self._app, self._limiter = app, limiter
        self._saver: asyncio.TimerHandle | None = None
        self._saving: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: Key | None = scope.get(KEY)

        async def with_headers(message: Message) -> None:
            if key is not None and message["type"] == "http.response.start":
                told = self._limiter.headers(key).items()
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in told),
                ]
            await send(message)

        with ExitStack() as stack:
            try:
                works = scope["method"] == "POST"
                stack.enter_context(self._limiter.admitted(key, record_of(scope), works=works))
            except Refused as error:
                await refuse(scope, receive, send, error)
                return
            stack.callback(self._save_soon)
            await self._app(scope, receive, with_headers)

    def _save_soon(self) -> None:
        if self._saver is None:
            self._saver = asyncio.get_running_loop().call_later(SAVE_EVERY_S, self._save)

    def _save(self) -> None:
        self._saver = None
        if self._limiter.usage.unsaved:
            self._saving = asyncio.get_running_loop().run_in_executor(None, self._limiter.usage.flush)
