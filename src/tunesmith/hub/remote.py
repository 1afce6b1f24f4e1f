"""Hub models: several endpoints in order, safetensors only, a commit for every revision, resumable.

The cache is huggingface_hub's own ($HF_HOME, $HF_HUB_CACHE), so that other programs share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunesmith.hub.model_files import ModelFiles, check_model_folder
from tunesmith.hub.repo import Snapshot, fetch_repo
from tunesmith.hub.selection import Selection
from tunesmith.hub.wish import Wish
from tunesmith.model.weights import is_adapter


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
    wish = Wish("model", name, revision, tuple(endpoints or ()), offline=offline, progress=progress)
    return model_files(wish, fetch_repo(wish))


def model_files(wish: Wish, snapshot: Snapshot) -> ModelFiles:
    """A snapshot as a model. Raises UserError where the default choice of files makes no whole model."""
    folder = snapshot.folder
    chosen = replace(wish.selection, allow_pickle=False) != Selection()
    if not (chosen or wish.selection.allow_pickle or is_adapter(folder)):
        check_model_folder(folder)
    return ModelFiles(
        folder=folder,
        name=wish.name,
        source="hub",
        origin=wish.name,
        tokenizer=folder,
        revision=snapshot.commit,
    )
