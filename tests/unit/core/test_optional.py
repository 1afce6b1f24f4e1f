"""A package is kept out until it is asked for, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import json
from tunesmith.core.optional import load, postpone
postpone("wave", "json")
try:
    import wave
except ImportError:
    print("kept out")
assert load("wave").open and load("json") is json
import wave
print(wave.__name__)
try:
    load("no_such_package")
except ImportError as error:
    print(error.name)
"""


def test_kept_out_until_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["kept out", "wave", "no_such_package"]
