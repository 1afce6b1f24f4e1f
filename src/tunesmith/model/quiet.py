"""Keep transformers and peft from writing to the terminal. Imports neither until it is used."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and peft's bars, notices and deprecations: our own errors say what matters."""
    from transformers.utils import logging as transformers_logging

    if not _sees_gpu():
        # transformers imports deepspeed where it is installed; that else writes to stdout that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # peft, of an adapter on a head that is tied to the embeddings: merging unties it here.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _sees_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
