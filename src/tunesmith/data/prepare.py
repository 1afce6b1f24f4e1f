"""From the recipe's data section to documents to train on: read, tokenise (or find in the cache), split.

The cache keeps all rows of a file tokenised in full, keyed by what decides their tokens: the file's content,
format, columns, system message, template, tokenizer and this code. Everything else (max_length, duplicates,
the split, weights) is chosen from it afterwards.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

import tunesmith
from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_file, sha256_json
from tunesmith.core.progress import Meter
from tunesmith.data.counts import FileCounts, totals
from tunesmith.data.dialogue import held_out_below
from tunesmith.data.formats import RowShape, no_pairs, only_pairs, shape_of
from tunesmith.data.readers import BadRow, NumberedRow, RowFile, open_source
from tunesmith.data.store import MARKS, Pick, Rows, RowWriter, TokenStore, cached_rows
from tunesmith.data.tokens import RowEncoder, encode_rows
from tunesmith.model.template import template_hash
from tunesmith.recipe.schema import Data, Source

PEEK_ROWS = 1000
SHOWN_FAULTS = 5
MAX_FAULTS = 1000
TOKEN_CODE = (
    "model/messages.py", "model/rendering.py", "model/special.py", "model/template.py",
    "data/dialects.py", "data/dialogue.py", "data/formats.py", "data/preference.py", "data/readers.py",
    "data/store.py", "data/tokens.py",
)  # fmt: skip


@dataclass
class Prepared:
    """The documents of a recipe, and what became of every row."""

    train: TokenStore
    eval: TokenStore
    counts: list[FileCounts]
    warnings: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, int]:
        return totals(self.counts)

    def as_dict(self) -> dict[str, Any]:
        """The counts as the event `data` and `data check --json` tell them."""
        files = [counts.as_dict() for counts in self.counts]
        return {"files": files, "totals": self.totals(), "warnings": self.warnings}


@dataclass(frozen=True)
class _Part:
    """The tokenised rows of one file and where they come from."""

    file: RowFile
    rows: Rows
    source: int
    weight: float
    held_out: bool
    from_cache: bool


def prepare(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path, pairs: bool = False
) -> Prepared:
    """Read, tokenise and split the rows of `data`, whose max_length must be a number.

    pairs: whether the rows have two answers each. Raises UserError for the other kind of rows, for data
    that cannot be read, rows that are not what their format says, rows that are too long if the recipe says
    `error`, and a training split without rows.
    """
    if data.max_length == "auto":
        raise ValueError("data.max_length must be resolved")
    if pairs and data.too_long == "truncate":
        raise UserError(
            "data.too_long: truncate: a preference between answers that were cut says nothing of their ends",
            hint="set data.too_long to drop, and raise data.max_length if many pairs are longer",
        )
    opened = [
        (file, source, place, number, held_out)
        for held_out, sources in ((False, data.sources), (True, data.eval_sources))
        for number, source in enumerate(sources)
        for place in [f"data.{'eval_sources' if held_out else 'sources'}.{number}"]
        for file in open_source(source, place)
    ]
    parts = []
    for file, source, place, number, held_out in opened:
        rows, known = tokenised(file, source, place, data, tokenizer, cache_dir, pairs=pairs)
        parts.append(_Part(file, rows, number, source.weight, held_out, known))
    return _Choice(data, data.max_length, parts).prepared()


# -- tokenising one file ----------------------------------------------------------------------------


def tokenised(
    file: RowFile,
    source: Source,
    place: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    pairs: bool = False,
) -> tuple[Rows, bool]:
    """The tokenised rows of a file, and whether they were in the cache; a damaged entry is made again."""
    folder = cache_dir / "data" / _key(file, source, data, tokenizer)
    rows, known = cached_rows(
        folder, lambda fresh: _tokenise(file, source, place, data, tokenizer, fresh, pairs=pairs)
    )
    if pairs and rows.format != "preference":
        raise no_pairs(file.name, f"these are '{rows.format}'", place)
    if rows.format == "preference" and not pairs:
        raise only_pairs(file.name, place)
    return rows, known


def _tokenise(
    file: RowFile,
    source: Source,
    place: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    pairs: bool,
) -> None:
    shape, rows = peek(file, source, place, pairs=pairs)
    encoder = RowEncoder(tokenizer, shape, system_of(source, data))
    faults: list[tuple[int, str]] = []
    count = 0
    with Meter(f"tokenise {Path(file.name).name}") as meter, RowWriter(folder) as writer:
        for chunk in encode_rows(encoder, rows, workers=workers_of(data), num_bytes=file.num_bytes):
            writer.append(chunk.arrays)
            faults += chunk.faults
            count += chunk.rows
            meter.advance(chunk.rows)
            if len(faults) > MAX_FAULTS:
                break
        if faults:
            raise malformed(file, shape, faults, count)
        writer.close(format=shape.format, unit=file.unit)


def peek(
    file: RowFile, source: Source, place: str, *, pairs: bool = False
) -> tuple[RowShape, Iterator[NumberedRow]]:
    """The shape of a file's rows, found from its first rows, and all its rows."""
    rows = iter(file.read())
    first = list(itertools.islice(rows, PEEK_ROWS))
    if not first:
        raise UserError(f"{file.name}: the file has no rows")
    objects = [row for _, row in first if isinstance(row, dict)]
    if not objects:
        number, row = first[0]
        why = row.why if isinstance(row, BadRow) else f"a {type(row).__name__}, not an object with columns"
        raise UserError(f"{file.name}: {file.unit} {number}: {why}", hint="every row must be an object")
    columns = dict.fromkeys(name for row in objects for name in row)
    shape = shape_of(columns, source.format, source.columns, file=file.name, place=place, pairs=pairs)
    return shape, itertools.chain(first, rows)


