"""Tokenised rows on disk, memory-mapped, and the view on them that training reads.

One folder holds the rows of one file: `ids.npy` [T] uint32 and `mask.npy` [T] bool (supervised) of all rows
end to end, `lengths.npy` and `supervised.npy` [R] token counts, `numbers.npy` [R] (row or line in the file),
`digests.npy` [R, 2] (128 bits of the content's SHA-256), `marks.npy` [R, 4] (see MARKS) and `branches.npy`
[R, 3] (of a preference: tokens of the prompt, the chosen and the rejected answer; else zeros).
`manifest.json`, written last, has the hashes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.paths import locked, new_folder
from tunesmith.core.run_folder import manifest_holds, read_manifest, write_manifest
from tunesmith.model.batch import IGNORE

# Columns of marks.npy, each counting within a row (model.template.Encoded tells what they mean).
MARKS = ("unmatched", "straddled", "without_stop", "escaped")
ARRAYS: dict[str, tuple[type, tuple[int, ...]]] = {
    "ids": (np.uint32, ()),
    "mask": (np.bool_, ()),
    "lengths": (np.int64, ()),
    "supervised": (np.int64, ()),
    "numbers": (np.int64, ()),
    "digests": (np.uint64, (2,)),
    "marks": (np.uint16, (len(MARKS),)),
    "branches": (np.int64, (3,)),
}


@dataclass
class Rows:
    """Tokenised rows of one file, in its order: ids [T], mask [T], the others one entry a row."""

    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    numbers: NDArray[np.int64]
    digests: NDArray[np.uint64]
    marks: NDArray[np.uint16]
    branches: NDArray[np.int64]
    format: str = ""
    unit: str = "row"
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_pair(self) -> NDArray[np.bool_]:
        """[R] whether the row is a prompt with two answers."""
        return self.branches.sum(axis=1) > 0

    @property
    def spans(self) -> NDArray[np.int64]:
        """[R] tokens of the longest sequence: of the row, or of a pair's prompt with its longer answer."""
        pair = self.branches[:, 0] + self.branches[:, 1:].max(axis=1)
        return np.where(self.is_pair, pair, self.lengths)

    def lengths_within(self, max_length: int) -> NDArray[np.int64]:
        """[R] tokens of every row cut at `max_length`; pairs are never cut."""
        return np.where(self.is_pair, self.lengths, np.minimum(self.lengths, max_length))

    def supervised_within(self, max_length: int) -> NDArray[np.int64]:
        """[R] supervised tokens of every row cut at `max_length`."""
        counts = self.supervised.copy()
        for row in np.flatnonzero((self.lengths > max_length) & ~self.is_pair):
            start = self.starts[row]
            counts[row] = self.mask[start : start + max_length].sum()
        return counts

    def cut_answers(self, row: int, max_length: int) -> int:
        """How many answers of the row do not end within its first `max_length` tokens."""
        mask = self.mask[self.starts[row] : self.starts[row + 1]]
        ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
        return int((ends > max_length).sum())


class RowWriter:
    """Appends tokenised rows to a folder; `close` completes the files, then the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: _NpyFile(folder / f"{name}.npy", *ARRAYS[name]) for name in ARRAYS}

    def append(self, arrays: dict[str, NDArray[Any]]) -> None:
        for name, file in self._files.items():
            file.append(arrays[name])

    def close(self, **fields: Any) -> None:
        for file in self._files.values():
            file.close()
        write_manifest(self.folder, **fields)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()


class _NpyFile:
    """A .npy file that grows: its header is written again, with the true length, at the end."""

    def __init__(self, path: Path, dtype: type, tail: tuple[int, ...]) -> None:
        self._file = path.open("wb")
        self._dtype, self._tail, self._count = np.dtype(dtype), tail, 0
        self._header()
        self._begin = self._file.tell()

    def append(self, array: NDArray[Any]) -> None:
        assert array.shape[1:] == self._tail
        self._file.write(np.ascontiguousarray(array, dtype=self._dtype).tobytes())
        self._count += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        # numpy pads a header so that its first axis can grow in place.
        assert self._file.tell() == self._begin
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self._count, *self._tail)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": descr, "fortran_order": False, "shape": shape}
        )


def cached_rows(folder: Path, make: Callable[[Path], None]) -> tuple[Rows, bool]:
    """The rows in a folder, and whether they were there.

    If they were not, or are damaged, `make` writes them into the new folder that it is given; processes that
    want the same rows wait for one of them to do so.
    """
    known = open_rows(folder)
    if known is not None:
        return known, True
    with locked(folder):
        known = open_rows(folder)  # another process may have made it meanwhile
        if known is not None:
            return known, True
        with new_folder(folder) as fresh:
            make(fresh)
        made = open_rows(folder)
        assert made is not None
        return made, False


def open_rows(folder: Path) -> Rows | None:
    """The rows in a folder, the tokens memory-mapped; None when it is missing or damaged."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest_holds(folder):
        return None
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=_mode(name)) for name in ARRAYS}
    except (OSError, ValueError):
        return None
    return Rows(**arrays, format=manifest["format"], unit=manifest["unit"])


