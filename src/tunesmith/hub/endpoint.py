"""Where repositories can be had: a hub or its mirror, ModelScope, or a folder; and which secret goes where.

A token is sent to the host it was made for and to no other: $HF_TOKEN to huggingface.co and to
$HF_ENDPOINT (as huggingface_hub does), $MODELSCOPE_API_TOKEN to ModelScope and $MODELSCOPE_ENDPOINT. An
endpoint that a recipe or an option names gets none: a recipe may come from a stranger.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tunesmith.core.errors import UserError
from tunesmith.core.hub_cache import hub_home
from tunesmith.core.net import origin, shown

Kind = Literal["model", "dataset"]
Layout = Literal["hub", "modelscope", "folder"]

HUB = "https://huggingface.co"
HUB_MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://www.modelscope.cn"
MODELSCOPE_HOSTS = ("modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai")
SHORT = {"hub": HUB, "huggingface": HUB, "hf-mirror": HUB_MIRROR}


@dataclass(frozen=True)
class Endpoint:
    """`place`: the URL without a trailing slash, or the folder's path."""

    place: str
    layout: Layout

    def __str__(self) -> str:
        return self.place if self.layout == "folder" else shown(self.place)

    def secrets(self) -> dict[str, str]:
        """The headers with the user's token where this endpoint is what the token is for."""
        if self.layout == "hub" and _is_one_of(self.place, (HUB, os.environ.get("HF_ENDPOINT", ""))):
            token = hub_token()
            return {"Authorization": f"Bearer {token}"} if token else {}
        own = (*(f"https://{host}" for host in MODELSCOPE_HOSTS), os.environ.get("MODELSCOPE_ENDPOINT", ""))
        if self.layout == "modelscope" and _is_one_of(self.place, own):
            token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
            return {"Cookie": f"m_session_id={token}"} if token else {}
        return {}


def parse_endpoint(text: str) -> Endpoint:
    """An endpoint as a user writes it: URL, `hub`, `hf-mirror`, `modelscope`, `modelscope:URL`, or a folder.

    Raises UserError when it is none of them.
    """
    given = text.strip().rstrip("/")
    if given == "modelscope":
        given = "modelscope:" + (os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE).rstrip("/")
    layout: Layout = "modelscope" if given.startswith("modelscope:") else "hub"
    url = SHORT.get(given, given.removeprefix("modelscope:"))
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0:
            known = parts.hostname.lower() in MODELSCOPE_HOSTS
            return Endpoint(url, "modelscope" if known else layout)
    except ValueError:  # a port that is no number, an address cut short
        raise _no_endpoint(text) from None
    folder = Path(url.removeprefix("file://")).expanduser()
    if given and layout == "hub" and folder.is_dir():
        return Endpoint(str(folder.absolute()), "folder")
    raise _no_endpoint(text)


def default_endpoints() -> list[str]:
    """$HF_ENDPOINT, else the hub."""
    return [os.environ.get("HF_ENDPOINT") or HUB]


def hub_token() -> str:
    """$HF_TOKEN, else the one that `hf auth login` has stored, else ""."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").lower() in ("1", "true", "yes", "on"):
        return ""
    path = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _is_one_of(url: str, owners: tuple[str, ...]) -> bool:
    return any(owner and origin(owner) == origin(url) for owner in owners)


def _no_endpoint(text: str) -> UserError:
    without_password = re.sub(r"//[^/@]*@", "//", text)
    return UserError(
        f"endpoint '{without_password}' is no URL, no folder here and no known name",
        hint="write https://your.mirror, hub, hf-mirror, modelscope, modelscope:URL or a folder",
    )