def malformed(file: RowFile, shape: RowShape, faults: list[tuple[int, str]], rows: int) -> UserError:
    """The error that names the first few bad rows of a file."""
    shown = [f"{file.name}: {file.unit} {number}: {why}" for number, why in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        more = "or more" if len(faults) > MAX_FAULTS else ""
        shown.append(f"{file.name}: {len(faults):,} {more} of {rows:,} rows are bad".replace("  ", " "))
    return UserError(
        "\n".join(shown), hint=f"the file was read as '{shape.format}'; correct or remove these rows"
    )


def system_of(source: Source, data: Data) -> str | None:
    """The system message of a source's rows that have none of their own."""
    return data.system if source.system is None else source.system


def workers_of(data: Data) -> int:
    """Processes to tokenise with; auto: one for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if data.workers == "auto" else data.workers


def _key(file: RowFile, source: Source, data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    return sha256_json(
        {
            "content": file.digest(),
            "suffix": Path(file.name).suffix.lower(),
            "format": source.format,
            "columns": source.columns,
            "system": system_of(source, data),
            "template": template_hash(tokenizer),
            "tokenizer": tokenizer_hash(tokenizer),
            "code": _code_hash(),
        }
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, merges and settings."""
    if tokenizer not in _tokenizer_hashes:
        text = tokenizer.backend_tokenizer.to_str() + f"{tokenizer.eos_token_id} {tokenizer.bos_token_id}"
        _tokenizer_hashes[tokenizer] = hashlib.sha256(text.encode()).hexdigest()
    return _tokenizer_hashes[tokenizer]


_tokenizer_hashes: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, str] = weakref.WeakKeyDictionary()


@cache
def _code_hash() -> str:
    """Of the code that decides tokens: entries made by another version are not used."""
    root = Path(tunesmith.__file__).parent
    parts = {name: sha256_file(root / name) for name in TOKEN_CODE}
    return sha256_json(
        parts | {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}
    )


# -- choosing rows ----------------------------------------------------------------------------------


