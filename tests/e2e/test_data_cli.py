"""`tunesmith data` from the outside: what it prints, and one clear error for everything that can be wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import Cli
from tunesmith.cli.main import main

QA = {"instruction": "What is 2+2?", "output": "It is 4."}


def recipe(folder: Path, model: Path, *paths: Path | str, **data: Any) -> Path:
    sources = [{"path": str(path)} for path in paths]
    content = {"model": {"path": str(model)}, "data": {"sources": sources} | data}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def called(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """The real command, in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


# -- what it prints ---------------------------------------------------------------------------------


def test_check_counts_as_one_json_object(cli: Cli, tmp_path: Path, tiny: Path) -> None:
    rows = [QA | {"input": str(i)} for i in range(40)] + [QA | {"output": ""}, QA | {"output": "x " * 3000}]
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", rows), max_length=128, eval_fraction=0.2)
    found: Any = cli.json("data", "check", path, env=warm.COLD)
    counts = found["files"][0]
    assert (counts["format"], counts["rows"], counts["kept"]) == ("alpaca", 42, 40)
    assert (counts["dropped"], counts["empty"]) == (1, 1)
    assert found["train_rows"] + found["eval_rows"] == 40
    assert found["totals"]["tokens_kept"] == counts["tokens_kept"] > counts["tokens_supervised"] > 0
    assert found["row_tokens"]["min"] <= found["row_tokens"]["p50"] <= found["row_tokens"]["max"] <= 128
    assert 0.5 < found["packing"]["efficiency"] <= 1
    assert found["epoch"]["steps"] == found["total_steps"] == found["packing"]["packs"]


