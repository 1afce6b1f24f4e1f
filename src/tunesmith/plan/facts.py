"""Published, measured memory peaks: read, predicted, scored.

A row (one JSON object a line) tells a configuration and the peak that was measured. Whoever understands the
configuration predicts it; a row that nobody understands, or without a measured peak, is skipped with the
reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.plan.facts_rows import measured, with_numbers
from tunesmith.plan.facts_serving import predict_serving
from tunesmith.plan.facts_types import Prediction, Row, Skipped
from tunesmith.plan.stock import predict_stock
from tunesmith.plan.stock_kernels import predict_kernel
from tunesmith.plan.stock_native import predict_native
from tunesmith.plan.stock_sharded import predict_sharded

Answer = Prediction | Skipped
KINDS = ("train", "kernel", "serve_hf", "serve_vllm")
# What a row of sizes that no model has may end in, inside of torch or transformers.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
    """What came of one row: a prediction beside the measured peak, in GiB, or why it was skipped.

    assumed: what the row leaves open and was taken to be so.
    """

    id: str
    predicted_gib: float | None = None
    measured_gib: float | None = None
    skipped: str | None = None
    row: Row = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        if self.predicted_gib is None or not self.measured_gib:
            return None
        return self.predicted_gib / self.measured_gib - 1

    def as_dict(self) -> dict[str, Any]:
        if self.skipped is not None:
            return {"id": self.id, "skipped": self.skipped}
        told = {
            "id": self.id,
            "predicted_gib": self.predicted_gib,
            "measured_gib": self.measured_gib,
            "error": self.error,
        }
        return told | ({"assumed": list(self.assumed)} if self.assumed else {})


def score(row: Row) -> Scored:
    """Predict one row and set it beside what was measured."""
    row = with_numbers(row)
    peak = measured(row)
    if isinstance(peak, Skipped):
        return Scored(row["id"], skipped=peak.reason, row=row)
    answer = predict(row)
    if isinstance(answer, Skipped):
        return Scored(row["id"], measured_gib=peak, skipped=answer.reason, row=row)
    gib = round(answer.gib, 4)
    return Scored(row["id"], gib, peak, row=row, detail=answer.detail, assumed=answer.assumed)


def predict(row: Row) -> Answer:
    """The first answer of those who know this kind of row and its stack. row: `with_numbers`."""
    if row.get("kind") not in KINDS:
        told = f"the kind of measurement is {row['kind']!r}" if row.get("kind") else "its kind is not told"
        return Skipped(f"{told}; known are {', '.join(KINDS)}")
    for known in PREDICTORS:
        try:
            answer = known(row)
        except FAULTS as error:
            told = str(error).strip().partition("\n")[0]
            return Skipped(f"the row is not understood: {type(error).__name__}: {told}")
        if answer is not None:
            return answer
    return Skipped(f"rows of the kind {row['kind']!r} with this stack are not known")


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """What `tunesmith plan --facts` prints: every row, and the median and 90th percentile of |error|.

    repeated_ids: those of several rows, where there are such; each of them is predicted by itself.
    """
    errors = sorted(abs(row.error) for row in rows if row.error is not None)
    repeated = sorted(name for name, times in Counter(row.id for row in rows).items() if times > 1)
    told = {
        "rows": [row.as_dict() for row in rows],
        "n": len(errors),
        "skipped": sum(row.skipped is not None for row in rows),
        "median_abs_error": percentile(errors, 0.5),
        "p90_abs_error": percentile(errors, 0.9),
    }
    return told | ({"repeated_ids": repeated} if repeated else {})


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Linear between the two values about that place; None of nothing. ordered: ascending."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
