"""`compat: xtuner`: packs against a plain transcription of its rules, losses against transformers' own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.convert.xtuner_order import Rates
from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.recipe.load import check
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.run_data import RunData
from tunesmith.workflows.train_compat import CompatSteps, open_compat

SIZE = 128


def alpaca_rows(path: Path, count: int) -> list[dict[str, str]]:
    draw = random.Random(5)
    rows = [
        {
            "instruction": f"Say {draw.randint(0, 99)}.",
            "input": "x " * draw.randint(0, 8) if draw.random() < 0.5 else "",
            "output": "word " * draw.randint(1, 60),
        }
        for _ in range(count)
    ]
    rows[3]["output"], rows[5]["output"], rows[7]["output"] = "<nooutput>", "", "long " * 400
    rows[9]["instruction"] = "cut " * 400  # its answer is truncated away
    path.write_text(json.dumps(rows))
    return rows


def recipe(path: Path, model: Path, **train: Any) -> Recipe:
    values = {
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": str(path), "format": "alpaca"}],
            "max_length": SIZE,
            "too_long": "truncate",
            "eval_fraction": 0,
        },
        "train": {"epochs": 3, "grad_accumulation": 16, "seed": 7, "lr": 2e-5} | train,
        "compat": {"tool": "xtuner", "map_workers": 4},
    }
    return check(values, "recipe")


@pytest.fixture
def opened(tmp_path: Path, tiny: Path) -> tuple[RunData, list[dict[str, str]], Any]:
    rows = alpaca_rows(tmp_path / "rows.json", 90)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return open_compat(recipe(tmp_path / "rows.json", tiny), tokenizer), rows, tokenizer


def transcribed_packs(rows: list[dict[str, str]], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """XTuner's rules on plain lists: tokenise apart, truncate, filter, shuffle, shard, pack, lose the tail."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    documents = []
    for row in rows:
        if row["output"] == "<nooutput>":
            continue
        asked = f"{row['instruction']}\n{row['input']}"
        head = [1, *ids_of(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")]
        answer, sep = ids_of(row["output"] + "<|im_end|>"), ids_of("\n")
        ids = (head + answer + sep)[:SIZE]
        labels = ([-100] * len(head) + answer + [-100] * len(sep))[:SIZE]
        if any(label >= 0 for label in labels):
            documents.append((ids, labels))
    order = np.random.default_rng(7).permutation(len(documents))
    packs = []
    for shard in np.array_split(order, 4):
        ids = [i for n in shard for i in documents[n][0]]
        labels = [i for n in shard for i in documents[n][1]]
        cuts = range(0, len(ids) - SIZE + 1, SIZE)
        packs += [(ids[at : at + SIZE], labels[at : at + SIZE]) for at in cuts]
    return packs


def test_token_ids_labels_packs_and_order(opened: tuple[RunData, list[dict[str, str]], Any]) -> None:
    data, rows, tokenizer = opened
    packs = transcribed_packs(rows, tokenizer)
    orders = [
        torch.randperm(len(packs), generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        for epoch in range(3)
    ]
    expected = [packs[number] for order in orders for number in order]
    found = [batch for step in range(data.steps.total_steps) for batch in data.steps(step)]
    assert len(found) == len(expected) == 3 * len(packs)
    for batch, (ids, labels) in zip(found, expected, strict=True):
        assert batch.input_ids.tolist() == ids
        assert batch.labels.tolist()[1:] == labels[1:]  # nothing predicts the first token of a pack
        assert batch.starts.tolist() == [0, SIZE]


def test_a_truncated_answer_is_trained_without_its_stop_token_and_counted(
    opened: tuple[RunData, list[dict[str, str]], Any],
) -> None:
    counts = opened[0].prepared.counts[0]
    assert (counts.rows, counts.kept, counts.empty, counts.unsupervised) == (90, 88, 1, 1)
    assert counts.cut_answers >= 1 and counts.truncated >= counts.cut_answers


def test_the_rate_of_a_step_is_that_of_its_last_micro_batch(
    opened: tuple[RunData, list[dict[str, str]], Any],
) -> None:
    data = opened[0]
    assert isinstance(data.steps, CompatSteps) and data.lr is not None
    per_epoch = len(data.steps.packs)
    rates = Rates(peak=2e-5, warmup_epochs=0.09, epochs=3, per_epoch=per_epoch)
    last = data.steps.total_steps - 1
    assert [data.lr(0), data.lr(1)] == [rates.lr(15), rates.lr(31)]
    assert data.lr(last) == rates.lr(3 * per_epoch - 1)


def test_a_step_averages_the_means_of_its_micro_batches_as_transformers_computes_them(
    opened: tuple[RunData, list[dict[str, str]], Any], tiny: Path
) -> None:
    data = opened[0]
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    attention.install(ours)
    objective = data.objective(ours)
    batches = data.steps(data.steps.total_steps - 1)
    units = sum(objective.units(batch) for batch in batches)
    assert units == len(batches) == data.steps.total_steps * 16 % 16 + len(batches)
    for batch in batches:
        ids, labels = torch.from_numpy(batch.input_ids)[None], torch.from_numpy(batch.labels)[None]
        (theirs(input_ids=ids, labels=labels).loss / len(batches)).backward()
        (objective.total(ours, batch) / units).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), (
            f"{name}: {(a.grad - b.grad).abs().max()}"
        )


def test_a_micro_batch_in_parts_has_the_loss_of_the_whole(tmp_path: Path, tiny: Path) -> None:
    """As after a lack of memory, which halves it at the borders of its packs."""
    alpaca_rows(tmp_path / "rows.json", 90)
    given = recipe(tmp_path / "rows.json", tiny, micro_batch_size=2, grad_accumulation=2)
    data = open_compat(given, AutoTokenizer.from_pretrained(tiny))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    attention.install(model)
    objective, batch = data.objective(model), data.steps(0)[0]
    with torch.no_grad():
        whole = objective.total(model, batch)
        parts = [objective.total(model, batch.part(number, number + 1)) for number in range(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_totals_and_longest_are_what_the_steps_hold(
    opened: tuple[RunData, list[dict[str, str]], Any],
) -> None:
    steps = opened[0].steps
    batches = [batch for step in range(steps.total_steps) for batch in steps(step)]
    totals = steps.totals()
    assert totals.tokens == sum(batch.num_tokens for batch in batches)
    assert totals.supervised == sum(batch.num_supervised for batch in batches)
    assert steps.longest().num_tokens == max(batch.num_tokens for batch in batches)
    assert steps.epochs_after(steps.total_steps) == 3


def test_without_packing_rows_keep_their_order_and_a_micro_batch_has_no_padding(
    tmp_path: Path, tiny: Path
) -> None:
    alpaca_rows(tmp_path / "rows.json", 40)
    given = recipe(tmp_path / "rows.json", tiny, micro_batch_size=2, grad_accumulation=2)
    given = given.model_copy(update={"data": given.data.model_copy(update={"packing": False})})
    data = open_compat(given, AutoTokenizer.from_pretrained(tiny))
    first = torch.randperm(38, generator=torch.Generator().manual_seed(7)).tolist()[:4]
    batches = data.steps(0)
    assert [len(batch.starts) - 1 for batch in batches] == [2, 2]
    kept = [n for n in range(1, 41) if n not in (4, 10)]
    assert [row for batch in batches for row in batch.rows] == [kept[number] for number in first]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("holds out nothing", {"data": {"eval_fraction": 0.1}}),
    ("it truncates", {"data": {"too_long": "drop"}}),
    ("keeps them", {"data": {"duplicates": "drop"}}),
    ("whole epochs", {"train": {"epochs": 1.5}}),
    ("takes a ratio", {"train": {"warmup_steps": 3}}),
    ("cosine and constant", {"train": {"schedule": "linear"}}),
    ("sft alone", {"objective": {"type": "dpo"}}),
]


@pytest.mark.parametrize(("fault", "change"), WRONG, ids=[fault for fault, _ in WRONG])
def test_settings_that_xtuner_does_not_have(
    tmp_path: Path, tiny: Path, fault: str, change: dict[str, Any]
) -> None:
    alpaca_rows(tmp_path / "rows.json", 20)
    values = recipe(tmp_path / "rows.json", tiny).model_dump(mode="json")
    for section, keys in change.items():
        values[section] |= keys
    with pytest.raises(UserError, match=fault):
        open_compat(check(values, "recipe"), AutoTokenizer.from_pretrained(tiny))


def test_traps_are_told_and_where_xtuner_stops_we_say_so(tmp_path: Path, tiny: Path) -> None:
    alpaca_rows(tmp_path / "rows.json", 60)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    few = recipe(tmp_path / "rows.json", tiny)
    few = few.model_copy(update={"data": few.data.model_copy(update={"max_length": 160})})
    steps = open_compat(few, tokenizer).steps
    assert isinstance(steps, CompatSteps) and 12 <= len(steps.packs) <= 22
    assert any("stays at 1e-05 of train.lr" in note for note in steps.warnings)
    assert any("tokens left over by packing are lost" in note for note in steps.warnings)
    tinier = few.model_copy(update={"data": few.data.model_copy(update={"max_length": 1000})})
    with pytest.raises(UserError, match="end should be larger than begin"):
        open_compat(tinier, tokenizer)
    dropped = few.model_copy(update={"compat": few.compat.model_copy(update={"deepspeed": True})})  # type: ignore[union-attr]
    assert open_compat(dropped, tokenizer).steps.total_steps == 3 * len(steps.packs) // 16
