"""model.path as a local folder: taken when whole, refused by name when not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.core.errors import UserError
from tunesmith.hub.lock import differences, read_lock, verify_model, write_lock
from tunesmith.hub.sources import resolve_model


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def shard(folder: Path) -> None:
    """Rewrite model.safetensors as two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file(
            {name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"}
        )
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


def test_folder_and_its_hashes(model: Path) -> None:
    files = resolve_model(str(model))
    assert (files.folder, files.name, files.source, files.adapter) == (model, "model", "folder", None)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (model / name).read_bytes()
        assert files.files[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_sharded_folder(model: Path) -> None:
    shard(model)
    assert len([name for name in resolve_model(str(model)).files if name.endswith(".safetensors")]) == 2


def test_missing_shard_is_named(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"1 of 2 weight files are missing: model-00002-of-00002\.safetensors"
    ):
        resolve_model(str(model))


def test_shard_outside_the_folder_is_refused(model: Path) -> None:
    shard(model)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/model.safetensors"}}))
    with pytest.raises(UserError, match="not a safetensors file beside it"):
        resolve_model(str(model))


def test_pickled_weights_are_refused_with_the_conversion(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickles") as caught:
        resolve_model(str(model))
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "config.json is missing"), ("model.safetensors", "no weights")],
)
def test_missing_file_is_named(model: Path, name: str, message: str) -> None:
    (model / name).unlink()
    with pytest.raises(UserError, match=message):
        resolve_model(str(model))


def test_cut_weights_are_found_before_loading(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: the file is damaged"):
        resolve_model(str(model))


def test_config_that_is_no_json(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a JSON file"):
        resolve_model(str(model))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", "no such file or folder"),
        ("./nothing.gguf", "no such file or folder"),
        ("smollm2-135m-instruckt", "did you mean 'smollm2-135m-instruct'"),
        ("a b/c", "is no file, folder, hub id"),
    ],
)
def test_what_is_not_there(path: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_model(path)
    assert message in str(caught.value)


def test_single_file_that_is_no_gguf(model: Path) -> None:
    with pytest.raises(UserError, match="a single file, but no GGUF file"):
        resolve_model(str(model / "model.safetensors"))


def test_lock_round_trip_and_every_difference(model: Path, tmp_path: Path) -> None:
    lock_file = tmp_path / "lock.json"
    write_lock(lock_file, resolve_model(str(model)), {"rows.jsonl": {"bytes": 1, "sha256": "0" * 64}})
    lock = read_lock(lock_file)
    assert lock["model"]["origin"] == str(model)
    assert {"tunesmith", "python", "torch", "transformers", "peft"} <= lock["versions"].keys()
    assert verify_model(lock, resolve_model(str(model))) == []
    (model / "generation_config.json").unlink()
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    (model / "new.json").write_text("{}")
    faults = "\n".join(verify_model(lock, resolve_model(str(model))))
    assert "generation_config.json: missing" in faults
    assert "new.json: not in the lock" in faults
    assert "config.json: sha256" in faults


def test_same_size_other_content_is_a_difference() -> None:
    was = {"a": {"bytes": 3, "sha256": "1" * 64}}
    now = {"a": {"bytes": 3, "sha256": "2" * 64}}
    assert differences(was, now) == ["a: sha256 111111111111… -> 222222222222…"]


def test_lock_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{}")
    with pytest.raises(UserError, match="names no model"):
        read_lock(tmp_path / "lock.json")
