"""Keeps what llm-compressor and compressed-tensors print from the terminal."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

PACKAGES = ("llmcompressor", "compressed_tensors")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No bars and notes of PACKAGES, which must be installed, within the context."""
    from loguru import logger

    for name in PACKAGES:
        logger.disable(name)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name in PACKAGES:
            logger.enable(name)
