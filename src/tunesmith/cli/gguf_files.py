"""The process that makes GGUF files, started by `tunesmith serve` and never by hand: PARENT_PID JOBS.

Its last line on stdout is the error that it met.
It is tied to its parent before anything heavy is imported: until then nothing would end it when the parent
dies.
"""

from __future__ import annotations

import sys

from tunesmith.core.optional import postpone
from tunesmith.core.proc import end_with_parent


def main(args: list[str]) -> int:
    end_with_parent(int(args[0]))
    postpone("bitsandbytes", "deepspeed")  # as the command does

    from tunesmith.workflows.make_gguf_files import run

    error = run(args[1])
    if error is not None:
        print(error)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
