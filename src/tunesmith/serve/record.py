"""What one request is and becomes: guard() puts a record into the ASGI scope, the API fills in its part.

    record = record_of(request.scope)
    record.use(served.name, adapter=served.adapter)     once found; refuses what the key may not use
    record.prompted(job.prompt_tokens)                  when the prompt has been counted
    record.cached_tokens = job.cached_tokens            when it is known how many were not computed again
    record.emitted(number of new tokens)                at each arrival of tokens, whole answers included
    record.finish = "stop"                              reason of the (last) answer

Limits, metrics, access log and traces read the record when the request has ended, however it ended: a
client that leaves in mid-stream has used the tokens counted until then.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, cast

from tunesmith.serve.errors import ApiError

SCOPE_KEY = "tunesmith"
CLIENT_CLOSED = 499


@dataclass(slots=True, eq=False)
class RequestRecord:
    """Times ending in _s are seconds since `started`, which is on the monotonic clock.

    key_name: None where no key was asked for. models: what the key may use, None: everything. status: 499
    when the client left before the answer began; disconnected: it left before the answer was whole. route:
    the path as the API declares it, "other" for one that it has not. error: the code of a
    refusal, or of the failure that ended a stream.
    """

    request_id: str = ""
    method: str = "GET"
    path: str = ""
    client: str | None = None
    key_name: str | None = None
    models: frozenset[str] | None = None
    started: float = field(default_factory=time.monotonic)
    time: float = field(default_factory=time.time)
    trace_parent: str | None = None

    model: str | None = None
    adapter: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    finish: str | None = None

    status: int = CLIENT_CLOSED
    disconnected: bool = False
    route: str = "other"
    duration_s: float = 0.0
    error: str | None = None
    request_text: str | None = None
    answer_text: str | None = None

    def may_use(self, model: str) -> bool:
        """Whether the request's key may use a model; for listing only those."""
        return self.models is None or model in self.models

    def use(self, model: str, *, adapter: str | None = None) -> None:
        """The model that answers, by its served name. Raises ApiError when the key may not use it."""
        if not self.may_use(model):
            raise ApiError(
                f"the API key '{self.key_name}' may not use the model '{model}'",
                status=403,
                param="model",
                code="model_not_allowed",
            )
        self.model, self.adapter = model, adapter

    def prompted(self, tokens: int) -> None:
        """Count the prompt's tokens."""
        self.prompt_tokens += tokens

    def emitted(self, tokens: int) -> None:
        """Count tokens that arrive now, of all choices together."""
        if tokens <= 0:
            return
        now = time.monotonic() - self.started
        if self.last_token_s is None:
            self.first_token_s = now
        else:
            self.gaps_s.append(now - self.last_token_s)
        self.last_token_s = now
        self.completion_tokens += tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The request's record; where no guard() stands before the application, one that nobody reads."""
    return cast(RequestRecord, scope.setdefault(SCOPE_KEY, RequestRecord()))
