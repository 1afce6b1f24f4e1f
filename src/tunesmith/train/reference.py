"""What the reference model, the one that training began with, finds of every answer.

Computed once, before the first step: the base model is there then, and training needs no second model. Kept
in the run folder, so that a resumed run has the very same numbers, and in the cache, so that the next run on
the same model and data begins at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tunesmith.core.errors import RunFailed
from tunesmith.core.paths import new_folder, sha256_json
from tunesmith.core.progress import Meter
from tunesmith.core.run_folder import RunFolder, manifest_holds, write_manifest
from tunesmith.model.batch import Batch
from tunesmith.model.generate import evaluating
from tunesmith.train.objective import Ranks

FOLDER = "reference"
FILE = "logprobs.safetensors"
ROUND = 64  # micro-batches between two looks at the progress


class Documents(Protocol):
    """Every document of the run once, held-out ones too, in the same order at every call."""

    def __call__(self) -> Iterator[Batch]: ...


@dataclass
class Reference:
    """Log-probabilities [B] of the answers of every document, by the document's content.

    documents: all that will be asked for; cache: where they are kept for other runs; identity: all that
    decides them beside the documents, and the model's files and the software, which the run's lock has.
    """

    documents: Documents
    cache: Path
    identity: dict[str, Any]
    table: dict[bytes, NDArray[np.float64]] = field(default_factory=dict)

    def of(self, batch: Batch) -> Tensor:
        """[P, B] float64."""
        return torch.from_numpy(np.stack([self.table[key] for key in keys_of(batch)]))

    def prepare(
        self, engine: Ranks, run: RunFolder, logprobs: Callable[[Batch], Tensor], *, begun: bool
    ) -> None:
        """Read or compute the table. `logprobs`: of the model as it is, [P, B], by `engine.forward`.

        Raises RunFailed where it is lost and the weights that it was computed with are gone.
        """
        keys = [key for batch in self.documents() for key in keys_of(batch)]
        found = self._stored(run, keys) if engine.rank == 0 else None
        # Other processes may not see the folders: what the first one has is what all have.
        known = engine.sum([float(found is not None)])[0] > 0
        if not known and begun and not isinstance(engine.model, PeftModel):
            raise RunFailed(
                f"{run.path / FOLDER}: the reference's log-probabilities are missing or damaged, and the "
                "weights that they were computed with have been trained since",
                hint="bring that folder back, or start anew with --fresh",
            )
        values = self._shared(engine, found, len(keys)) if known else self._computed(engine, logprobs)
        self.table = dict(zip(keys, values, strict=True))
        if engine.rank == 0:
            self._keep(run, keys, values)

    def _shared(self, engine: Ranks, found: NDArray[np.float64] | None, count: int) -> NDArray[np.float64]:
        width = int(engine.sum([0.0 if found is None else float(found.shape[1])])[0])
        mine = np.zeros((count, width)) if found is None else found
        return np.asarray(engine.sum(mine.ravel().tolist())).reshape(count, width)

    def _computed(self, engine: Ranks, logprobs: Callable[[Batch], Tensor]) -> NDArray[np.float64]:
        values: list[NDArray[np.float64]] = []
        batches = self.documents()
        with Meter("reference") as meter, _as_it_was(engine.model), torch.no_grad():
            while some := list(islice(batches, ROUND)):
                values.append(_round(engine, some, logprobs))
                meter.advance(len(values[-1]))
        return np.concatenate(values)

    # -- files ---------------------------------------------------------------------------------------

    def _stored(self, run: RunFolder, keys: list[bytes]) -> NDArray[np.float64] | None:
        found = (_read(folder, keys) for folder in self._folders(run, keys))
        return next((values for values in found if values is not None), None)

    def _keep(self, run: RunFolder, keys: list[bytes], values: NDArray[np.float64]) -> None:
        for left in run.path.glob(f".{FOLDER}.partial-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for folder in self._folders(run, keys):
            if _read(folder, keys) is None:
                with new_folder(folder) as fresh:
                    save_file({"documents": _stacked(keys), "logprobs": values}, fresh / FILE)
                    write_manifest(fresh)

    def _folders(self, run: RunFolder, keys: list[bytes]) -> list[Path]:
        """In the run, and in the cache if the run has a lock, which tells what the model is."""
        kept = [run.path / FOLDER]
        if run.lock.is_file():
            lock = json.loads(run.lock.read_text(encoding="utf-8"))
            files = {name: entry["sha256"] for name, entry in lock["model"]["files"].items()}
            made_of = {"model": files, "versions": lock["versions"], "documents": b"".join(keys).hex()}
            kept.append(self.cache / sha256_json(self.identity | made_of))
        return kept


def _read(folder: Path, keys: list[bytes]) -> NDArray[np.float64] | None:
    """What a folder has of exactly these documents; None where it is damaged or of others."""
    if not manifest_holds(folder):
        return None
    tensors = load_file(folder / FILE)
    return np.asarray(tensors["logprobs"]) if np.array_equal(tensors["documents"], _stacked(keys)) else None


def _stacked(keys: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)


def keys_of(batch: Batch) -> list[bytes]:
    """The content of every document, as 16 bytes."""
    assert batch.branches is not None
    return [
        hashlib.blake2b(batch.input_ids[begin:end].tobytes() + branches.tobytes(), digest_size=16).digest()
        for begin, end, branches in zip(batch.starts[:-1], batch.starts[1:], batch.branches, strict=True)
    ]


def _round(engine: Ranks, batches: list[Batch], logprobs: Callable[[Batch], Tensor]) -> NDArray[np.float64]:
    """[documents of the batches, B], each computed by one process."""
    starts = np.cumsum([0, *(batch.num_documents for batch in batches)])
    at = {id(batch): int(start) for batch, start in zip(batches, starts[:-1], strict=True)}
    assert batches[0].branches is not None
    values = np.zeros((int(starts[-1]), batches[0].branches.shape[1] - 1))
    for share in engine.shares(batches):
        found = logprobs(share.batch).cpu().numpy()
        if share.counts:
            begin = at[id(share.batch)]
            values[begin : begin + len(found)] = found
    return np.asarray(engine.sum(values.ravel().tolist())).reshape(values.shape)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """The model without its adapters, in eval mode."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        yield
    # peft switches gradients off with the adapters, and then on for all of them.
    for parameter, requires_grad in wanted:
        parameter.requires_grad_(requires_grad)
