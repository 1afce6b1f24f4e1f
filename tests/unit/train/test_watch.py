"""A rank that falls silent ends the others; ranks that live, and those that have finished, do not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

PROGRAM = """
import os, sys, time
import torch.distributed as dist
from tunesmith.train.ranks import ranks_from
from tunesmith.train.watch import Watch
ranks = ranks_from(os.environ)
dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.size)
with Watch(ranks, beat_s=0.2, silent_s=float(sys.argv[1])):
    dist.barrier()
    print("met", flush=True)
    sys.stdin.readline()
print("over", flush=True)
"""


def start(rank: int, port: int, silent_s: float) -> subprocess.Popen[str]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM, str(silent_s)]
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def two(silent_s: float) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = [start(rank, port, silent_s) for rank in range(2)]
    for process in found:
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n"
    return found


def test_both_ends_of_a_lost_connection_end() -> None:
    """Neither process is in a collective: only the watch can notice."""
    for victim in (0, 1):
        processes = two(silent_s=2.0)
        processes[victim].kill()
        processes[victim].communicate()
        assert processes[1 - victim].wait(60) == 4
        errors = processes[1 - victim].communicate()[1]
        assert "has given no sign of life for 2 s" in errors


def test_living_ranks_and_finished_ones_are_left_alone() -> None:
    processes = two(silent_s=30.0)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert [out for out, _ in ends] == ["over\n", "over\n"]
