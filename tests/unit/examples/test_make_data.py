"""The quickstart's generator: same seed, same rows; and nothing of a test row was in training."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "examples" / "quickstart" / "make_data.py"
TABLES = ("last_names", "items", "streets")
PHRASES = ("openings", "signatures", "wishes", "places", "times", "early_times")


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_data"] = module
    spec.loader.exec_module(module)
    return module


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(row["messages"][2]["content"]) for row in rows]


def test_same_seed_gives_same_rows(make_data: ModuleType) -> None:
    assert make_data.make(3, 50, 20) == make_data.make(3, 50, 20)
    assert texts(make_data.make(3, 50, 20)[0]) != texts(make_data.make(4, 50, 20)[0])


def test_more_rows_begin_with_the_same_rows(make_data: ModuleType) -> None:
    assert make_data.make(0, 80, 10)[0][:30] == make_data.make(0, 30, 10)[0]


def test_rows_are_different_and_as_many_as_asked(make_data: ModuleType) -> None:
    train, test = make_data.make(0, 1500, 300)
    assert len(set(texts(train))) == 1500
    assert len(set(texts(test))) == 300


@pytest.mark.parametrize("table", TABLES)
def test_no_name_item_or_street_of_a_test_row_was_in_training(make_data: ModuleType, table: str) -> None:
    train, test = getattr(make_data.TRAIN, table), getattr(make_data.TEST, table)
    assert len(train) == len(set(train)) and len(test) == len(set(test))
    assert not set(train) & set(test)


def test_no_test_name_or_street_stands_anywhere_in_the_training_rows(make_data: ModuleType) -> None:
    seen = set(re.findall(r"\w+", " ".join(texts(make_data.make(0, 1500, 1)[0]))))
    words = make_data.TEST
    assert not seen & {*words.last_names, *words.streets}


@pytest.mark.parametrize("kind", PHRASES)
def test_no_phrase_of_a_test_row_was_in_training(make_data: ModuleType, kind: str) -> None:
    train = {phrase.casefold() for phrase in getattr(make_data.TRAIN, kind)}
    test = {phrase.casefold() for phrase in getattr(make_data.TEST, kind)}
    assert not train & test


def test_an_answer_is_compact_json_with_the_five_fields(make_data: ModuleType) -> None:
    for row in make_data.make(0, 300, 100)[1]:
        answer = row["messages"][2]["content"]
        order = json.loads(answer)
        assert tuple(order) == make_data.FIELDS
        assert order["day"] in make_data.DAYS
        assert answer == json.dumps(order, separators=(",", ":"))


def test_every_value_can_be_read_from_the_message(make_data: ModuleType) -> None:
    rows = [row for half in make_data.make(1, 600, 200) for row in half]
    for text, order in zip(texts(rows), orders(rows), strict=True):
        for field in ("name", "item", "address", "day"):
            assert order[field] in text, text
        assert "{" not in text
        assert quantity_in(make_data, text) == order["quantity"], text


def quantity_in(make_data: ModuleType, text: str) -> int:
    """The amount as a reader finds it: digits, a number word, or a named amount; longest wording first."""
    named = {"a pair of": 2, "half a dozen": 6, "a dozen": 12, "a single": 1, "one": 1}
    named |= {word: number for number, word in enumerate(make_data.NUMBER_WORDS, start=2)}
    text = re.sub(r"\d+ \w+ (Street|Road|Lane|Avenue|Drive)", "ADDRESS", text)
    digits = re.search(r"\d+", text)
    if digits:
        return int(digits[0])
    found = [word for word in named if re.search(rf"\b{word}\b", text)]
    return named[max(found, key=len)]


def test_messages_are_varied(make_data: ModuleType) -> None:
    """Phrasings, the values blanked out: hardly any comes twice."""
    train = make_data.make(0, 400, 1)[0]
    blanked = set()
    for text, order in zip(texts(train), orders(train), strict=True):
        for field in ("name", "item", "address", "day"):
            text = text.replace(str(order[field]), field.upper())
        blanked.add(re.sub(r"\d+", "N", text))
    assert len(blanked) > 380


def test_plurals(make_data: ModuleType) -> None:
    texts_of_many = " ".join(texts(make_data.make(0, 1500, 300)[0]))
    assert "wine glasses" in texts_of_many and "paint brushes" in texts_of_many
    assert "glasss" not in texts_of_many and "boxs" not in texts_of_many


def test_command_writes_both_files(make_data: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--train", "7", "--test", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "7 training rows, 3 test rows" in done.stdout
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == make_data.make(0, 7, 3)[0]