class _Choice:
    """Which rows are trained on and which are held out. Every array has one entry a row, file after file."""

    def __init__(self, data: Data, max_length: int, parts: list[_Part]) -> None:
        self.data, self.max_length, self.parts = data, max_length, parts
        whole = [part.rows.supervised for part in parts]
        kept = [part.rows.supervised_within(max_length) for part in parts]
        self.lengths = np.concatenate([part.rows.lengths for part in parts])
        self.spans = np.concatenate([part.rows.spans for part in parts])
        self.digests = np.concatenate([part.rows.digests for part in parts])
        self.held_out = np.repeat([part.held_out for part in parts], [len(part.rows) for part in parts])
        cut = data.too_long == "truncate"
        self.supervised = np.concatenate(kept if cut else whole)
        self.is_long = self.spans > max_length
        self.is_empty = self.lengths == 0
        self.is_blank = ~self.is_empty & (self.supervised == 0)
        self.is_repeat = ~(self.is_empty | self.is_blank) & self._repeats()
        dropped_repeat = self.is_repeat & (data.duplicates == "drop")
        self.is_dropped = self.is_long & ~(self.is_blank | dropped_repeat) & (not cut)
        self.is_kept = ~(self.is_empty | self.is_blank | self.is_dropped | dropped_repeat)
        self.in_eval = self.held_out | (self._hashed_out() if not data.eval_sources else False)

    def prepared(self) -> Prepared:
        if self.data.too_long == "error":
            self._refuse_long()
        counts = [self._counts(part, span) for part, span in self._spans()]
        train = self._store(self.is_kept & ~self.in_eval)
        if not len(train):
            raise self._no_rows(counts)
        held_out = self._store(self.is_kept & self.in_eval)
        return Prepared(train, held_out, counts, self._warnings(counts, len(held_out)))

    def _repeats(self) -> NDArray[np.bool_]:
        """Rows whose content an earlier row has."""
        repeats = np.ones(len(self.digests), dtype=np.bool_)
        pairs = np.ascontiguousarray(self.digests).view([("a", np.uint64), ("b", np.uint64)]).ravel()
        repeats[np.unique(pairs, return_index=True)[1]] = False
        return repeats

    def _hashed_out(self) -> NDArray[np.bool_]:
        """Rows held out by their own content: adding other rows changes nothing, equal rows stay together."""
        return self.digests[:, 0] < np.uint64(held_out_below(self.data.eval_fraction))

    def _spans(self) -> Iterator[tuple[_Part, slice]]:
        at = 0
        for part in self.parts:
            yield part, slice(at, at + len(part.rows))
            at += len(part.rows)

    def _store(self, chosen: NDArray[np.bool_]) -> TokenStore:
        picks = [
            Pick(part.file.name, part.rows, np.flatnonzero(chosen[span]), part.source, part.weight)
            for part, span in self._spans()
            if chosen[span].any()
        ]
        return TokenStore(picks, self.max_length)

    def _counts(self, part: _Part, span: slice) -> FileCounts:
        kept, is_cut = self.is_kept[span], self.is_kept[span] & self.is_long[span]
        lengths = self.lengths[span]
        tokens_kept = int(part.rows.lengths_within(self.max_length)[kept].sum())
        marks = dict(zip(MARKS, part.rows.marks.sum(axis=0, dtype=np.int64).tolist(), strict=True))
        has_eval = not part.held_out and self.in_eval[span].any()
        return FileCounts(
            file=part.file.name,
            format=part.rows.format,
            source=part.source,
            weight=part.weight,
            used_for="eval" if part.held_out else ("train, eval" if has_eval else "train"),
            rows=len(part.rows),
            kept=int(kept.sum()),
            train_rows=int((kept & ~self.in_eval[span]).sum()),
            eval_rows=int((kept & self.in_eval[span]).sum()),
            dropped=int(self.is_dropped[span].sum()),
            truncated=int(is_cut.sum()),
            empty=int(self.is_empty[span].sum()),
            duplicate=int(self.is_repeat[span].sum()),
            unsupervised=int(self.is_blank[span].sum()),
            cut_answers=sum(part.rows.cut_answers(int(r), self.max_length) for r in np.flatnonzero(is_cut)),
            tokens_kept=tokens_kept,
            tokens_supervised=int(self.supervised[span][kept].sum()),
            tokens_dropped=int(lengths.sum()) - tokens_kept,
            special_strings=marks["escaped"],
            unmatched_answers=marks["unmatched"],
            merged_answers=marks["straddled"],
            answers_without_stop=marks["without_stop"],
            from_cache=part.from_cache,
        )

    def _refuse_long(self) -> None:
        long = [
            f"{part.file.name}: {part.file.unit} {part.rows.numbers[row]}: {part.rows.spans[row]:,} tokens"
            for part, span in self._spans()
            for row in np.flatnonzero(self.is_long[span])
        ]
        if long:
            more = [f"and {len(long) - SHOWN_FAULTS:,} more"] if len(long) > SHOWN_FAULTS else []
            raise UserError(
                f"data.too_long: error: {len(long):,} rows have more than {self.max_length:,} tokens:\n"
                + "\n".join([*long[:SHOWN_FAULTS], *more]),
                hint="raise data.max_length, or set data.too_long to drop or truncate",
            )

    def _no_rows(self, counts: list[FileCounts]) -> UserError:
        sums = totals([c for c in counts if c.used_for != "eval"])
        reasons = ("dropped", "empty", "duplicate", "unsupervised", "eval_rows")
        found = ", ".join(f"{sums[r]:,} {r.replace('eval_rows', 'held out')}" for r in reasons if sums[r])
        hints = {
            "dropped": "raise data.max_length, or set data.too_long to truncate",
            "eval_rows": "lower data.eval_fraction",
            "unsupervised": "the rows need an answer of the assistant",
        }
        most = max(reasons, key=lambda reason: sums[reason])
        return UserError(
            f"data: of {sums['rows']:,} rows none is left to train on ({found})", hints.get(most)
        )

    def _warnings(self, counts: list[FileCounts], eval_rows: int) -> list[str]:
        notes = [note for c in counts for note in c.notes()]
        leaked = np.isin(
            self.digests[self.is_kept & self.in_eval, 0], self.digests[self.is_kept & ~self.in_eval, 0]
        )
        if leaked.any():
            notes.append(
                f"{int(leaked.sum()):,} held-out rows are training rows too: the held-out loss flatters"
            )
        if not eval_rows and (self.data.eval_fraction > 0 or self.data.eval_sources):
            notes.append("no row is held out, so there is no held-out loss")
        return notes
