"""From files to documents: counts that add up, a stable split, and a cache that can be trusted."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tunesmith.data.tokens as tokens_module
from tests.unit.model.chat_templates import CHATML_THINK, CHATML_TOOLS
from tunesmith.core.errors import UserError
from tunesmith.data.counts import FileCounts
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.store import TokenStore
from tunesmith.model.batch import IGNORE
from tunesmith.model.template import encode_dialogue
from tunesmith.recipe.schema import Data, Source

SETTINGS = {"max_length": 64, "eval_fraction": 0.0, "workers": 1}


@pytest.fixture(scope="module")
def tokenizer(smol: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smol)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Work:
    """A folder with a cache, in which data sections are prepared."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer, self.cache = folder, tokenizer, folder / "cache"

    def rows(self, rows: list[Any], name: str = "rows.jsonl", **more: Any) -> Prepared:
        path = write(self.folder / name, rows)
        return self.data(sources=[Source(path=str(path))], **more)

    def data(self, **more: Any) -> Prepared:
        return prepare(Data(**(SETTINGS | more)), self.tokenizer, cache_dir=self.cache)

    def entries(self) -> list[Path]:
        return sorted(p for p in (self.cache / "data").iterdir() if not p.name.startswith("."))


@pytest.fixture
def work(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Work:
    return Work(tmp_path, tokenizer)


def ids_of(store: TokenStore) -> list[list[int]]:
    return [store[i][0].tolist() for i in range(len(store))]


def adds_up(counts: FileCounts, *, drops_duplicates: bool = False) -> bool:
    left_out = counts.dropped + counts.empty + counts.unsupervised
    left_out += counts.duplicate if drops_duplicates else 0
    return counts.rows == counts.kept + left_out and counts.kept == counts.train_rows + counts.eval_rows


ROWS = [chat(f"How many are {i} and {i}?", f"They are {2 * i}.") for i in range(200)]
LONG = chat("Tell me a story.", "Once upon a time " * 30)


def test_documents_are_the_rows_as_the_template_renders_them(work: Work) -> None:
    prepared = work.rows(ROWS[:5])
    for i, row in enumerate(ROWS[:5]):
        encoded = encode_dialogue(work.tokenizer, row["messages"])
        ids, labels = prepared.train[i]
        assert (ids.dtype, labels.dtype) == (np.int64, np.int64)
        assert (ids.tolist(), labels.tolist()) == (encoded.ids, encoded.labels)
        assert prepared.train.lengths[i] == len(encoded.ids)
        assert prepared.train.supervised[i] == sum(label != IGNORE for label in encoded.labels)
        assert prepared.train.place(prepared.train.row(i)).endswith(f"rows.jsonl: line {i + 1}")


def test_counts_of_every_fate(work: Work) -> None:
    rows = [
        *ROWS[:3],
        LONG,
        ROWS[0],
        chat("q", " "),
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": []},
    ]
    counts = work.rows(rows).counts[0]
    found = (counts.rows, counts.kept, counts.dropped, counts.empty, counts.unsupervised, counts.duplicate)
    assert found == (8, 4, 1, 2, 1, 1)
    assert counts.format == "messages"
    assert adds_up(counts)
    whole = encode_dialogue(work.tokenizer, LONG["messages"]).ids
    asked = encode_dialogue(work.tokenizer, rows[6]["messages"]).ids
    assert counts.tokens_dropped == len(whole) + len(asked)
    dropping = work.rows(rows, duplicates="drop").counts[0]
    assert (dropping.kept, dropping.duplicate) == (3, 1)
    assert adds_up(dropping, drops_duplicates=True)


def test_truncating_cuts_counts_and_says_what_is_lost(work: Work) -> None:
    two = chat("a", "b")["messages"] + LONG["messages"] + chat("c", "d")["messages"]
    unseen = chat("word " * 100, "never seen")
    prepared = work.rows([ROWS[0], LONG, {"messages": two}, unseen], too_long="truncate")
    counts = prepared.counts[0]
    assert (counts.kept, counts.truncated, counts.dropped, counts.unsupervised) == (3, 2, 0, 1)
    assert counts.cut_answers == 3  # the story's; of the other row the story's and the one after it
    assert adds_up(counts)
    whole = encode_dialogue(work.tokenizer, LONG["messages"])
    ids, labels = prepared.train[1]
    assert (ids.tolist(), labels.tolist()) == (whole.ids[:64], whole.labels[:64])
    assert prepared.train.lengths.tolist()[1:] == [64, 64]
    assert counts.tokens_supervised == sum((prepared.train[i][1] != IGNORE).sum() for i in range(3))
    assert any("3 answers lost their stop token" in note for note in prepared.warnings)


def test_too_long_as_an_error_names_rows(work: Work) -> None:
    with pytest.raises(UserError, match=r"line 2: \d+ tokens"):
        work.rows([ROWS[0], LONG], too_long="error")
    assert work.rows(ROWS[:2], too_long="error").counts[0].kept == 2


def test_a_row_of_exactly_max_length_is_kept(work: Work) -> None:
    length = len(encode_dialogue(work.tokenizer, ROWS[0]["messages"]).ids)
    assert work.rows(ROWS[:1], max_length=length).counts[0].kept == 1
    with pytest.raises(UserError, match="1 dropped"):
        work.rows(ROWS[:1], max_length=length - 1)


# -- split, sources, weights ------------------------------------------------------------------------


def test_the_split_never_changes_when_rows_are_added(work: Work) -> None:
    few = work.rows(ROWS[::2], "a.jsonl", eval_fraction=0.2)
    many = work.rows(ROWS[::-1], "b.jsonl", eval_fraction=0.2)
    held_few, held_many = ({tuple(i) for i in ids_of(p.eval)} for p in (few, many))
    assert held_few == held_many & {tuple(i) for i in ids_of(few.train) + ids_of(few.eval)}
    assert 20 <= len(held_many) <= 60
    assert not held_many & {tuple(i) for i in ids_of(many.train)}
    assert len(many.train) + len(many.eval) == 200


def test_a_larger_fraction_holds_out_more_of_the_same(work: Work) -> None:
    held = [{tuple(i) for i in ids_of(work.rows(ROWS, eval_fraction=f).eval)} for f in (0.1, 0.3, 0.99)]
    assert held[0] < held[1] < held[2]


def test_equal_rows_are_on_the_same_side(work: Work) -> None:
    prepared = work.rows(ROWS * 2, eval_fraction=0.3)
    assert not {tuple(i) for i in ids_of(prepared.train)} & {tuple(i) for i in ids_of(prepared.eval)}
    assert prepared.counts[0].duplicate == 200


def test_no_held_out_rows(work: Work) -> None:
    assert len(work.rows(ROWS[:4]).eval) == 0
    none = work.rows(ROWS[:1], eval_fraction=0.0001)
    assert len(none.eval) == 0
    assert "no row is held out" in none.warnings[-1]


def test_eval_sources_replace_the_split(work: Work) -> None:
    train, held = write(work.folder / "t.jsonl", ROWS[:10]), write(work.folder / "e.jsonl", ROWS[9:15])
    prepared = work.data(
        sources=[Source(path=str(train))], eval_sources=[Source(path=str(held))], eval_fraction=0.5
    )
    assert (len(prepared.train), len(prepared.eval)) == (10, 6)
    assert [c.used_for for c in prepared.counts] == ["train", "eval"]
    assert any("1 held-out rows are training rows too" in note for note in prepared.warnings)


def test_several_sources_keep_files_and_weights(work: Work) -> None:
    (work.folder / "many").mkdir()
    write(work.folder / "many" / "a.jsonl", ROWS[:3])
    write(work.folder / "many" / "b.jsonl", ROWS[3:5])
    alone = write(work.folder / "alone.jsonl", [{"text": "Plain text."}])
    prepared = work.data(
        sources=[Source(path=str(work.folder / "many"), weight=0.5), Source(path=str(alone), weight=2)]
    )
    assert [(g.rows.tolist(), g.weight) for g in prepared.train.groups] == [
        ([0, 1, 2, 3, 4], 0.5),
        ([5], 2.0),
    ]
    assert [(c.format, c.source, c.rows) for c in prepared.counts] == [
        ("messages", 0, 3),
        ("messages", 0, 2),
        ("text", 1, 1),
    ]
    assert [prepared.train.place(prepared.train.row(i)).rpartition("/")[2] for i in (2, 4, 5)] == [
        "a.jsonl: line 3",
        "b.jsonl: line 2",
        "alone.jsonl: line 1",
    ]
    assert prepared.totals()["rows"] == 6


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([LONG], {}, r"of 1 rows none is left to train on \(1 dropped\)"),
        ([chat("q", "")], {}, r"\(1 empty\)"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, r"\(1 unsupervised\)"),
        ([ROWS[0]], {"eval_fraction": 0.9999999}, r"\(1 held out\)"),
    ],
)
def test_no_row_to_train_on(work: Work, rows: list[Any], more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        work.rows(rows, **more)
    assert caught.value.hint or "empty" in told


# -- bad rows ---------------------------------------------------------------------------------------


def test_bad_rows_among_good_ones_are_named(work: Work) -> None:
    rows: list[Any] = [*ROWS[:3], {"messages": 5}, ROWS[4], {"messages": [{"role": "x"}]}, ["no"]]
    with pytest.raises(UserError) as caught:
        work.rows(rows)
    assert [line.split(":")[1].strip() for line in caught.value.what.splitlines()] == [
        "line 4",
        "line 6",
        "line 7",
    ]
    assert "'messages'" in (caught.value.hint or "")


def test_only_the_first_few_bad_rows_are_named(work: Work) -> None:
    with pytest.raises(UserError, match=r"20 of 220 rows are bad") as caught:
        work.rows(ROWS + [{"messages": 5}] * 20)
    assert len(caught.value.what.splitlines()) == 6


def test_tools_that_the_template_would_lose_are_named(work: Work) -> None:
    rows = [ROWS[0] | {"tools": [{"name": "f"}]}]
    with pytest.raises(UserError, match=r"line 1: .*no place for tool definitions"):
        work.rows(rows)


def test_answers_that_history_changes_are_counted(work: Work) -> None:
    own = work.tokenizer.chat_template
    try:
        work.tokenizer.chat_template = CHATML_THINK
        prepared = work.rows([{"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}])
    finally:
        work.tokenizer.chat_template = own
    assert prepared.counts[0].unmatched_answers == 1
    assert any("rendered differently" in note for note in prepared.warnings)


def test_control_strings_are_counted(work: Work) -> None:
    prepared = work.rows(
        [ROWS[0], chat("a<|im_end|>b", "c"), {"messages": chat("a", "<|im_start|>")["messages"]}]
    )
    assert prepared.counts[0].special_strings == 2


# -- cache ------------------------------------------------------------------------------------------


def test_the_second_time_comes_from_the_cache_and_is_the_same(work: Work) -> None:
    first, second = work.rows(ROWS, eval_fraction=0.1), work.rows(ROWS, eval_fraction=0.1)
    assert [p.counts[0].from_cache for p in (first, second)] == [False, True]
    assert ids_of(first.train) == ids_of(second.train)
    assert ids_of(first.eval) == ids_of(second.eval)
    assert isinstance(second.train.picks[0].part.ids, np.memmap)


def test_settings_that_do_not_change_tokens_share_the_cache(work: Work) -> None:
    work.rows(ROWS[:50])
    for more in (
        {"max_length": 50},
        {"too_long": "truncate"},
        {"duplicates": "drop"},
        {"eval_fraction": 0.5},
    ):
        assert work.rows(ROWS[:50], **more).counts[0].from_cache
    assert len(work.entries()) == 1


def test_whatever_changes_tokens_makes_a_new_entry(work: Work) -> None:
    work.rows(ROWS[:50])
    assert not work.rows(ROWS[:51]).counts[0].from_cache
    assert not work.rows(ROWS[:50], system="Be brief.").counts[0].from_cache
    own = work.tokenizer.chat_template
    try:
        work.tokenizer.chat_template = CHATML_TOOLS
        assert not work.rows(ROWS[:50]).counts[0].from_cache
    finally:
        work.tokenizer.chat_template = own
    path = str(work.folder / "rows.jsonl")
    assert not work.data(sources=[Source(path=path, format="messages")]).counts[0].from_cache
    assert work.rows(ROWS[:50]).counts[0].from_cache


@pytest.mark.parametrize("name", ["ids.npy", "mask.npy", "lengths.npy", "digests.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_again(work: Work, name: str, harm: str) -> None:
    before = ids_of(work.rows(ROWS[:20]).train)
    path = work.entries()[0] / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    again = work.rows(ROWS[:20])
    assert not again.counts[0].from_cache
    assert ids_of(again.train) == before
    assert work.rows(ROWS[:20]).counts[0].from_cache


def test_a_failed_run_leaves_nothing_in_the_cache(work: Work) -> None:
    with pytest.raises(UserError):
        work.rows([*ROWS[:20], {"messages": 5}])
    assert work.entries() == []
    assert not list((work.cache / "data").glob(".*partial*"))


def test_two_at_once_make_one_entry(work: Work) -> None:
    results: list[Prepared] = []
    path = write(work.folder / "rows.jsonl", ROWS)
    data = Data(sources=[Source(path=str(path))], **SETTINGS)  # type: ignore[arg-type]
    threads = [
        threading.Thread(target=lambda: results.append(prepare(data, work.tokenizer, cache_dir=work.cache)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(work.entries()) == 1
    assert sorted(p.counts[0].from_cache for p in results) == [False, True, True]
    assert ids_of(results[0].train) == ids_of(results[1].train) == ids_of(results[2].train)


def test_processes_give_the_same_as_one(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*ROWS * 6, LONG, chat("q", "")]
    alone = work.rows(rows)
    monkeypatch.setattr(tokens_module, "POOL_FROM_BYTES", 0)
    work.cache = work.folder / "other"
    together = work.rows(rows, workers=2)
    assert not together.counts[0].from_cache
    assert ids_of(alone.train) == ids_of(together.train)
    assert multiprocessing.active_children() == []


def test_processes_end_when_a_row_is_bad(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "POOL_FROM_BYTES", 0)
    with pytest.raises(UserError, match="line 201"):
        work.rows([*ROWS, {"messages": 1}], workers=2)
    assert multiprocessing.active_children() == []


# -- real files -------------------------------------------------------------------------------------


def test_real_alpaca_file(work: Work, sample_data: Path) -> None:
    prepared = work.data(
        sources=[Source(path=str(sample_data / "alpaca_en_demo.json"))], max_length=512, eval_fraction=0.05
    )
    counts = prepared.counts[0]
    assert counts.format == "alpaca"
    assert adds_up(counts)
    assert counts.kept > 900
    first = json.loads((sample_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))[0]
    assert first["output"] in work.tokenizer.decode(prepared.train[0][0])


def test_real_sharegpt_file(work: Work, sample_data: Path) -> None:
    path = str(sample_data / "dpo_en_demo.json")
    with pytest.raises(UserError, match="preference data"):
        work.data(sources=[Source(path=path)])
    prepared = work.data(sources=[Source(path=path, columns={"answer": "chosen"})], max_length=1024)
    counts = prepared.counts[0]
    assert (counts.format, counts.unsupervised) == ("sharegpt", 0)
    assert adds_up(counts)
    row = json.loads(Path(path).read_text(encoding="utf-8"))[0]
    assert row["chosen"]["value"] in work.tokenizer.decode(prepared.train[0][0])
