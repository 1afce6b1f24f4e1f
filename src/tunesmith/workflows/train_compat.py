"""A recipe's `compat` section: the rows, steps, loss and learning rates that xtuner 0.1 would have.

`convert.xtuner_turns` and `convert.xtuner_order` hold its rules; here they meet our readers and our loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.convert import xtuner_turns
from tunesmith.convert.xtuner_order import (
    Iterations,
    Pack,
    Piece,
    Rates,
    pack_rows,
    shuffle_seeds,
    shuffled_rows,
)
from tunesmith.convert.xtuner_turns import Turn, encode_rows, turns_of
from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir, sha256_file, sha256_json
from tunesmith.data.batches import Totals
from tunesmith.data.counts import FileCounts
from tunesmith.data.prepare import Prepared, peek, tokenizer_hash
from tunesmith.data.readers import BadRow, RowFile, open_source
from tunesmith.data.store import MARKS, Pick, Rows, RowWriter, TokenStore, cached_rows
from tunesmith.model.batch import Batch, join
from tunesmith.recipe.compat import Compat
from tunesmith.recipe.schema import Recipe, Source
from tunesmith.train.objective import Supervised
from tunesmith.workflows.run_data import RunData

CHUNK_ROWS = 1000


def open_compat(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """The data of a run as xtuner would prepare it. recipe: resolved, with a section `compat`.

    Raises UserError for settings that xtuner does not have, and where it would stop itself.
    """
    assert recipe.compat is not None and recipe.data.max_length != "auto"
    _check(recipe)
    files = [
        (number, source, file)
        for number, given in enumerate(recipe.data.sources)
        for file in open_source(given, f"data.sources.{number}")
        for source in [_with_format(given, file, f"data.sources.{number}")]
    ]
    limit = recipe.data.max_length
    parts = [(n, file, _tokenised(file, source, recipe.compat, tokenizer)) for n, source, file in files]
    picks = [Pick(file.name, rows, _learnable(rows, limit), n, 1.0) for n, file, rows in parts]
    counts = [_counts(file, n, rows, limit) for n, file, rows in parts]
    train = TokenStore(picks, limit)
    if not len(train):
        raise UserError("data: no row has a token to learn", hint="see 'tunesmith data check' without compat")
    steps = CompatSteps(train, recipe)
    steps.check()
    notes = [note for count in counts for note in count.notes()]
    return RunData(
        prepared=Prepared(train, TokenStore([], limit), counts, notes),
        steps=steps,
        eval_batches=[],
        objective=lambda model: MicroBatchMeans(),
        lr=steps.lr,
    )


def _check(recipe: Recipe) -> None:
    """Raise UserError for what xtuner does not have."""
    data, train = recipe.data, recipe.train
    wrong = [
        key
        for key, bad in {
            "objective.type: it has sft alone": recipe.objective.type != "sft",
            "data.eval_fraction: it holds out nothing; set 0": bool(data.eval_fraction or data.eval_sources),
            "data.too_long: it truncates": data.too_long != "truncate",
            "data.duplicates: it keeps them": data.duplicates != "keep",
            "data.sources.weight: it takes every row once": any(s.weight != 1 for s in data.sources),
            "train.epochs: it runs whole epochs": not float(train.epochs).is_integer(),
            "train.warmup_steps: it takes a ratio": train.warmup_steps is not None,
            "train.schedule: it has cosine and constant here": train.schedule == "linear",
        }.items()
        if bad
    ]
    if wrong:
        raise UserError(
            "compat: xtuner does not do what the recipe says:\n  " + "\n  ".join(wrong),
            hint="'tunesmith import xtuner CONFIG.py --compat' writes a recipe that fits",
        )


@dataclass(frozen=True)
class MicroBatch(Batch):
    """A micro-batch, or a part of one that memory did not suffice for. whole: labels of all of it."""

    whole: int = 0

    def part(self, first: int, last: int) -> MicroBatch:
        cut = super().part(first, last)
        return MicroBatch(cut.input_ids, cut.labels, cut.starts, cut.rows, cut.branches, self.whole)


class MicroBatchMeans(Supervised):
    """The mean over micro-batches of each one's mean loss: a unit is a micro-batch."""

    def units(self, batch: Batch) -> int:
        return 1

    def total(self, model: Any, batch: Batch) -> Tensor:
        """NaN for a micro-batch with no label, as there."""
        assert isinstance(batch, MicroBatch)
        return super().total(model, batch) / batch.whole


# -- rows -----------------------------------------------------------------------------------------------


def _with_format(source: Source, file: RowFile, place: str) -> Source:
    return source.model_copy(update={"format": peek(file, source, place)[0].format})


