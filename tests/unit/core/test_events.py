from __future__ import annotations

import json
from pathlib import Path

from tunesmith.core.events import EventLog, read_events


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=1, loss=0.1 + 0.2)
        log.write("eval", loss=2.0)
        log.write("step", step=2, loss=1.0)
    assert [e["event"] for e in read_events(path)] == ["step", "eval", "step"]
    assert [e["loss"] for e in read_events(path, "step")] == [0.1 + 0.2, 1.0]


def test_a_line_cut_by_a_crash_is_skipped_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=1)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    with EventLog(path) as log:
        log.write("step", step=2)
    assert [e["step"] for e in read_events(path)] == [1, 2]


def test_numbers_that_json_lacks_are_text(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", loss=float("nan"), nested={"norms": [float("inf"), 1.0]})
    event = json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    assert event["loss"] == "nan" and event["nested"] == {"norms": ["inf", 1.0]}


def test_no_file_means_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "none.jsonl")) == []
