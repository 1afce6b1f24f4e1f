"""Packages that others import wherever they are installed, kept out until somebody asks for them."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def postpone(*names: str) -> None:
    """Let `import NAME` fail as if the package were not installed, unless it is loaded already.

    For the program's own process only, before anything else is imported: peft imports bitsandbytes at every
    start, which takes over two seconds, and only qlora and 8-bit optimizers use it; transformers imports
    deepspeed whenever it saves a model, half a second that only DeepSpeed's own engine needs.
    """
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def load(name: str) -> Any:
    """The module, postponed or not. Raises ImportError when it is not installed."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]
    return importlib.import_module(name)
