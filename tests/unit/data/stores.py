"""Token stores for tests that need no tokenizer."""

from __future__ import annotations

import numpy as np

from tunesmith.data.store import Pick, Rows, TokenStore


def rows_of(lengths: list[int], *, first_token: int = 100) -> Rows:
    """Rows in which every token of row r is first_token + r, and all but the first are supervised."""
    count = len(lengths)
    ids = np.repeat(np.arange(first_token, first_token + count), lengths).astype(np.uint32)
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[np.cumsum([0, *lengths])[:-1]] = False
    return Rows(
        ids=ids,
        mask=mask,
        lengths=np.array(lengths, dtype=np.int64),
        supervised=np.array(lengths, dtype=np.int64) - 1,
        numbers=np.arange(1, count + 1),
        digests=np.stack([np.arange(count), np.arange(count)], axis=1).astype(np.uint64),
        marks=np.zeros((count, 4), dtype=np.uint16),
        branches=np.zeros((count, 3), dtype=np.int64),
        format="text",
    )


def store_of(*sources: list[int], weights: tuple[float, ...] = (), max_length: int = 64) -> TokenStore:
    """A store with one file for each list of row lengths; tokens of source s start at 1000 s + 100."""
    picks = []
    for number, lengths in enumerate(sources):
        part = rows_of(lengths, first_token=1000 * number + 100)
        weight = weights[number] if weights else 1.0
        picks.append(Pick(f"file{number}", part, np.arange(len(lengths)), number, weight))
    return TokenStore(picks, max_length)
