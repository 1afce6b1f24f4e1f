"""Loss, perplexity and exact match of a model or run on rows it has not seen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_text
from tunesmith.core.progress import Meter
from tunesmith.core.store_cache import local_path
from tunesmith.model import attention
from tunesmith.model.generate import generate
from tunesmith.model.hardware import pick_device, pick_serving_dtype, set_threads
from tunesmith.model.requests import SamplingParams
from tunesmith.model.scoring import document_losses
from tunesmith.model.template import stop_token_ids
from tunesmith.workflows.eval_rows import EvalRow, EvalRows, packed, read_rows
from tunesmith.workflows.open_model import OpenModel, open_model
from tunesmith.workflows.run_facts import recipe_of

BATCH_TOKENS = 2048
MAX_CONCURRENT = 16


@dataclass(frozen=True)
class Answer:
    """One row: its summed loss over `supervised_tokens`, and the greedy answer where one was compared."""

    place: str
    question: str
    expected: str | None
    answer: str | None
    correct: bool | None
    finish_reason: str | None
    loss_sum: float
    supervised_tokens: int


@dataclass(frozen=True)
class EvalResult:
    """loss: mean over all supervised tokens, in nats; perplexity: e^loss; exact_match: correct / compared.

    rows: evaluated; tokens: all of them; supervised_tokens: those the loss is of; skipped: rows left out by
    reason; finish_length: answers that reached max_new_tokens (or the context) without a stop token.
    """

    model: str
    adapter: str | None
    data: str
    format: str
    rows: int
    skipped: dict[str, int]
    tokens: int
    supervised_tokens: int
    loss: float
    perplexity: float
    exact_match: float | None
    compared: int
    correct: int
    finish_length: int
    seconds: float
    dtype: str
    device: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def mismatches(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.correct is False]

    def as_dict(self, *, show: int = 3) -> dict[str, Any]:
        """For --json: all but the answers, and the first `show` mismatches."""
        kept = {key: value for key, value in self.__dict__.items() if key != "answers"}
        wrong = [asdict(answer) for answer in self.mismatches[:show]]
        # JSON has no infinity.
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return kept | {"perplexity": perplexity, "mismatches": wrong}


def evaluate_model(
    path: str,
    *,
    data: Path | str | Sequence[dict[str, Any]],
    adapter: str | None = None,
    data_format: str = "auto",
    columns: dict[str, str] | None = None,
    system: str | None = None,
    max_rows: int | None = None,
    max_new_tokens: int = 256,
    exact_match: bool = True,
    output: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    threads: int | Literal["auto"] = "auto",
    offline: bool = False,
) -> EvalResult:
    """Evaluate whatever `open_model` opens. `output`: a JSON-lines file for one object a row.

    A run's own system message is used unless `system` is given. Raises UserError for a model or rows that
    cannot be used.
    """
    set_threads(threads)
    place = pick_device(device)
    dtype = pick_serving_dtype(precision, place)
    # In 16 bits a merge would round the weights: the adapter stays beside the base there.
    path = local_path(path)
    recipe = recipe_of(path)
    opened = open_model(
        path,
        adapter=adapter,
        dtype=dtype,
        device=place,
        merge=dtype == torch.float32,
        offline=offline,
        trust_remote_code=recipe is not None and recipe.model.trust_remote_code,
    )
    if system is None and recipe is not None:
        system = recipe.data.system
    result = evaluate_open(
        opened,
        data=data,
        data_format=data_format,
        columns=columns,
        system=system,
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        exact_match=exact_match,
    )
    if output is not None:
        lines = [json.dumps(asdict(answer), ensure_ascii=False) for answer in result.answers]
        write_text(output, "\n".join(lines) + "\n")
    return result


def evaluate_open(
    opened: OpenModel,
    *,
    data: Path | str | Sequence[dict[str, Any]],
    data_format: str = "auto",
    columns: dict[str, str] | None = None,
    system: str | None = None,
    max_rows: int | None = None,
    max_new_tokens: int = 256,
    exact_match: bool = True,
) -> EvalResult:
    """Evaluate a model that is already open; the rest as `evaluate_model`."""
    began = time.monotonic()
    found = read_rows(
        data,
        opened.tokenizer,
        data_format=data_format,
        columns=columns,
        system=system,
        max_rows=max_rows,
        max_length=opened.context_length,
    )
    attention.install(opened.model)
    losses = _losses(opened.model, found.rows)
    answers = _answers(opened, found.rows, max_new_tokens) if exact_match else {}
    rows = [_answer(row, losses[i], answers.get(i)) for i, row in enumerate(found.rows)]
    name = str(data) if isinstance(data, (str, Path)) else f"{len(data)} rows"
    return _summed(opened, name, found, rows, time.monotonic() - began)


def _losses(model: Any, rows: list[EvalRow]) -> list[tuple[float, int]]:
    """(summed loss, supervised tokens) of every row."""
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    with Meter("loss", total=len(rows)) as meter:
        for numbers, batch in packed(rows, BATCH_TOKENS):
            for number, loss in zip(numbers, document_losses(model, batch), strict=True):
                found[number] = loss
            meter.advance(len(numbers))
    return found


def _answers(opened: OpenModel, rows: list[EvalRow], max_new_tokens: int) -> dict[int, tuple[str, str]]:
    """Row number: (greedy answer without special tokens, why it ended), for the rows that expect one."""
    stop_ids = stop_token_ids(opened.tokenizer, getattr(opened.model, "generation_config", None))
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    # Answers of like length end together: sort by prompt, since the expected answer must not be looked at.
    asked = sorted(
        (i for i, row in enumerate(rows) if row.expected is not None), key=lambda i: len(rows[i].prompt)
    )
    found: dict[int, tuple[str, str]] = {}
    with Meter("answers", total=len(asked)) as meter:
        for at in range(0, len(asked), 4 * MAX_CONCURRENT):
            part = asked[at : at + 4 * MAX_CONCURRENT]
            prompts = [rows[i].prompt for i in part]
            done = generate(
                opened.model, prompts, params, max_concurrent=MAX_CONCURRENT, max_length=opened.context_length
            )
            for number, answer in zip(part, done, strict=True):
                text = opened.tokenizer.decode(answer.ids, skip_special_tokens=True)
                found[number] = (text.strip(), answer.finish_reason)
            meter.advance(len(part))
    return found


def _answer(row: EvalRow, loss: tuple[float, int], answer: tuple[str, str] | None) -> Answer:
    text, reason = answer or (None, None)
    correct = None if text is None else text == row.expected
    return Answer(row.place, row.question, row.expected, text, correct, reason, *loss)


def _summed(
    opened: OpenModel, data: str, found: EvalRows, answers: list[Answer], seconds: float
) -> EvalResult:
    supervised = sum(answer.supervised_tokens for answer in answers)
    loss = sum(answer.loss_sum for answer in answers) / supervised
    if math.isnan(loss):
        raise UserError(f"{opened.name}: the loss is not a number", hint="are the weights damaged?")
    compared = [answer for answer in answers if answer.correct is not None]
    correct = sum(bool(answer.correct) for answer in compared)
    parameter = next(opened.model.parameters())
    return EvalResult(
        model=opened.name,
        adapter=str(opened.adapter) if opened.adapter else None,
        data=data,
        format=found.format,
        rows=len(answers),
        skipped=found.skipped,
        tokens=sum(len(row.ids) for row in found.rows),
        supervised_tokens=supervised,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        exact_match=correct / len(compared) if compared else None,
        compared=len(compared),
        correct=correct,
        finish_length=sum(answer.finish_reason == "length" for answer in compared),
        seconds=round(seconds, 3),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        answers=answers,
    )
