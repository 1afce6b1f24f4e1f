"""Hub models: several endpoints in order, safetensors only, a commit for every revision, resumable.

The cache is huggingface_hub's own ($HF_HOME, $HF_HUB_CACHE), so that other programs share it.
"""

from __future__ import annotations

import fnmatch
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import sha256_file
from tunesmith.core.progress import say
from tunesmith.hub.model_files import ModelFiles, check_model_folder
from tunesmith.model.weights import is_adapter

HUB = "https://huggingface.co"
WEIGHTS = ["model*.safetensors", "adapter_model.safetensors"]
# Files beside the weights; code is stored but never run unless model.trust_remote_code is on.
PATTERNS = [
    *WEIGHTS,
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "spiece.model",
    "*.py",
    "LICENSE*",
    "README.md",
]
IGNORE = ["*/*"]  # exports for other programs lie in subfolders
COMMIT = re.compile(r"^[0-9a-f]{40}$")
TIMEOUT_S = 15.0


def default_endpoints() -> list[str]:
    return [os.environ.get("HF_ENDPOINT") or HUB]


def fetch_model(
    name: str,
    *,
    revision: str | None = None,
    endpoints: Sequence[str] | None = None,
    offline: bool = False,
    progress: bool = True,
) -> ModelFiles:
    """The hub model `name` (owner/name) in the cache, brought or completed from the first endpoint that can.

    Without network, or with `offline` or $HF_HUB_OFFLINE, a whole copy in the cache is taken. Raises
    UserError when the model, revision or safetensors do not exist or access is refused; TunesmithError
    naming every endpoint and its fault when none can be reached.
    """
    from huggingface_hub.constants import is_offline_mode

    places = [place.rstrip("/") for place in (endpoints or default_endpoints())]
    if offline or is_offline_mode() or (revision and COMMIT.match(revision)):
        folder = _cached(name, revision)
        if folder is None and (offline or is_offline_mode()):
            raise _not_cached(name, revision)
    else:
        folder = None
    if folder is None:
        folder = _fetch(name, revision, places, progress=progress)
    if not is_adapter(folder):
        check_model_folder(folder)
    return ModelFiles(
        folder=folder, name=name, source="hub", origin=name, tokenizer=folder, revision=folder.name
    )


def _fetch(name: str, revision: str | None, places: Sequence[str], *, progress: bool) -> Path:
    faults: list[tuple[str, Exception]] = []
    for place in places:
        try:
            return _from_endpoint(name, revision, place, progress=progress)
        except UserError:
            raise
        except Exception as error:  # the HTTP library's own types differ between releases
            faults.append((place, error))
            if len(places) > 1:
                say(f"{place}: {_reason(error)}")
    folder = _cached(name, revision)
    if folder is None or _all_refused(faults):
        raise _failure(name, revision, faults)
    say(f"{name}: no endpoint can be reached; the copy in the cache is used, commit {folder.name}")
    return folder


def _from_endpoint(name: str, revision: str | None, endpoint: str, *, progress: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi(endpoint=endpoint).model_info(name, revision=revision, timeout=TIMEOUT_S)
    names = [sibling.rfilename for sibling in info.siblings or []]
    _check_weights(name, names)
    began = time.time()
    with _bars(progress), _plain_http(endpoint):
        found = snapshot_download(
            name, revision=info.sha, endpoint=endpoint, allow_patterns=PATTERNS, ignore_patterns=IGNORE
        )
    folder = Path(found)
    if revision != info.sha:
        _remember(folder, revision or "main")
    _check_downloads(folder, since=began)
    return folder


def _check_weights(name: str, names: list[str]) -> None:
    """Refuse before gigabytes come: a repository without safetensors at its top."""
    if any(fnmatch.fnmatch(n, pattern) for n in names if "/" not in n for pattern in WEIGHTS):
        return
    ggufs = [n for n in names if n.endswith(".gguf")]
    if ggufs:
        raise UserError(
            f"{name}: holds GGUF files only",
            hint=f"download one ({ggufs[0]}) and give its path as model.path",
        )
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise UserError(
            f"{name}: its weights are pickles ({pickles[0]}), which can run any code when loaded; only "
            "safetensors are read",
            hint="https://huggingface.co/spaces/safetensors/convert opens a pull request with safetensors: "
            "give its number as model.revision: refs/pr/N",
        )
    raise UserError(f"{name}: holds no safetensors weights", hint="is it a model repository?")


def _remember(folder: Path, revision: str) -> None:
    """Note which commit a branch or tag stood for, as huggingface_hub does, so that offline use finds it."""
    reference = folder.parent.parent / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(folder.name)


def _check_downloads(folder: Path, *, since: float) -> None:
    """Check what just came: huggingface_hub compares sizes, but not the SHA-256 that names a large blob."""
    for path in sorted(folder.iterdir()):
        blob = path.resolve()
        if len(blob.name) == 64 and blob.stat().st_mtime >= since - 1 and sha256_file(blob) != blob.name:
            blob.unlink()
            path.unlink(missing_ok=True)
            raise TunesmithError(
                f"{path.name}: damaged on its way (its SHA-256 is not the hub's)", hint="fetch again"
            )


def _cached(name: str, revision: str | None) -> Path | None:
    """The whole copy of a revision in the cache, or None."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=PATTERNS, ignore_patterns=IGNORE
        )
    except Exception:  # not there, or not whole: the type differs between releases
        return None
    return Path(found)


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    was_off = are_progress_bars_disabled()
    if not progress and not was_off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not progress and not was_off:
            enable_progress_bars()


@contextmanager
def _plain_http(endpoint: str) -> Iterator[None]:
    """Mirrors serve files over HTTP; the xet protocol would go around them to the hub itself."""
    from huggingface_hub import constants

    was = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = was or endpoint != HUB
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = was


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _all_refused(faults: list[tuple[str, Exception]]) -> bool:
    return all(_status(error) in (401, 403, 404) for _, error in faults)


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "access to the model is gated"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such model, or it is private"
    status = _status(error)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"answers with status {status}" if status else text[:200]


def _failure(name: str, revision: str | None, faults: list[tuple[str, Exception]]) -> TunesmithError:
    at = f" at revision '{revision}'" if revision else ""
    tried = "; ".join(f"{place}: {_reason(error)}" for place, error in faults)
    what = f"'{name}' is no folder here, and as a hub model{at} it could not be fetched from {tried}"
    if _all_refused(faults):
        return UserError(
            what,
            hint="check the spelling; for a gated or private model accept its terms on its page and set "
            "$HF_TOKEN",
        )
    return TunesmithError(
        what,
        hint="try a mirror (model.endpoint or $HF_ENDPOINT), or copy the model folder from a machine that "
        "has it and give its path as model.path",
    )


def _not_cached(name: str, revision: str | None) -> UserError:
    from huggingface_hub import constants

    at = f" at revision '{revision}'" if revision else ""
    return UserError(
        f"offline mode is on, and the model '{name}'{at} is not whole in the cache {constants.HF_HUB_CACHE}",
        hint=f"on a machine with network: tunesmith fetch {name}; then copy that folder here, its path is "
        "then the model.path",
    )
