"""What a user wants of a repository, and the words for why it cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.hub_cache import hub_cache, offline_mode
from tunesmith.core.net import NetError
from tunesmith.hub.endpoint import Endpoint, Kind, default_endpoints, parse_endpoint
from tunesmith.hub.selection import Selection

JOBS = 8
SLOW_KIB_PER_S = 32.0
SLOW_AFTER_S = 15.0


@dataclass(frozen=True)
class Wish:
    """What is to be fetched, and how.

    endpoints: tried in order, as a user writes them; none: $HF_ENDPOINT, else the hub. jobs: files at the
    same time. slow_kib_per_s: a mirror slower than this for slow_after_s is left while another is there.
    """

    kind: Kind
    name: str
    revision: str | None = None
    endpoints: tuple[str, ...] = ()
    offline: bool = False
    selection: Selection = field(default_factory=Selection)
    jobs: int = JOBS
    slow_kib_per_s: float = SLOW_KIB_PER_S
    slow_after_s: float = SLOW_AFTER_S
    progress: bool = True

    @property
    def is_offline(self) -> bool:
        return self.offline or offline_mode()

    def places(self) -> list[Endpoint]:
        """The endpoints that may be asked: offline, the folders alone. Raises UserError for a wrong one."""
        found = [parse_endpoint(text) for text in self.endpoints or default_endpoints()]
        return [place for place in dict.fromkeys(found) if place.layout == "folder" or not self.is_offline]

    @property
    def noun(self) -> str:
        return "data set" if self.kind == "dataset" else "model"


class AllFailed(Exception):
    """No endpoint has listed the repository. refused: each said so itself."""

    def __init__(self, error: TunesmithError, *, refused: bool) -> None:
        super().__init__()
        self.error, self.refused = error, refused


def reason(error: NetError, wish: Wish) -> str:
    """Why an endpoint did not list the repository, in words."""
    if error.code == "GatedRepo":
        return f"access to the {wish.noun} is gated"
    if error.code == "RevisionNotFound" or (error.status == 404 and wish.revision and error.code == ""):
        return "it has no such revision"
    if error.status in (401, 403, 404):
        return f"it has no such {wish.noun}, or it is private"
    return error.what


def all_failed(wish: Wish, faults: Sequence[tuple[Endpoint, NetError]]) -> AllFailed:
    """The error that names every endpoint and its fault; a UserError where each has refused."""
    at = f" at revision '{wish.revision}'" if wish.revision else ""
    tried = "; ".join(f"{place}: {reason(error, wish)}" for place, error in faults)
    folder = "is no folder here, and " if wish.kind == "model" else ""
    what = f"'{wish.name}' {folder}as a hub {wish.noun}{at} could not be fetched from {tried}"
    refused = all(error.status in (401, 403, 404, 410, 451) for _, error in faults)
    if refused:
        hint = (
            "check the spelling; for a gated or private repository accept its terms on its page and set "
            "$HF_TOKEN (it is sent to huggingface.co and to $HF_ENDPOINT, to no other endpoint)"
        )
        return AllFailed(UserError(what, hint=hint), refused=True)
    hint = (
        "try a mirror (--endpoint, model.endpoint or $HF_ENDPOINT; hf-mirror and modelscope are short names)"
        ", or copy the folder from a machine that has it and give its path"
    )
    return AllFailed(TunesmithError(what, hint=hint), refused=False)


def not_cached(wish: Wish) -> UserError:
    """The error of offline mode without a copy."""
    at = f" at revision '{wish.revision}'" if wish.revision else ""
    option = " --dataset" if wish.kind == "dataset" else ""
    return UserError(
        f"offline mode is on, and the {wish.noun} '{wish.name}'{at} is not whole in the cache {hub_cache()}",
        hint=f"on a machine with network: tunesmith fetch{option} {wish.name}; then copy that folder here "
        "and give its path",
    )
