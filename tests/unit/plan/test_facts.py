"""Published rows: scoring, and what is said of what cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tunesmith.plan.facts import Scored, percentile, predict, score, summary
from tunesmith.plan.facts_rows import read_rows
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
        {"id": "g", "kind": None},
        {"id": "h", "kind": 3},
        {"id": "i", "kind": "serve_vllm", "peak_metric": "weights", "peak_extra": "0.9"},
    ],
)
def test_what_is_not_understood_is_skipped_with_a_reason(row: dict[str, Any]) -> None:
    answer = predict(row)
    assert isinstance(answer, Skipped) and answer.reason


def test_rows_of_one_id_are_each_predicted_and_named() -> None:
    told = summary([score(_kernel_row()), score(_kernel_row(peak_gib=0.05)), score(_kernel_row(id="other"))])
    assert told["n"] == 3 and told["repeated_ids"] == ["logits"]


def test_what_was_assumed_is_said_beside_the_prediction() -> None:
    assert Scored("a", 1.0, 1.0, assumed=("why",)).as_dict()["assumed"] == ["why"]
    assert "assumed" not in Scored("a", 1.0, 1.0).as_dict()


def test_numbers_written_as_texts_are_numbers() -> None:
    row = _kernel_row(seq_len="2,048", micro_batch=1.0, peak_gib="0.04", config={"vocab": "1024"})
    assert score(row).as_dict() == score(_kernel_row()).as_dict()


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