def _tokenised(file: RowFile, source: Source, compat: Compat, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows of a file in full, from the cache if they are there."""

    def make(fresh: Path) -> None:
        with RowWriter(fresh) as writer:
            for chunk in _chunks(file, source):
                encoded = encode_rows([found for _, found in chunk], compat.template, tokenizer)
                writer.append(_arrays([number for number, _ in chunk], encoded))
            writer.close(format=source.format, unit=file.unit)

    return cached_rows(cache_dir() / "data" / _key(file, source, compat, tokenizer), make)[0]


def _key(file: RowFile, source: Source, compat: Compat, tokenizer: PreTrainedTokenizerBase) -> str:
    assert xtuner_turns.__file__ is not None
    return sha256_json(
        {
            "content": file.digest(),
            "source": source.model_dump(mode="json", exclude={"path", "weight"}),
            "template": compat.template.model_dump(),
            "tokenizer": [type(tokenizer).__name__, tokenizer_hash(tokenizer)],
            "code": sha256_file(Path(xtuner_turns.__file__)),
        }
    )


def _chunks(file: RowFile, source: Source) -> Iterator[list[tuple[int, list[Turn]]]]:
    rows = iter(file.read())
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield [(number, _turns(file, source, number, row)) for number, row in chunk]


def _turns(file: RowFile, source: Source, number: int, row: Any) -> list[Turn]:
    if isinstance(row, BadRow) or not isinstance(row, dict):
        why = row.why if isinstance(row, BadRow) else "not an object with columns"
        raise UserError(f"{file.name}: {file.unit} {number}: {why}")
    try:
        return turns_of(row, source)
    except UserError as error:
        raise UserError(f"{file.name}: {file.unit} {number}: {error.what}", hint=error.hint) from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file.name}: {file.unit} {number}: xtuner stops at it: {error}") from None


def _arrays(numbers: list[int], rows: Sequence[tuple[list[int], list[bool]]]) -> dict[str, NDArray[Any]]:
    """The rows as a RowWriter takes them."""
    count = len(rows)
    return {
        "ids": np.array([i for ids, _ in rows for i in ids], dtype=np.uint32),
        "mask": np.array([m for _, learned in rows for m in learned], dtype=np.bool_),
        "lengths": np.array([len(ids) for ids, _ in rows], dtype=np.int64),
        "supervised": np.array([sum(learned) for _, learned in rows], dtype=np.int64),
        "numbers": np.array(numbers, dtype=np.int64),
        "digests": np.zeros((count, 2), dtype=np.uint64),
        "marks": np.zeros((count, len(MARKS)), dtype=np.uint16),
        "branches": np.zeros((count, 3), dtype=np.int64),
    }


def _learnable(rows: Rows, max_length: int) -> NDArray[np.int64]:
    return np.flatnonzero(rows.supervised_within(max_length) > 0)


def _counts(file: RowFile, source: int, rows: Rows, max_length: int) -> FileCounts:
    kept = _learnable(rows, max_length)
    empty = rows.lengths == 0
    long = kept[rows.lengths[kept] > max_length]
    tokens = int(np.minimum(rows.lengths[kept], max_length).sum())
    return FileCounts(
        file=file.name,
        format=rows.format,
        source=source,
        weight=1.0,
        used_for="train",
        rows=len(rows),
        kept=len(kept),
        train_rows=len(kept),
        empty=int(empty.sum()),
        unsupervised=len(rows) - len(kept) - int(empty.sum()),
        truncated=len(long),
        cut_answers=sum(rows.cut_answers(int(row), max_length) for row in long),
        tokens_kept=tokens,
        tokens_supervised=int(rows.supervised_within(max_length)[kept].sum()),
        tokens_dropped=int(rows.lengths.sum()) - tokens,
    )


# -- steps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompatSteps:
    """The micro-batches of every optimizer step, one after the other over iterations and GPUs.

    A pack is one document of its micro-batch; its number in `rows` is that of the row it begins with.
    """

    store: TokenStore
    recipe: Recipe

    @cached_property
    def packs(self) -> list[Pack]:
        assert self.recipe.compat is not None and self.recipe.data.max_length != "auto"
        size, workers = self.recipe.data.max_length, self.recipe.compat.map_workers
        lengths = self.store.lengths.tolist()
        if not self.recipe.data.packing:
            return [[Piece(row, 0, length)] for row, length in enumerate(lengths)]
        found: list[Pack] = []
        for group, seed in zip(self.store.groups, shuffle_seeds(self.recipe.train.seed), strict=False):
            order = group.rows[shuffled_rows(len(group.rows), seed)].tolist()
            found += pack_rows(order, lengths, size, workers)
        return found

    @cached_property
    def iterations(self) -> Iterations:
        assert self.recipe.compat is not None
        train, compat = self.recipe.train, self.recipe.compat
        assert train.micro_batch_size != "auto"
        return Iterations(
            count=len(self.packs),
            epochs=int(train.epochs),
            seed=train.seed,
            batch_size=train.micro_batch_size,
            accumulation=train.grad_accumulation,
            gpus=compat.gpus,
            drop_last=compat.deepspeed,
        )

    @cached_property
    def rates(self) -> Rates:
        assert self.recipe.compat is not None and self.recipe.train.lr != "auto"
        train = self.recipe.train
        return Rates(
            peak=self.recipe.train.lr,
            warmup_epochs=train.warmup_ratio * train.epochs,
            epochs=int(train.epochs),
            per_epoch=self.iterations.per_epoch,
            start_factor=self.recipe.compat.warmup_start,
            lowest=train.min_lr_ratio * self.recipe.train.lr,
            cosine=train.schedule == "cosine",
        )

    def check(self) -> None:
        """Raise UserError where xtuner stops, or never applies an update."""
        _ = self.rates
        if not self.iterations.steps:
            raise UserError(
                f"compat: xtuner applies no update: {self.iterations.total} micro-batches are fewer than the "
                f"{self.iterations.accumulation} of one step",
                hint="lower train.grad_accumulation, or train without compat",
            )

    @property
    def total_steps(self) -> int:
        steps, most = self.iterations.steps, self.recipe.train.max_steps
        return steps if most is None else min(steps, most)

    @property
    def warnings(self) -> list[str]:
        """What a person should know: the traps that are reproduced."""
        lost = int(self.store.lengths.sum()) - sum(p.stop - p.start for pack in self.packs for p in pack)
        unused = self.iterations.total - self.iterations.steps * self.iterations.accumulation
        rates = self.rates
        notes = {
            f"compat: {lost:,} tokens left over by packing are lost, as with xtuner": lost > 0,
            f"compat: the learning rate stays at {rates.start_factor:g} of train.lr for the whole run, as "
            "with xtuner: a warm-up of a single iteration never leaves its first value": rates.warmup == 1,
            f"compat: the last {unused} micro-batches are never applied, as with xtuner and DeepSpeed": (
                unused > 0
            ),
        }
        return [note for note, holds in notes.items() if holds]

    def __call__(self, step: int) -> list[Batch]:
        window = self.iterations.window(step)
        return [self._batch(packs) for t in window for packs in self.iterations.at(t) if packs]

    def lr(self, step: int) -> float:
        """Of the 0-based optimizer step: the rate of the last iteration of its window."""
        return self.rates.lr(self.iterations.window(step)[-1])

    def epochs_after(self, step: int) -> float:
        done = self.iterations.window(step - 1).stop if step else 0
        return done / self.iterations.per_epoch

    def longest(self) -> Batch:
        """The micro-batch with the most tokens."""
        lengths = [sum(piece.stop - piece.start for piece in pack) for pack in self.packs]
        micro = (packs for step in range(self.total_steps) for packs in self._micro(step))
        return self._batch(max(micro, key=lambda packs: sum(lengths[pack] for pack in packs)))

    def totals(self) -> Totals:
        used = [pack for step in range(self.total_steps) for packs in self._micro(step) for pack in packs]
        sums = np.array([self._sums(pack) for pack in range(len(self.packs))], dtype=np.int64)[used].sum(
            axis=0
        )
        return Totals(len(used), int(sums[0]), int(sums[1]), int(sums[2]))

    def _micro(self, step: int) -> list[list[int]]:
        return [packs for t in self.iterations.window(step) for packs in self.iterations.at(t) if packs]

    def _sums(self, pack: int) -> tuple[int, int, int]:
        """(pieces, tokens, learned tokens) of a pack."""
        ids, labels = self._document(pack)
        return len(self.packs[pack]), len(ids), int((labels[1:] >= 0).sum())

    def _document(self, pack: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        parts = [(self.store[p.row], slice(p.start, p.stop)) for p in self.packs[pack]]
        ids = np.concatenate([ids[cut] for (ids, _), cut in parts])
        return ids, np.concatenate([labels[cut] for (_, labels), cut in parts])

    def _batch(self, packs: list[int]) -> MicroBatch:
        rows = tuple(self.store.row(self.packs[pack][0].row) for pack in packs)
        made = join([self._document(pack) for pack in packs], rows)
        return MicroBatch(made.input_ids, made.labels, made.starts, rows, whole=made.num_supervised)
