"""Which files of a repository are wanted."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import UserError
from tunesmith.hub.selection import Selection, select

MODEL = [
    ".gitattributes", "LICENSE", "README.md", "config.json", "consolidated.safetensors", "flax_model.msgpack",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    "onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "tf_model.h5", "tokenizer.json", "model.gguf",
]  # fmt: skip
BESIDE = {"LICENSE", "README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_weights_in_one_format_only() -> None:
    assert set(select("m", "model", MODEL, Selection())) == BESIDE | SHARDS


def test_pickles_only_when_asked_and_when_there_is_nothing_better() -> None:
    asked = Selection(allow_pickle=True)
    assert set(select("m", "model", MODEL, asked)) == BESIDE | SHARDS
    old = [path for path in MODEL if path not in SHARDS and path != "model.gguf"]
    with pytest.raises(UserError, match=r"pickles only \(pytorch_model\.bin\)"):
        select("m", "model", old, Selection())
    assert "pytorch_model.bin" in select("m", "model", old, asked)


def test_allow_and_deny() -> None:
    assert select("m", "model", MODEL, Selection(allow=("onnx/",))) == ["onnx/model.onnx", "onnx/config.json"]
    assert select("m", "model", MODEL, Selection(allow=("*.json",), deny=("onnx/*", "tok*"))) == [
        "config.json", "model.safetensors.index.json",
    ]  # fmt: skip
    assert set(select("m", "model", MODEL, Selection(deny=("*.safetensors",)))) == BESIDE


def test_allow_alone_does_not_open_the_door_to_pickles() -> None:
    assert select("m", "model", MODEL, Selection(allow=("*.bin", "*.md"))) == ["README.md"]
    with pytest.raises(UserError, match="pickles only"):
        select("m", "model", MODEL, Selection(allow=("*.bin",)))
    assert select("m", "model", MODEL, Selection(allow=("*.bin",), allow_pickle=True)) == [
        "pytorch_model.bin"
    ]


def test_nothing_matches() -> None:
    with pytest.raises(UserError, match=r"none of its 15 files matches \*\.zip"):
        select("m", "model", MODEL, Selection(allow=("*.zip",)))


def test_data_sets_keep_all_but_pickles() -> None:
    paths = ["README.md", "data/train.parquet", "a/b/c.jsonl", "cache.PKL", "x.pt"]
    assert select("d", "dataset", paths, Selection()) == paths[:3]
    with pytest.raises(UserError, match="pickles only"):
        select("d", "dataset", paths[3:], Selection())


def test_key_is_the_same_for_the_same_wish() -> None:
    assert (
        Selection(allow=("a", "b")).key == Selection(allow=("b", "a")).key != Selection(deny=("a", "b")).key
    )
