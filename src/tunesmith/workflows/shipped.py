"""Files that come with tunesmith beside its modules: recipes and examples."""

from __future__ import annotations

from pathlib import Path

import tunesmith
from tunesmith.core.errors import UserError


def shipped(name: str) -> Path:
    """A file that comes with tunesmith: from the source tree, or from the installed package."""
    package = Path(tunesmith.__file__).parent
    for root in (package.parents[1], package / "shipped"):
        if (root / name).is_file():
            return root / name
    raise UserError(f"{name}: this installation has no such file", hint="install tunesmith again")
