"""`python -m tests.e2e.forgetful ARGS`: the command, in which a training that is resumed has forgotten the
optimizer's averages, as some tools do."""

from __future__ import annotations

import sys
from typing import Any

from tunesmith.cli.main import main
from tunesmith.core.proc import Process, start


def start_like_this(args: list[str], **options: Any) -> Process:
    """A training that is this program too: what `verify` starts is `python -m tunesmith train …`."""
    return start([args[0], "-m", "tests.e2e.forgetful", *args[3:]], **options)


if __name__ == "__main__":
    from tunesmith.train import states
    from tunesmith.workflows import verify

    states.read_optimizer = lambda *args, **named: None  # type: ignore[assignment]
    verify.start = start_like_this
    main(sys.argv[1:])
