"""Prompts with several answers, by hand."""

from __future__ import annotations

import numpy as np
import torch

from tunesmith.model.attention import PackedLayout
from tunesmith.model.batch import IGNORE, join
from tunesmith.model.branches import BranchedLayout, layout_of


def test_positions_and_predictors() -> None:
    ids = np.arange(12)
    branches = np.array([[2, 3, 2], [1, 1, 3]])
    batch = join([(ids[:7], ids[:7]), (ids[7:], ids[7:])], (4, 9), branches)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 1, 2, 3]
    assert batch.predictors.tolist() == [-1, 0, 1, 2, 3, 1, 5, 6, 7, 7, 9, 10]
    assert batch.labels[[0, 7]].tolist() == [IGNORE, IGNORE]
    second = batch.part(1, 2)
    assert second.rows == (9,) and second.positions.tolist() == [0, 1, 1, 2, 3]


def test_every_answer_sees_its_prompt_and_itself() -> None:
    ids = np.arange(12)
    batch = join([(ids[:7], ids[:7]), (ids[7:], ids[7:])], (), np.array([[2, 3, 2], [1, 1, 3]]))
    sees = [
        {0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1, 5}, {0, 1, 5, 6},
        {7}, {7, 8}, {7, 9}, {7, 9, 10}, {7, 9, 10, 11},
    ]  # fmt: skip
    q, k = torch.zeros(1, 2, 12, 12), torch.zeros(1, 1, 12, 12)
    v = torch.eye(12)[None, None]  # the output is each token's attention weights
    layout = layout_of(batch)
    assert isinstance(layout, BranchedLayout)
    out = layout.attend(0, q, k, v.expand(1, 1, 12, 12), 1.0)[0, :, 0]
    for token, expected in enumerate(sees):
        weights = torch.zeros(12)
        weights[list(expected)] = 1 / len(expected)
        torch.testing.assert_close(out[token], weights)


def test_plain_documents_keep_their_layout() -> None:
    ids = np.arange(5)
    assert isinstance(layout_of(join([(ids, ids)])), PackedLayout)
