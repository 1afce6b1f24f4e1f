"""The process of an engine, started by `tunesmith serve` and never by hand: PARENT_PID SOCKET.

It is tied to its parent before anything heavy is imported: until then nothing would end it when the parent
dies.
"""

from __future__ import annotations

import os
import signal
import sys

from tunesmith.core.optional import postpone
from tunesmith.core.proc import end_with_parent


def main(args: list[str]) -> int:
    end_with_parent(int(args[0]))
    # Both are for the parent to act upon: it lets the requests end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    postpone("bitsandbytes", "deepspeed")  # as the command does

    from tunesmith.workflows.engine_process import run

    return run(int(args[1]))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Threads of the engine, or of torch, that still compute have nothing left to say.
    os._exit(code)
