"""Published rows: reading, scoring, and what is said of what cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.plan.facts import Scored, measured, percentile, predict, read_rows, score, summary
from tunesmith.plan.facts_types import Prediction, Skipped

PUBLISHED = os.environ.get("TUNESMITH_TEST_FACTS", "")


def _kernel_row(**changed: Any) -> dict[str, Any]:
    row = {
        "id": "logits",
        "kind": "kernel",
        "source": "Liger-Kernel benchmark",
        "config": {"hidden": None, "vocab": 1024},
        "seq_len": 2048,
        "micro_batch": 1,
        "loss_impl": "torch CrossEntropyLoss",
        "precision": "fp32",
        "outcome": "ok",
        "peak_gib": 0.04,
    }
    return row | changed


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_rows_are_read_and_empty_lines_left_out(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"id": "a", "kind": "train"}', "", '{"id": "b", "kind": "kernel"}')
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"kind": "train"}', "'id' is None"),
        ('{"id": "a", "kind": 3}', "'kind' is 3"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, fault: str) -> None:
    path = _file(tmp_path, '{"id": "a", "kind": "train"}', line)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*" + fault):
        read_rows(path)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not readable"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"outcome": "oom", "peak_gib": None}, "the outcome is oom"),
        ({"outcome": "failed_presumed_oom", "peak_gib": 3.0}, "failed_presumed_oom"),
        ({"outcome": "ok", "peak_gib": None}, "no measured peak"),
        ({"outcome": "ok", "peak_gib": "12"}, "'12', not a number"),
        ({"outcome": "ok", "peak_gib": True}, "not a number"),
        ({"outcome": "ok", "peak_gib": -1}, "not a number of GiB above 0"),
    ],
)
def test_rows_without_a_measured_peak(row: dict[str, Any], reason: str) -> None:
    found = measured(row)
    assert isinstance(found, Skipped) and reason in found.reason


def test_a_row_is_set_beside_its_measurement() -> None:
    # 2048 x 1024 fp32 logits are 8 MiB; five of them: logits, their gradient, softmax and two gradients on the
    # way. Beside them a few numbers and the labels.
    scored = score(_kernel_row())
    assert scored.predicted_gib == pytest.approx(40 / 1024, rel=2e-3)
    assert scored.error == pytest.approx(scored.predicted_gib / 0.04 - 1)
    assert scored.as_dict()["measured_gib"] == 0.04


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "kind": "tune a radio"},
        {"id": "b", "kind": "train"},
        {"id": "c", "kind": "train", "config": "none", "method": 3},
        {"id": "d", "kind": "kernel"},
        {"id": "e", "kind": "serve_hf"},
        {"id": "f", "kind": "train", "num_gpus": "many", "config": []},
    ],
)
def test_what_is_not_understood_is_skipped_with_a_reason(row: dict[str, Any]) -> None:
    answer = predict(row)
    assert isinstance(answer, Skipped) and answer.reason


def test_the_summary_counts_and_takes_percentiles() -> None:
    rows = [Scored(str(i), 1 + i / 100, 1.0) for i in range(11)] + [Scored("x", skipped="why")]
    told = summary(rows)
    assert told["n"] == 11 and told["skipped"] == 1
    assert told["median_abs_error"] == pytest.approx(0.05) and told["p90_abs_error"] == pytest.approx(0.09)
    assert told["rows"][-1] == {"id": "x", "skipped": "why"}
    assert set(told["rows"][0]) == {"id", "predicted_gib", "measured_gib", "error"}
    json.dumps(told)


def test_percentiles_lie_between_two_values() -> None:
    assert percentile([], 0.5) is None
    assert percentile([1.0, 3.0], 0.5) == 2.0
    assert percentile([0.0, 1.0, 2.0], 0.9) == pytest.approx(1.8)


@pytest.mark.skipif(not PUBLISHED, reason="TUNESMITH_TEST_FACTS names no file of published rows")
def test_published_peaks_of_losses_are_met() -> None:
    rows = [row for row in read_rows(Path(PUBLISHED)) if row["kind"] == "kernel"]
    answers = [predict(row) for row in rows]
    known = [
        (a.gib, row["peak_gib"]) for a, row in zip(answers, rows, strict=True) if isinstance(a, Prediction)
    ]
    assert len(known) == len(rows)
    assert max(abs(gib / peak - 1) for gib, peak in known) < 0.005
