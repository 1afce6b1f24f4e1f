"""What a command loads, seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from tunesmith.cli.main import main
try: main({args})
except SystemExit as stop: assert (stop.code or 0) in {codes}, stop.code
found = {heavy} & set(sys.modules)
assert not found, found
"""


def without(heavy: set[str], *args: str, codes: tuple[int, ...] = (0,)) -> str:
    """What `tunesmith ARGS` prints; it must end with one of `codes`, and load none of these packages."""
    code = CODE.format(args=list(args), codes=codes, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(args)}: {done.stderr}"
    return done.stdout