def _mode(name: str) -> Any:
    return "r" if name in ("ids", "mask") else None


@dataclass(frozen=True)
class Group:
    """The documents of one source in a store, and how often an epoch takes each."""

    rows: NDArray[np.int64]
    weight: float


@dataclass(frozen=True)
class Pick:
    """Rows chosen of one file: `rows` into `parts`, at most `max_length` tokens each."""

    name: str
    part: Rows
    rows: NDArray[np.int64]
    source: int
    weight: float


class TokenStore:
    """Documents to train on or to evaluate, in file order.

    `store[i]` is (input_ids int64 [L], labels int64 [L]); lengths [D] and supervised [D] are token counts;
    row(i) numbers the source rows from 1 through all files, and place(row) tells file and row for messages.
    """

    def __init__(self, picks: list[Pick], max_length: int) -> None:
        self.picks, self.max_length = picks, max_length
        self._first = np.cumsum([0, *(len(p.rows) for p in picks)]).astype(np.int64)
        self._offsets = np.cumsum([0, *(_last_number(p.part) for p in picks)]).astype(np.int64)
        lengths = [p.part.lengths_within(max_length)[p.rows] for p in picks]
        supervised = [p.part.supervised_within(max_length)[p.rows] for p in picks]
        self.lengths = _joined(lengths, np.int32)
        self.supervised = _joined(supervised, np.int32)
        self.groups = self._grouped()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pick, row = self._find(index)
        start = pick.part.starts[row]
        end = start + self.lengths[index]
        ids = pick.part.ids[start:end].astype(np.int64)
        return ids, np.where(pick.part.mask[start:end], ids, IGNORE)

    def branches_of(self, index: int) -> NDArray[np.int64]:
        """Of a pair: tokens of its prompt and of each answer; of any other row zeros."""
        pick, row = self._find(index)
        return pick.part.branches[row]

    def row(self, index: int) -> int:
        at = self._file_of(index)
        pick = self.picks[at]
        return int(self._offsets[at] + pick.part.numbers[pick.rows[index - self._first[at]]])

    def place(self, row: int) -> str:
        """`FILE: row N` of a row number that `row` gave."""
        at = int(np.searchsorted(self._offsets, row, side="left")) - 1
        pick = self.picks[at]
        return f"{pick.name}: {pick.part.unit} {row - int(self._offsets[at])}"

    def _find(self, index: int) -> tuple[Pick, int]:
        at = self._file_of(index)
        pick = self.picks[at]
        return pick, int(pick.rows[index - self._first[at]])

    def _file_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _grouped(self) -> list[Group]:
        spans = [np.arange(a, b) for a, b in zip(self._first[:-1], self._first[1:], strict=True)]
        groups = []
        for source in sorted({pick.source for pick in self.picks}):
            mine = [i for i, pick in enumerate(self.picks) if pick.source == source]
            rows = np.concatenate([spans[i] for i in mine]).astype(np.int64)
            groups.append(Group(rows, float(self.picks[mine[0]].weight)))
        return groups


def _last_number(part: Rows) -> int:
    return int(part.numbers[-1]) if len(part) else 0


def _joined(arrays: list[NDArray[np.int64]], dtype: type) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype)
