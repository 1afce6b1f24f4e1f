"""Look at the rows of a recipe as the model will see them, and count what becomes of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir
from tunesmith.data.batches import StepPlan
from tunesmith.data.mismatch import MismatchedStore
from tunesmith.data.prepare import Prepared, malformed, peek, prepare, system_of
from tunesmith.data.readers import open_source
from tunesmith.data.tokens import RowEncoder
from tunesmith.hub.sources import resolve_model
from tunesmith.model.config import context_length, load_config
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resolve import MAX_LENGTH
from tunesmith.recipe.schema import Data, Objective, Recipe, Train

QUANTILES = (0.5, 0.9, 0.99)
PARTS = ("prompt", "chosen", "rejected", "another's answer")
ANSWERS = {"sft": 1, "dpo": 2, "orpo": 2, "kto": 3}  # of a row, each behind its prompt


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are all supervised, or all not, as text. part: of a row with several answers,
    one of PARTS; else empty."""

    text: str
    supervised: bool
    part: str = ""


@dataclass(frozen=True)
class ShownRow:
    """A row as the model will see it. `fate` says what training does with it."""

    file: str
    row: int
    format: str
    tokens: int
    supervised_tokens: int
    fate: str
    spans: list[Span]
    ids: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def show_rows(recipe_path: Path, overrides: list[str], *, count: int, source: int = 0) -> list[ShownRow]:
    """The first `count` rows of the recipe's source with that number (from 0).

    Raises UserError as `check_data` does, but reads no more than it shows.
    """
    recipe, data, tokenizer = _opened(recipe_path, overrides)
    pairs = recipe.objective.type != "sft"
    if not 0 <= source < len(data.sources):
        raise UserError(f"--source {source}: the recipe has sources 0 to {len(data.sources) - 1}")
    shown: list[ShownRow] = []
    for file in open_source(data.sources[source], f"data.sources.{source}"):
        shape, rows = peek(file, data.sources[source], f"data.sources.{source}", pairs=pairs)
        taken = list(islice(rows, count - len(shown)))
        chunk = RowEncoder(tokenizer, shape, system_of(data.sources[source], data)).chunk(taken)
        if chunk.faults:
            raise malformed(file, shape, chunk.faults, len(taken))
        ends = np.cumsum(chunk.arrays["lengths"])
        for i, number in enumerate(chunk.arrays["numbers"].tolist()):
            span = slice(int(ends[i] - chunk.arrays["lengths"][i]), int(ends[i]))
            ids, mask = chunk.arrays["ids"][span].tolist(), chunk.arrays["mask"][span].tolist()
            branches = chunk.arrays["branches"][i].tolist()
            longest = branches[0] + max(branches[1:]) if pairs else len(ids)
            fate = _fate(longest, sum(mask), data)
            spans = spans_of(ids, mask, branches, tokenizer)
            shown.append(ShownRow(file.name, number, shape.format, len(ids), sum(mask), fate, spans, ids))
        if len(shown) >= count:
            break
    return shown


def check_data(recipe_path: Path, overrides: list[str]) -> dict[str, Any]:
    """Counts of every file, token lengths, and what the steps of the recipe hold.

    Raises UserError for a recipe or data that cannot be trained on.
    """
    recipe, data, tokenizer = _opened(recipe_path, overrides)
    prepared = prepared_rows(recipe, data, tokenizer)
    plan = step_plan(prepared, data, recipe.train, recipe.objective)
    totals = plan.totals(0, plan.steps_per_epoch)
    found = prepared.as_dict()
    found["warnings"] = found["warnings"] + plan.warnings
    return found | {
        "train_rows": len(prepared.train),
        "eval_rows": len(prepared.eval),
        "max_length": data.max_length,
        "row_tokens": _lengths(prepared),
        "packing": {
            "on": data.packing,
            "packs": totals.packs,
            "efficiency": round(plan.pack_efficiency, 4),
        },
        "epoch": {"steps": plan.steps_per_epoch, "tokens": totals.tokens, "supervised": totals.supervised},
        "total_steps": plan.total_steps,
    }


