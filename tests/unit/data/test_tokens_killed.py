"""Tokenising in processes: a kill of the one that began it leaves none of the others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tunesmith.workflows.verify import is_alive

ENDED_S = 60.0
TOKENISE = """
import multiprocessing, sys, time
from itertools import count
from transformers import AutoTokenizer
from tunesmith.data.formats import shape_of
from tunesmith.data.tokens import POOL_FROM_BYTES, RowEncoder, encode_rows

if __name__ == "__main__":
    shape = shape_of(["text"], "auto", {}, file="rows", place="data", pairs=False)
    encoder = RowEncoder(AutoTokenizer.from_pretrained(sys.argv[1]), shape, None)
    rows = ((number, {"text": f"row {number}"}) for number in count(1))
    chunks = encode_rows(encoder, rows, workers=2, num_bytes=POOL_FROM_BYTES)
    next(chunks)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_the_process_that_is_killed(smol: Path, tmp_path: Path) -> None:
    script = tmp_path / "tokenise.py"
    script.write_text(TOKENISE, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script), str(smol)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(map(is_alive, workers))
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + ENDED_S
    while (left := [pid for pid in workers if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
