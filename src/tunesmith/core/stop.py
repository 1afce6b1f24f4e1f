"""SIGINT and SIGTERM ask what is running to stop; a second SIGINT ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from tunesmith.core.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVING = "{}: finishing the step, then saving"


_from_elsewhere: list[int] = []


def ask_to_stop(number: int) -> None:
    """As this signal would, for a process whose training is not in its main thread: from any thread, before
    the training has begun or after."""
    if not _from_elsewhere:
        say(SAVING.format(signal.Signals(number).name))
    _from_elsewhere.append(number)


class StopRequest:
    """`with StopRequest() as stop:` ... `if stop.signal_number:` finish, save, leave.

    Signals can be caught in the main thread only; elsewhere only `ask_to_stop` is heard. told: what is said
    then, with the signal's name for {}.
    """

    def __init__(self, told: str = SAVING) -> None:
        self._told = told
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def signal_number(self) -> int | None:
        return self._caught or next(iter(_from_elsewhere), None)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _from_elsewhere.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = number
        say(self._told.format(signal.Signals(number).name))