def prepared_rows(recipe: Recipe, data: Data, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The rows as the recipe's objective learns them: with one answer each, or with two, of which kto's have
    one to another prompt behind them. Raises UserError for what is wrong with them."""
    pairs = recipe.objective.type != "sft"
    prepared = prepare(data, tokenizer, cache_dir=cache_dir(), pairs=pairs)
    if recipe.objective.type != "kto":
        return prepared
    if len(prepared.train) == 1:
        raise UserError(
            "objective.type: kto compares answers across prompts, and there is one pair alone",
            hint="give more rows, or set objective.type to dpo",
        )
    return replace(prepared, train=MismatchedStore(prepared.train), eval=MismatchedStore(prepared.eval))


def step_plan(prepared: Prepared, data: Data, train: Train, objective: Objective) -> StepPlan:
    """The optimizer steps of a recipe. `data.max_length` must be a number, and bounds a prompt with one
    answer: a pack has so many tokens for each answer of a row. A micro_batch_size that is still "auto" leaves
    the packs of a step to grad_accumulation."""
    assert data.max_length != "auto"
    return StepPlan(
        prepared.train,
        packing=data.packing,
        max_length=data.max_length * ANSWERS[objective.type],
        micro_batch_size=1 if train.micro_batch_size == "auto" else train.micro_batch_size,
        grad_accumulation=train.grad_accumulation,
        seed=train.seed,
        epochs=train.epochs,
        max_steps=train.max_steps,
    )


def _opened(recipe_path: Path, overrides: list[str]) -> tuple[Recipe, Data, PreTrainedTokenizerBase]:
    recipe = load_recipe(recipe_path, overrides)
    if recipe.compat is not None:
        raise UserError(
            "compat: rows are shown and counted as this tool trains them, not as another one does",
            hint="--set compat=null shows them without it; 'tunesmith train --dry-run' counts them with it",
        )
    model = recipe.model
    files = resolve_model(
        model.path, revision=model.revision, endpoints=model.endpoint, offline=model.offline
    )
    template = Path(model.chat_template) if model.chat_template else None
    tokenizer = load_tokenizer(
        files.tokenizer,
        chat_template=template,
        trust_remote_code=model.trust_remote_code,
        new_tokens=model.new_tokens,
    )
    limit = context_length(load_config(files.folder, trust_remote_code=model.trust_remote_code))
    return recipe, _with_length(recipe.data, limit), tokenizer


def _with_length(data: Data, limit: int) -> Data:
    if data.max_length == "auto":
        return data.model_copy(update={"max_length": min(limit, MAX_LENGTH)})
    if data.max_length > limit:
        raise UserError(
            f"data.max_length: {data.max_length} is more than the model's limit of {limit} tokens",
            hint=f"take at most {limit}, or 'auto'",
        )
    return data


def _fate(tokens: int, supervised: int, data: Data) -> str:
    assert data.max_length != "auto"
    if not tokens:
        return "left out: empty"
    if not supervised:
        return "left out: nothing to learn"
    if tokens > data.max_length:
        told = {"drop": "dropped", "truncate": "truncated", "error": "an error"}[data.too_long]
        return f"{told}: longer than {data.max_length} tokens"
    return "used"


def spans_of(
    ids: list[int], mask: list[bool], branches: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[Span]:
    """A row's tokens as text, cut where supervision begins or ends. branches: tokens of each part of a row
    with several answers; all 0 for any other row."""
    if not any(branches):
        return _spans(ids, mask, tokenizer)
    spans, at = [], 0
    for part, count in zip(PARTS, branches, strict=False):
        found = _spans(ids[at : at + count], mask[at : at + count], tokenizer)
        spans += [replace(span, part=part) for span in found]
        at += count
    return spans


def _spans(ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    spans = []
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            spans.append(Span(_decoded(ids[start:i], tokenizer), mask[start]))
            start = i
    return spans


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _lengths(prepared: Prepared) -> dict[str, float]:
    """Token lengths of the training rows."""
    lengths = prepared.train.lengths
    middle = {f"p{round(q * 100)}": int(np.quantile(lengths, q, method="lower")) for q in QUANTILES}
    mean = round(float(lengths.mean()), 1)
    return {"min": int(lengths.min()), **middle, "max": int(lengths.max()), "mean": mean}
