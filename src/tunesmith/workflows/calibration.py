"""Rows of a run's own data, as the training saw them: to calibrate a quantised export on, and to judge it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunesmith.data.store import TokenStore
from tunesmith.export.quality import Row
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.train_data import open_data

TRAIN_ROWS, TRAIN_TOKENS = 128, 512
JUDGED_ROWS, JUDGED_TOKENS = 32, 1024


@dataclass(frozen=True)
class RunRows:
    """trained: token ids of rows that were trained on. judged: held out, empty where none were."""

    trained: list[list[int]] = field(default_factory=list)
    judged: list[Row] = field(default_factory=list)


def run_rows(recipe: Recipe, tokenizer: Any) -> RunRows:
    """Rows of the run with this resolved `recipe`, evenly through its data, long ones cut.

    Raises UserError where the data cannot be read any more.
    """
    prepared = open_data(recipe, tokenizer).prepared
    trained = [ids for ids, _ in _spread(prepared.train, TRAIN_ROWS, TRAIN_TOKENS)]
    judged = [row for row in _spread(prepared.eval, JUDGED_ROWS, JUDGED_TOKENS) if _supervised(row)]
    return RunRows(trained, judged)


def _spread(store: TokenStore, count: int, max_tokens: int) -> list[Row]:
    places = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(int))
    return [_row(store, int(place), max_tokens) for place in places] if len(store) else []


def _row(store: TokenStore, index: int, max_tokens: int) -> Row:
    """Of a pair, the prompt and the chosen answer."""
    ids, labels = store[index]
    branches = store.branches_of(index)
    end = min(max_tokens, int(branches[:2].sum()) or len(ids))
    return ids[:end].tolist(), labels[:end].tolist()


def _supervised(row: Row) -> bool:
    return any(label != -100 for label in row[1][1:])
