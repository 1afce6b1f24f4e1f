"""model.path as a run folder or an adapter folder: the base is found, the newest adapter is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.hub.sources import resolve_model, run_base


def test_run_gives_base_and_newest_adapter(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one", tiny)
    files = resolve_model(str(run.path))
    assert files.folder == tiny
    assert files.adapter == run.checkpoint(10) / "adapter"
    assert files.tokenizer == run.path / "tokenizer"
    assert files.name == "one"


def test_damaged_newest_checkpoint_is_passed_over(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny)
    weights = run.checkpoint(10) / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert resolve_model(str(run.path)).adapter == run.checkpoint(5) / "adapter"


def test_run_without_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny, steps=())
    run.checkpoints.mkdir()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        resolve_model(str(run.path))


def test_full_run_gives_its_own_weights(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny, full=True)
    files = resolve_model(str(run.path))
    assert (files.folder, files.adapter) == (run.checkpoint(10) / "model", None)
    assert run_base(run).folder == tiny


def test_run_over_a_run_stacks_adapters(tiny: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", tiny)
    second = make_run(tmp_path / "second", first.path)
    files = resolve_model(str(second.path))
    assert files.folder == tiny
    assert files.base_adapters == (first.checkpoint(10) / "adapter",)
    assert files.adapter == second.checkpoint(10) / "adapter"


def test_base_that_is_gone_is_named(tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    run = make_run(tmp_path / "one", base)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=f"the base model of the run: {base}: there is no such"):
        resolve_model(str(run.path))


def test_adapter_folder_finds_its_base(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny)
    adapter = run.checkpoint(5) / "adapter"
    files = resolve_model(str(adapter))
    assert (files.folder, files.adapter, files.tokenizer) == (tiny, adapter, tiny)


@pytest.mark.parametrize(
    ("base", "message"),
    [(None, "names no base model"), ("/gone/model", "base model cannot be found: /gone/model")],
)
def test_adapter_whose_base_cannot_be_found(
    tiny: Path, tmp_path: Path, base: str | None, message: str
) -> None:
    run = make_run(tmp_path / "one", tiny)
    adapter = Path(shutil.copytree(run.checkpoint(5) / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(adapter))
    assert "--adapter" in str(caught.value.hint)


def test_runs_that_name_each_other(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny)
    lock = json.loads(run.lock.read_text())
    lock["model"]["origin"] = str(run.path)
    run.lock.write_text(json.dumps(lock))
    with pytest.raises(UserError, match="in a circle"):
        resolve_model(str(run.path))
