"""Rows to token ids and labels, chunk by chunk, in this process or in several."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.data.dialogue import Dialogue, RowError
from tunesmith.data.formats import RowShape
from tunesmith.data.preference import EncodedRow, join_answers
from tunesmith.data.readers import BadRow, NumberedRow
from tunesmith.model.batch import IGNORE
from tunesmith.model.messages import Message
from tunesmith.model.template import Encoded, encode_text, encoder_of

CHUNK_ROWS = 256
# A worker process needs seconds to import and to load the tokenizer: below this size it does not pay.
POOL_FROM_BYTES = 32 * 2**20
THREADS = 3
EMPTY = EncodedRow(Encoded([], []))


@dataclass(frozen=True)
class Chunk:
    """Tokenised rows, ready for a RowWriter; faults are (row number, what is wrong)."""

    arrays: dict[str, NDArray[Any]]
    faults: list[tuple[int, str]]
    rows: int


@dataclass(frozen=True)
class RowEncoder:
    """Tokenises rows of one shape with one tokenizer; `system` is for rows that have no system message."""

    tokenizer: PreTrainedTokenizerBase
    shape: RowShape
    system: str | None

    def chunk(self, rows: list[NumberedRow]) -> Chunk:
        parsed: list[tuple[int, Dialogue, bytes]] = []
        faults: list[tuple[int, str]] = []
        for number, row in rows:
            try:
                dialogue = self._parse(row)
                parsed.append((number, dialogue.with_system(self.system), dialogue.digest()))
            except RowError as error:
                faults.append((number, str(error)))
        encoded = self._encode([dialogue for _, dialogue, _ in parsed])
        good = []
        for (number, _, digest), result in zip(parsed, encoded, strict=True):
            if isinstance(result, UserError):
                faults.append((number, result.what + (f" ({result.hint})" if result.hint else "")))
            else:
                good.append((number, digest, result))
        return Chunk(_arrays(good), sorted(faults), len(rows))

    def _parse(self, row: Any) -> Dialogue:
        if isinstance(row, BadRow):
            raise RowError(row.why)
        return self.shape.parse(row)

    def _encode(self, dialogues: list[Dialogue]) -> list[EncodedRow | UserError]:
        chats = [chat for d in dialogues if d.text is None and not d.is_empty for chat in _conversations(d)]
        done = iter(encoder_of(self.tokenizer).dialogues(chats)) if chats else iter(())
        results: list[EncodedRow | UserError] = []
        for dialogue in dialogues:
            if dialogue.is_empty:
                results.append(EMPTY)
            elif dialogue.text is not None:
                results.append(EncodedRow(encode_text(self.tokenizer, dialogue.text)))
            else:
                answers = [next(done) for _ in _conversations(dialogue)]
                results.append(_row_of(answers))
        return results


def _conversations(dialogue: Dialogue) -> list[tuple[list[Message], Any]]:
    """What of a dialogue is rendered: one conversation, or one with each answer."""
    rejected = [] if dialogue.rejected is None else [(dialogue.rejected, dialogue.tools)]
    return [(dialogue.messages, dialogue.tools), *rejected]


def _row_of(answers: list[Encoded | UserError]) -> EncodedRow | UserError:
    good = [answer for answer in answers if isinstance(answer, Encoded)]
    if len(good) < len(answers):
        return next(answer for answer in answers if isinstance(answer, UserError))
    return EncodedRow(good[0]) if len(good) == 1 else join_answers(good[0], good[1])


def _arrays(rows: list[tuple[int, bytes, EncodedRow]]) -> dict[str, NDArray[Any]]:
    encoded = [row.encoded for _, _, row in rows]
    lengths = np.array([len(e.ids) for e in encoded], dtype=np.int64)
    ends = np.cumsum(lengths)
    ids = np.fromiter(chain.from_iterable(e.ids for e in encoded), dtype=np.uint32)
    mask = np.fromiter(chain.from_iterable(e.labels for e in encoded), dtype=np.int64) != IGNORE
    mask[(ends - lengths)[lengths > 0]] = False  # nothing comes before a row's first token to predict it
    sums = np.concatenate([[0], np.cumsum(mask)])
    digests = np.frombuffer(b"".join(digest[:16] for _, digest, _ in rows), dtype="<u8")
    marks = [(e.unmatched, e.straddled, e.without_stop, int(e.escaped)) for e in encoded]
    return {
        "ids": ids,
        "mask": mask,
        "lengths": lengths,
        "supervised": (sums[ends] - sums[ends - lengths]).astype(np.int64),
        "numbers": np.array([number for number, _, _ in rows], dtype=np.int64),
        "digests": digests.astype(np.uint64).reshape(len(rows), 2),
        "marks": np.array(marks, dtype=np.uint16).reshape(len(rows), 4),
        "branches": np.array([row.branches for _, _, row in rows], dtype=np.int64).reshape(len(rows), 3),
    }


def encode_rows(
    encoder: RowEncoder, rows: Iterable[NumberedRow], *, workers: int, num_bytes: int
) -> Iterator[Chunk]:
    """Tokenise rows chunk by chunk, in their order; in processes when there are enough to pay for them."""
    chunks = _chunks(iter(rows))
    if workers == 1 or num_bytes < POOL_FROM_BYTES:
        yield from _in_threads(encoder, chunks)
    else:
        yield from _in_processes(encoder, chunks, workers)


def _chunks(rows: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _in_threads(encoder: RowEncoder, chunks: Iterator[list[NumberedRow]]) -> Iterator[Chunk]:
    """While a chunk is tokenised, which needs no Python, others are rendered and labelled."""
    encoder_of(encoder.tokenizer)  # made here: each thread would make its own
    with ThreadPoolExecutor(THREADS) as pool:
        yield from _in_order((pool.submit(encoder.chunk, rows) for rows in chunks), most=THREADS)


def _in_order(chunks: Iterator[Future[Chunk]], *, most: int) -> Iterator[Chunk]:
    """The results one after the other, with at most `most` more asked for than taken."""
    waiting: deque[Future[Chunk]] = deque()
    for chunk in chunks:
        waiting.append(chunk)
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _in_processes(encoder: RowEncoder, chunks: Iterator[list[NumberedRow]], workers: int) -> Iterator[Chunk]:
    # spawn, not fork: a forked child of a process with threads (torch, tokenizers) can hang for ever.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder,))
    try:
        yield from _in_order((pool.submit(_encode_in_worker, rows) for rows in chunks), most=4 * workers)
    except BrokenProcessPool:
        raise TunesmithError(
            "a tokenising process ended unexpectedly (out of memory, or killed)",
            hint="set data.workers to 1, or free memory",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: list[RowEncoder] = []


def _start_worker(encoder: RowEncoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker.append(encoder)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent tells its workers nothing: they would wait for rows for ever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(rows: list[NumberedRow]) -> Chunk:
    return _worker[0].chunk(rows)
