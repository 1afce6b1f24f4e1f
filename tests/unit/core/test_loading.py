"""Garbage collection stands still during a first load alone; in a process of its own, as it changes it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from tunesmith.core.loading import first_load
with first_load("wave"):
    assert not gc.isenabled()
    import wave
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 1000
with first_load("wave"):
    assert gc.isenabled()
assert gc.get_freeze_count() == frozen
try:
    with first_load("no_such_package"):
        import no_such_package
except ImportError as error:
    print(error.name)
assert gc.isenabled()
gc.disable()
with first_load("no_such_package"):
    pass
assert not gc.isenabled()
"""


def test_collection_stands_still_during_the_first_load() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no_such_package"]
