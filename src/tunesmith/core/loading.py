"""Large packages loaded without garbage collection."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_load(name: str) -> Iterator[None]:
    """Switch garbage collection off while the package `name` and others with it are imported, and never look
    at what they made again.

    torch and transformers make 400,000 objects that stay until the process ends. Searching them for garbage,
    again and again while they grow and once more at the end, takes a third of a short command's time. Does
    nothing when the package is there already: then the process may have garbage of its own.
    """
    if name in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
