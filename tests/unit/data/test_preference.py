"""Rows with two answers: every form they come in, their tokens, their counts, and their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunesmith.core.errors import UserError
from tunesmith.data.batches import StepPlan, eval_batches, sweep
from tunesmith.data.dialogue import RowError
from tunesmith.data.formats import shape_of
from tunesmith.data.mismatch import MismatchedStore
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.model.batch import IGNORE
from tunesmith.model.messages import Message
from tunesmith.model.template import encode_dialogue, encode_prompt
from tunesmith.recipe.schema import Data, Source

ASK = [{"role": "user", "content": "q"}]
BETTER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.fixture(scope="module")
def tokenizer(smol: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smol)


def parse(row: Any, wanted: str = "auto", **mapping: str) -> tuple[list[Message], list[Message]]:
    shape = shape_of(row, wanted, mapping, file="f", place="data.sources.0", pairs=True)
    found = shape.parse(row)
    assert found.rejected is not None
    return found.messages, found.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": ASK, "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": json.dumps(ASK), "chosen": json.dumps([BETTER]), "rejected": json.dumps(WORSE)},
        {"messages": ASK, "chosen": BETTER, "rejected": WORSE},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"chosen": [*ASK, BETTER], "rejected": [*ASK, WORSE]},
        {"prompt": "q", "messages": [*ASK, BETTER], "chosen": [*ASK, BETTER], "rejected": [*ASK, WORSE]},
    ],
)
def test_every_form_means_the_same(row: dict[str, Any]) -> None:
    chosen, rejected = parse(row)
    asked = {**ASK[0], "weight": 0}
    assert chosen == [asked, BETTER] and rejected == [asked, WORSE]


def test_earlier_answers_and_system_messages_are_context() -> None:
    history = [*ASK, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    chosen, rejected = parse({"prompt": history, "chosen": "good", "rejected": "bad", "system": "s"})
    assert [m["content"] for m in rejected] == ["s", "q", "a", "r", "bad"]
    learned = [m["content"] for m in chosen if m["role"] == "assistant" and m.get("weight") != 0]
    assert learned == ["good"]
    alpaca = {"instruction": "r", "input": "i", "history": [["q", "a"]], "chosen": "good", "rejected": "bad"}
    assert [m["content"] for m in parse(alpaca)[0]] == ["q", "a", "r\ni", "good"]


def test_an_answer_that_is_json_is_a_text() -> None:
    chosen, rejected = parse({"prompt": "q", "chosen": '{"a": 1}', "rejected": '[{"b": 2}]'})
    assert chosen[-1]["content"] == '{"a": 1}' and rejected[-1]["content"] == '[{"b": 2}]'


def test_columns_are_mapped() -> None:
    row = {"question": "q", "yes": "good", "no": "bad"}
    assert parse(row, prompt="question", chosen="yes", rejected="no")[1][-1]["content"] == "bad"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"chosen": "good", "rejected": "bad"}, "has no 'prompt'"),
        ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "'chosen' is 3"),
        ({"prompt": "q", "chosen": [], "rejected": "bad"}, "'chosen' does not begin with an answer"),
        ({"prompt": "q", "chosen": "good", "rejected": ASK}, "'rejected' does not begin with an answer"),
        ({"chosen": [*ASK, BETTER], "rejected": [{"role": "user", "content": "p"}, WORSE]}, "does not begin"),
        ({"prompt": "q", "chosen": {"from": "nobody", "value": "x"}, "rejected": "bad"}, "'nobody'"),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], told: str) -> None:
    with pytest.raises(RowError, match=told):
        parse(row)


def test_the_other_kind_of_rows_is_refused() -> None:
    with pytest.raises(UserError, match="chosen and a rejected answer") as caught:
        shape_of(["instruction", "output"], "auto", {}, file="f", place="data.sources.0", pairs=True)
    assert "{chosen: better, rejected: worse}" in (caught.value.hint or "")
    with pytest.raises(UserError, match="read as 'sharegpt'"):
        columns = ["conversations", "chosen", "rejected"]
        shape_of(columns, "sharegpt", {}, file="f", place="data.sources.0", pairs=True)
    with pytest.raises(UserError, match="preference data") as caught:
        shape_of(["prompt", "chosen", "rejected"], "preference", {}, file="f", place="data.sources.0")
    assert "objective.type" in (caught.value.hint or "")


# -- tokens and counts ----------------------------------------------------------------------------------------


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def prepared(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **more: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"max_length": 64, "eval_fraction": 0.0, "workers": 1} | more
    data = Data(sources=[Source(path=str(path))], **given)
    return prepare(data, tokenizer, cache_dir=folder / "cache", pairs=True)


def chat(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_tokens_are_the_prompt_once_and_both_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    store = prepared(tmp_path, tokenizer, [pair("why?", "good one", "good two, and longer")]).train
    ids, labels = store[0]
    prompt, chosen, rejected = store.branches_of(0).tolist()
    for begin, count, answer in (
        (prompt, chosen, "good one"),
        (prompt + chosen, rejected, "good two, and longer"),
    ):
        whole = encode_dialogue(tokenizer, chat("why?", answer))
        assert ids[:prompt].tolist() + ids[begin : begin + count].tolist() == whole.ids
        assert labels[:prompt].tolist() + labels[begin : begin + count].tolist() == whole.labels
    # What both answers begin with is learned in both, so it is no part of the prompt.
    assert prompt == len(encode_prompt(tokenizer, chat("why?", "")[:1]))
    assert prompt + chosen + rejected == len(ids) == store.lengths[0]
    assert store.supervised[0] == (labels != IGNORE).sum()


def test_every_row_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        pair("a?", "yes", "no"),
        pair("a?", "yes", "no"),
        pair("b?", "same", "same"),
        pair("c?", "yes", " "),
        pair("", "yes", "no"),
        pair("d?", "yes", "no " * 80),
        pair("e?", "x " * 25, "y " * 25),
    ]
    found = prepared(tmp_path, tokenizer, rows)
    counts = found.counts[0]
    assert counts.format == "preference" and counts.rows == 7
    assert (counts.kept, counts.duplicate, counts.unsupervised) == (3, 1, 1)
    assert (counts.empty, counts.dropped) == (2, 1)
    assert counts.kept + counts.dropped + counts.empty + counts.unsupervised == counts.rows
    # The last row has more than max_length tokens in all, but neither answer has.
    assert found.train.lengths[2] > 64 and found.train.row(2) == 7
    assert counts.tokens_kept == found.train.lengths.sum()
    assert counts.tokens_supervised == found.train.supervised.sum()
    again = prepared(tmp_path, tokenizer, rows)
    assert again.counts[0].from_cache and again.train[1][0].tolist() == found.train[1][0].tolist()


def test_pairs_are_not_truncated_and_long_ones_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [pair("a?", "yes", "no"), pair("d?", "yes", "no " * 80)]
    with pytest.raises(UserError, match=r"data\.too_long: truncate"):
        prepared(tmp_path, tokenizer, rows, too_long="truncate")
    with pytest.raises(UserError, match="line 2: "):
        prepared(tmp_path, tokenizer, rows, too_long="error")


def test_cached_rows_of_the_other_kind_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prepared(tmp_path, tokenizer, [pair("a?", "yes", "no")])
    data = Data(sources=[Source(path=str(tmp_path / "rows.jsonl"))], max_length=64, workers=1)
    with pytest.raises(UserError, match="preference data"):
        prepare(data, tokenizer, cache_dir=tmp_path / "cache")
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"instruction": "q", "output": "a"}) + "\n")
    data = Data(sources=[Source(path=str(plain))], max_length=64, workers=1, eval_fraction=0.0)
    prepare(data, tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="these are 'alpaca'"):
        prepare(data, tokenizer, cache_dir=tmp_path / "cache", pairs=True)


# -- steps ----------------------------------------------------------------------------------------------------


def many(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int = 40) -> Prepared:
    draw = np.random.default_rng(0)
    rows = [pair(f"{n}?", "a " * draw.integers(1, 20), "b " * draw.integers(1, 20)) for n in range(count)]
    return prepared(folder, tokenizer, rows, eval_fraction=0.2)


def plan_of(found: Prepared, answers: int) -> StepPlan:
    return StepPlan(
        found.train, packing=True, max_length=64 * answers, micro_batch_size=2, grad_accumulation=2, seed=0
    )


def test_pairs_are_packed_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = many(tmp_path, tokenizer)
    plan = plan_of(found, 2)
    batches = [batch for step in range(plan.total_steps) for batch in plan(step)]
    assert sorted(row for batch in batches for row in batch.rows) == sorted(
        found.train.row(i) for i in range(len(found.train))
    )
    for batch in batches:
        assert batch.branches is not None and batch.num_tokens <= 2 * 2 * 64
        assert batch.branches.sum(axis=1).tolist() == np.diff(batch.starts).tolist()
    assert plan.pack_efficiency > 0.8
    tokens = sum(batch.num_tokens for batch in batches)
    assert (tokens, sum(b.num_supervised for b in batches)) == (plan.total_tokens, plan.total_supervised)


def test_sweep_has_every_row_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    store = many(tmp_path, tokenizer).train
    batches = list(sweep(store, max_tokens=100))
    assert sorted(row for b in batches for row in b.rows) == sorted(store.row(i) for i in range(len(store)))
    assert all(b.num_tokens <= 100 or b.num_documents == 1 for b in batches)
    for one, other in zip(batches, eval_batches(store, max_tokens=100), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()


def test_the_third_answer_is_to_another_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = many(tmp_path, tokenizer)
    store = MismatchedStore(found.train)
    count = len(store)
    for i in (0, 1, count - 1):
        ids, labels = store[i]
        prompt, chosen, rejected, other = store.branches_of(i).tolist()
        own = prompt + chosen + rejected
        assert ids[:own].tolist() == found.train[i][0].tolist()
        place = (i + count // 2) % count
        theirs = found.train.branches_of(place).tolist()
        begin = theirs[0] + (theirs[1] if i % 2 else 0)
        assert ids[own:].tolist() == found.train[place][0][begin : begin + theirs[1 + i % 2]].tolist()
        assert other == len(ids) - own and store.lengths[i] == len(ids)
        assert store.supervised[i] == (labels != IGNORE).sum() > found.train.supervised[i]
    batch = plan_of(Prepared(store, store, []), 3)(0)[0]
    assert batch.branches is not None and batch.branches.shape[1] == 4


def test_a_third_answer_without_room_is_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [pair("word " * 40, "yes", "no"), pair("b?", "long " * 30, "long " * 29)]
    store = MismatchedStore(prepared(tmp_path, tokenizer, rows, max_length=96).train)
    prompt, _, _, other = store.branches_of(0).tolist()
    assert prompt + other <= 96
    assert len(MismatchedStore(prepared(tmp_path, tokenizer, rows, max_length=96).eval)) == 0
