"""Every file type read from a real file of it, and every way a file can be wrong."""

from __future__ import annotations

import csv
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from tunesmith.core.errors import UserError
from tunesmith.data.readers import BadRow, open_source
from tunesmith.recipe.schema import Source

ROWS = [{"prompt": 'a, "b"\nc', "completion": "数据 🙂"}, {"prompt": "x", "completion": "y"}]


def read(path: Path, **more: Any) -> list[tuple[int, Any]]:
    files = open_source(Source(path=str(path), **more), "data.sources.0")
    return [row for file in files for row in file.read()]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_wrapped(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json),
        ("rows.json", write_wrapped),
        ("rows.json", write_lines),
        ("rows.jsonl", write_lines),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
        ("rows.arrow", write_arrow_stream),
        ("ROWS.ARROW", write_arrow_file),
    ],
)
def test_every_file_type(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert read(tmp_path / name) == [(1, ROWS[0]), (2, ROWS[1])]
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_folder_is_read_in_the_order_of_names_and_depth(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden/d.jsonl", ".e.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for _, row in read(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS[:1]), test=Dataset.from_list(ROWS[1:])).save_to_disk(
        tmp_path / "two"
    )
    assert read(tmp_path / "one") == [(1, ROWS[0]), (2, ROWS[1])]
    assert read(tmp_path / "two", split="test") == [(1, ROWS[1])]
    with pytest.raises(UserError, match="'dev' is not a split") as caught:
        read(tmp_path / "two", split="dev")
    assert caught.value.hint == "it has train, test"


def test_the_digest_of_a_saved_dataset_follows_its_content(tmp_path: Path) -> None:
    digests = []
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[:1])):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
        digests.append(open_source(Source(path=str(tmp_path / name)), "x")[0].digest())
    assert digests[0] == digests[1] != digests[2]


def test_jsonl_numbers_are_lines_and_bad_lines_say_why(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('\ufeff{"text": "a"}\n\n{"text": \n{"text": "b"}\n', encoding="utf-8")
    rows = read(tmp_path / "r.jsonl")
    assert [number for number, _ in rows] == [1, 3, 4]
    assert isinstance(rows[1][1], BadRow)
    assert "not JSON" in rows[1][1].why


def test_csv_rows_with_other_cells_say_so(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b\n1,2\n1,2,3\n")
    assert read(tmp_path / "r.csv") == [
        (1, {"a": "1", "b": "2"}),
        (2, BadRow("3 cells where the header has 2")),
    ]


def test_long_cells_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(read(tmp_path / "r.csv")[0][1]["text"]) == 300_000


GARBAGE = random.Random(0).randbytes(3000)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("r.json", b"", "the file is empty"),
        ("r.json", b"  \n", "the file is empty"),
        ("r.csv", b"\n", "the file is empty"),
        ("r.json", b'[{"text": "a"},\n {"text": "\xff"}]', "line 2: byte 12 is not UTF-8"),
        ("r.jsonl", b'{"text": "a"}\n{"text": "\xc3"}\n', "line 2: byte 11 is not UTF-8"),
        ("r.csv", b"text\nabc\n\xe9t\xe9\n", "line 3: byte 1 is not UTF-8"),
        ("r.json", b"[1, 2", "not JSON"),
        ("r.json", b"hello there", "not JSON"),
        ("r.json", b"[" * 100_000, "not JSON"),
        ("r.json", b'"text"', "a JSON str, not a list"),
        ("r.json", b'{"text": "a"}', "one JSON object that holds no list of rows"),
        ("r.json", b'{"a": [{"t": 1}], "b": [{"t": 1}]}', r"holds 2 lists of rows \(a, b\)"),
        ("r.csv", b'a,b\n"1,2\n', "line 2: not CSV"),
        ("r.csv", b"same,same\n1,2\n", "names a column twice: 'same'"),
        ("r.txt", b"hello", "suffix that is not supported"),
        *((f"r{suffix}", GARBAGE, "not") for suffix in (".json", ".jsonl", ".csv", ".parquet", ".arrow")),
        ("r.parquet", b"PAR1" + GARBAGE + b"PAR1", "not a parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read(tmp_path / name)
    assert name in caught.value.what


def test_a_cut_parquet_file_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "r.parquet")
    content = (tmp_path / "r.parquet").read_bytes()
    for length in range(1, len(content), 97):
        (tmp_path / "r.parquet").write_bytes(content[:length])
        with pytest.raises(UserError, match="not a parquet file"):
            read(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/no/such/folder", "a b c", "owner/name/more"]
)
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(Source(path=path), "data.sources.0")


def test_a_hub_id_without_network_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"data\.sources\.2\.path: 'owner/name'") as caught:
        open_source(Source(path="owner/name"), "data.sources.2")
    assert "HF_ENDPOINT" in (caught.value.hint or "")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data file"):
        open_source(Source(path=str(tmp_path)), "data.sources.0")


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="not a folder saved by datasets"):
        read(tmp_path / "one")


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may read every file: be another user for a moment."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def locked_paths(open_folder: Path) -> Path:
    write_json(open_folder / "r.json")
    (open_folder / "r.json").chmod(0)
    (open_folder / "sub").mkdir(mode=0)
    return open_folder


@pytest.mark.parametrize("name", ["r.json", "sub", "sub/r.json"])
def test_what_may_not_be_read(locked_paths: Path, as_nobody: None, name: str) -> None:
    with pytest.raises(UserError, match="may not read it"):
        read(locked_paths / name)
