"""Published, measured memory peaks: read, predicted, scored.

A row (one JSON object a line) tells a configuration and the peak that was measured. Whoever understands the
configuration predicts it; a row that nobody understands, or without a measured peak, is skipped with the
reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.plan.facts_serving import predict_serving
from tunesmith.plan.facts_types import Prediction, Row, Skipped
from tunesmith.plan.stock import predict_stock
from tunesmith.plan.stock_kernels import predict_kernel
from tunesmith.plan.stock_native import predict_native
from tunesmith.plan.stock_sharded import predict_sharded

Answer = Prediction | Skipped
NEEDED = ("id", "kind")


def _serving(row: Row) -> Answer | None:
    return predict_serving(row) if row["kind"].startswith("serve") else None


# Asked in this order; None: the row is of another kind.
PREDICTORS: Sequence[Callable[[Row], Answer | None]] = (
    _serving,
    predict_kernel,
    predict_native,
    predict_sharded,
    predict_stock,
)


@dataclass(frozen=True)
class Scored:
    """What came of one row: a prediction beside the measured peak, in GiB, or why it was skipped."""

    id: str
    predicted_gib: float | None = None
    measured_gib: float | None = None
    skipped: str | None = None
    row: Row = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        if self.predicted_gib is None or not self.measured_gib:
            return None
        return self.predicted_gib / self.measured_gib - 1

    def as_dict(self) -> dict[str, Any]:
        if self.skipped is not None:
            return {"id": self.id, "skipped": self.skipped}
        return {
            "id": self.id,
            "predicted_gib": self.predicted_gib,
            "measured_gib": self.measured_gib,
            "error": self.error,
        }


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines. Raises UserError naming the first line that is none."""
    rows = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text: {error}", hint="name a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(line, f"{path}:{number}"))
    return rows


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error}", hint="one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: {line.strip()[:60]!r} is not a JSON object", hint="one JSON object a line")
    for name in NEEDED:
        if not isinstance(row.get(name), str):
            raise UserError(
                f"{place}: {name!r} is {row.get(name)!r}, not a text", hint=f"give the row its {name}"
            )
    return row


def measured(row: Row) -> float | Skipped:
    """The measured peak in GiB, or why there is none."""
    if row.get("outcome") not in (None, "ok"):
        return Skipped(f"no measured peak: the outcome is {row['outcome']}")
    peak = row.get("peak_gib")
    if peak is None:
        return Skipped("no measured peak")
    if isinstance(peak, bool) or not isinstance(peak, int | float) or not peak > 0:
        return Skipped(f"the measured peak is {peak!r}, not a number of GiB above 0")
    return float(peak)


def score(row: Row) -> Scored:
    """Predict one row and set it beside what was measured."""
    peak = measured(row)
    if isinstance(peak, Skipped):
        return Scored(row["id"], skipped=peak.reason, row=row)
    answer = predict(row)
    if isinstance(answer, Skipped):
        return Scored(row["id"], measured_gib=peak, skipped=answer.reason, row=row)
    return Scored(row["id"], round(answer.gib, 4), peak, row=row, detail=answer.detail)


def predict(row: Row) -> Answer:
    """The first answer of those who know this kind of row and its stack."""
    for known in PREDICTORS:
        try:
            answer = known(row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return Skipped(f"the row is not understood: {type(error).__name__}: {error}")
        if answer is not None:
            return answer
    return Skipped(f"rows of the kind {row['kind']!r} with this stack are not known")


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """What `tunesmith plan --facts` prints: every row, and the median and 90th percentile of |error|."""
    errors = sorted(abs(row.error) for row in rows if row.error is not None)
    return {
        "rows": [row.as_dict() for row in rows],
        "n": len(errors),
        "skipped": sum(row.skipped is not None for row in rows),
        "median_abs_error": percentile(errors, 0.5),
        "p90_abs_error": percentile(errors, 0.9),
    }


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Linear between the two values about that place; None of nothing. ordered: ascending."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