def test_show_marks_what_is_learned_without_colour(cli: Cli, tmp_path: Path, tiny: Path) -> None:
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", [QA, QA | {"output": "Escape \u001b[31m"}]))
    done = cli("data", "show", path, "-n", "2")
    assert done.returncode == 0, done.stderr
    assert (
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧" in done.stdout
    )
    assert "rows.jsonl: 1 (alpaca)" in done.stdout
    assert "\u001b" not in done.stdout
    assert r"\x1b[31m" in done.stdout


def test_show_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    first, second = (
        lines(tmp_path / "a.jsonl", [QA] * 5),
        lines(tmp_path / "b.jsonl", [{"text": "Hi there."}]),
    )
    path = recipe(tmp_path, tiny, first, second)
    code, out, _ = called(capsys, "data", "show", path, "-n", "3", "--json")
    rows = json.loads(out)["rows"]
    assert (code, [row["row"] for row in rows]) == (0, [1, 2, 3])
    spans = rows[0]["spans"]
    assert [s["text"] for s in spans if s["supervised"]] == ["It is 4.<|im_end|>"]
    assert rows[0]["tokens"] == len(rows[0]["ids"])
    code, out, _ = called(capsys, "data", "show", path, "--source", "1", "--json")
    assert [(row["format"], row["supervised_tokens"]) for row in json.loads(out)["rows"]] == [("text", 3)]


def test_show_tells_what_becomes_of_a_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    rows = [QA, QA | {"output": ""}, QA | {"output": "x " * 500}]
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", rows), max_length=100)
    _, out, _ = called(capsys, "data", "show", path, "--json")
    fates = [row["fate"] for row in json.loads(out)["rows"]]
    assert fates == ["used", "left out: empty", "dropped: longer than 100 tokens"]


def test_check_for_people_names_format_and_notes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    rows = [QA | {"input": str(i)} for i in range(9)] + [QA | {"output": "x " * 500}]
    a, b = lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.jsonl", [{"text": "Hi there."}])
    code, out, _ = called(capsys, "data", "check", recipe(tmp_path, tiny, a, b, max_length=100))
    assert code == 0
    assert "a.jsonl: alpaca" in out
    assert "b.jsonl: text" in out
    assert "all 2 files" in out
    assert "1 rows are longer than max_length and dropped" in out


def test_overrides(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", [QA] * 4), eval_fraction=0)
    code, out, _ = called(capsys, "data", "check", path, "--set", "data.packing=false", "--json")
    found = json.loads(out)
    assert (code, found["packing"]["on"], found["total_steps"], found["max_length"]) == (0, False, 4, 1024)


# -- errors: exit code 2, one message, no traceback -------------------------------------------------

GARBAGE = random.Random(1).randbytes(2000)
GOOD = json.dumps(QA).encode() + b"\n"

BAD_FILES = [
    ("garbage.json", GARBAGE, "not UTF-8"),
    ("garbage.jsonl", GARBAGE, "not UTF-8"),
    ("garbage.csv", GARBAGE, "not UTF-8"),
    ("garbage.parquet", GARBAGE, "not a parquet file"),
    ("garbage.arrow", GARBAGE, "not an Arrow file"),
    ("empty.jsonl", b"", "the file is empty"),
    ("blank.jsonl", b"\n\n", "the file has no rows"),
    ("nothing.json", b"[]", "the file has no rows"),
    ("latin.jsonl", GOOD + b'{"instruction": "caf\xe9", "output": "x"}\n', "line 2: byte 21 is not UTF-8"),
    ("column.jsonl", b'{"instruction": "q", "outputs": "a"}\n', "no format fits the columns 'instruction', 'outputs'"),
    ("types.jsonl", GOOD + b'{"instruction": 1, "output": "a"}\n', "line 2: 'instruction' is 1 (int), not text"),
    ("mixed.jsonl", GOOD + b"{broken\n" + GOOD, "line 2: not JSON"),
    ("numbers.json", b"[1, 2, 3]", "row 1: a int, not an object"),
    ("object.json", b'{"instruction": "q"}', "one JSON object that holds no list of rows"),
    ("headless.csv", b"What is 2+2?,It is 4.\nWhat is 3+3?,6\n", "no format fits the columns"),
    ("cells.csv", b"instruction,output\nq,a\nq,a,b\n", "row 2: 3 cells where the header has 2"),
    ("rows.txt", b"hello", "suffix that is not supported"),
    ("zero.jsonl", b'{"instruction": "q", "output": ""}\n', "none is left to train on (1 empty)"),
    ("surrogate.jsonl", b'{"text": "\\ud83d"}\n', "half of a surrogate pair"),
    ("tools.jsonl", b'{"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}]}\n', "no place for tool"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "told"), BAD_FILES, ids=[case[0] for case in BAD_FILES])
def test_bad_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    code, out, err = called(capsys, "data", "check", recipe(tmp_path, tiny, tmp_path / name))
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"path": "missing.jsonl"}, "data.sources.0.path: 'missing.jsonl' does not exist"),
        ({"path": "EMPTY"}, "holds no data file"),
        ({"path": "ROWS", "columns": {"instruction": "instructions"}}, "did you mean 'instruction'?"),
        ({"path": "ROWS", "columns": {"instuction": "instruction"}}, "did you mean 'instruction'?"),
        (
            {"path": "ROWS", "format": "sharegpt"},
            "the column 'conversations' of the format 'sharegpt' is missing",
        ),
        ({"path": "ROWS", "format": "shareGPT"}, "format"),
        ({"path": "owner/name"}, "neither a local path nor a data set that can be had from the hub"),
    ],
)
def test_bad_sources(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, source: dict[str, Any], told: str
) -> None:
    (tmp_path / "empty").mkdir()
    rows = lines(tmp_path / "rows.jsonl", [QA])
    path = {"EMPTY": str(tmp_path / "empty"), "ROWS": str(rows)}.get(source["path"], source["path"])
    file = recipe(tmp_path, tiny)
    content = json.loads(file.read_text())
    content["data"]["sources"] = [source | {"path": path}]
    file.write_text(json.dumps(content))
    code, out, err = called(capsys, "data", "check", file)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_fraction": 0.999999999}, "none is left to train on (2 held out)"),
        ({"max_length": 8}, "none is left to train on (2 dropped)"),
        ({"max_length": 8, "too_long": "error"}, "line 1"),
        ({"max_length": 100_000}, "more than the model's limit of 1024"),
    ],
)
def test_settings_that_leave_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, settings: dict[str, Any], told: str
) -> None:
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", [QA, QA | {"input": "x"}]), **settings)
    code, _, err = called(capsys, "data", "check", path)
    assert code == 2
    assert told in err


def test_an_error_as_json_is_one_object(cli: Cli, tmp_path: Path, tiny: Path) -> None:
    done = cli("data", "check", recipe(tmp_path, tiny, "missing.jsonl"), "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "UserError"
    assert "missing.jsonl" in error["what"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_bad_row_is_told_by_both_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, command: str
) -> None:
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", [QA, QA | {"output": 1}]))
    code, _, err = called(capsys, "data", command, path)
    assert code == 2
    assert "rows.jsonl: line 2: 'output' is 1 (int), not text" in err


def test_a_source_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    path = recipe(tmp_path, tiny, lines(tmp_path / "rows.jsonl", [QA]))
    code, _, err = called(capsys, "data", "show", path, "--source", "3")
    assert (code, "the recipe has sources 0 to 0" in err) == (2, True)
