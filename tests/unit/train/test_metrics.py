"""The loss curve of a run that was interrupted is the curve as if it never had been."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.events import EventLog
from tunesmith.train.metrics import final_events, loss_curve


def test_steps_done_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        for step in (1, 2, 3):
            events.write("step", step=step, loss=float(step))
        events.write("resume", step=1)
        events.write("step", step=2, loss=2.5)
    assert loss_curve(path) == {1: 1.0, 2: 2.5}
    with EventLog(path) as events:
        events.write("resume", step=0)
        events.write("step", step=1, loss=1.5)
    assert loss_curve(path) == {1: 1.5}


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        events.write("step", step=1, loss=0.1 + 0.2)
    with path.open("a") as file:
        file.write('{"event": "step", "step": 2, "lo')
    assert loss_curve(path) == {1: 0.1 + 0.2}


def test_every_prompt_of_a_step_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        for prompt in "ab":
            events.write("sample", step=1, prompt=prompt, answer=prompt.upper())
    assert [event["answer"] for event in final_events(path, "sample")] == ["A", "B"]
