"""The only place that speaks HTTP itself (hub downloads go through huggingface_hub)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from tunesmith.core.errors import TunesmithError


def post_json(url: str, body: Any, *, timeout_s: float = 60.0, api_key: str | None = None) -> Any:
    """POST a JSON body and return the JSON answer. Raises TunesmithError when there is no good answer."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.post(url, json=body, timeout=timeout_s, headers=headers)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise TunesmithError(f"{url}: {error}") from None


def wait_until_ready(url: str, *, alive: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait until GET `url` answers 200; give up when `alive()` says that the server has ended."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if not alive():
            raise TunesmithError(f"the server behind {url} ended before it was ready")
        time.sleep(0.2)
    raise TunesmithError(f"{url} was not ready after {timeout_s:g} s")
