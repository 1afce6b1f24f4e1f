"""What asks a training to stop, in the main thread and in others."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tunesmith.core.stop import StopRequest, ask_to_stop


def test_a_signal_is_noted_and_the_second_ctrl_c_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal_number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_training_outside_the_main_thread_is_asked_from_anywhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train() -> tuple[int | None, int | None]:
        with StopRequest() as stop:
            first = stop.signal_number
            ask_to_stop(signal.SIGTERM)
            ask_to_stop(signal.SIGINT)
            return first, stop.signal_number

    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(train).result() == (None, signal.SIGTERM)
        assert capsys.readouterr().err.count("SIGTERM: finishing the step") == 1
        ask_to_stop(signal.SIGINT)  # before it has begun
        assert elsewhere.submit(train).result() == (signal.SIGINT, signal.SIGINT)
        assert elsewhere.submit(train).result()[0] is None  # the next one has not been asked
