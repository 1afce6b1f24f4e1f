"""Which GGUF files are served for a model, and that each is made once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import RunFolder
from tunesmith.hub.made import models_dir
from tunesmith.hub.sources import resolve_model
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.gguf_files import GgufJob, adapter_job, make_gguf_files, model_job
from tunesmith.workflows.served_gguf import newest_gguf, served_gguf


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "orders", tiny, steps=(5,))


def export(run: RunFolder, quant: str, *, step: int, age: int = 0) -> Path:
    """A stand-in for an exported file: its content is llama.cpp's to read."""
    folder = run.path / "export" / "gguf" / quant
    folder.mkdir(parents=True)
    (folder / "export.json").write_text(json.dumps({"step": step}))
    file = folder / f"orders-{quant}.gguf"
    file.write_bytes(b"GGUF")
    os.utime(file, (1000 - age, 1000 - age))
    return file


def test_the_newest_file_of_a_folder(tmp_path: Path) -> None:
    assert newest_gguf(tmp_path) is None
    for age, name in enumerate(("new", "old")):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
        os.utime(tmp_path / f"{name}.gguf", (100 - age, 100 - age))
    assert newest_gguf(tmp_path) == tmp_path / "new.gguf"
    assert newest_gguf(tmp_path / "old.gguf") == tmp_path / "old.gguf"


def test_an_export_of_the_newest_checkpoint_is_taken(run: RunFolder) -> None:
    export(run, "q8_0", step=5, age=9)
    newest = export(run, "f32", step=5)
    export(run, "bf16", step=4, age=-9)
    found = served_gguf(EngineWants(path=str(run.path)))
    assert (found.weights, found.merged, dict(found.adapters)) == (newest, True, {})


def test_files_are_made_once_and_anew_after_a_change(
    run: RunFolder, tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(run, "f32", step=4)  # of another checkpoint
    wants = EngineWants(path=str(run.path), adapters={"more": str(run.checkpoint(5) / "adapter")})
    first = served_gguf(wants)
    assert "are not of the newest" not in capfd.readouterr().err  # adapters need the base anyway
    assert first.weights.read_bytes()[:4] == b"GGUF" and not first.merged
    assert list(first.adapters) == ["orders", "more"] and first.adapters["orders"] == first.adapters["more"]
    assert first.folders["orders"] == run.checkpoint(5) / "adapter"
    again = served_gguf(replace(wants, adapters={}))
    told = capfd.readouterr().err
    assert "are not of the newest" in told and "make GGUF files" not in told
    assert (again.weights, again.adapters["orders"]) == (first.weights, first.adapters["orders"])
    config = run.checkpoint(5) / "adapter" / "adapter_config.json"
    os.utime(config, (1, 1))
    changed = adapter_job(run.checkpoint(5) / "adapter", tiny)
    assert first.adapters["orders"].parent != models_dir() / changed.name
    plain = model_job(str(tiny), resolve_model(str(tiny)), None)
    assert plain.name != model_job(str(tiny), resolve_model(str(tiny)), "f32").name


def test_what_does_not_fit_is_refused(run: RunFolder, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "given.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.gguf").write_bytes(b"none")
    wants = EngineWants(path=str(tmp_path / "given.gguf"))
    for asked, words in (
        (replace(wants, precision="fp32"), "--precision fp32: .* is served as it is"),
        (replace(wants, merge=True), "--merge: .* is served as it is"),
        (replace(wants, path=str(tmp_path / "other.gguf")), "is no GGUF file"),
        (EngineWants(path=str(run.path), merge=True, adapters={"a": str(run.path)}), "no base for --adapter"),
        (EngineWants(path=str(tiny), adapters={"a": str(tmp_path / "nothing")}), "no such folder"),
        (EngineWants(path=str(tiny), adapters={"a": str(tmp_path / "other.gguf")}), "is no GGUF file"),
    ):
        with pytest.raises(UserError, match=words):
            served_gguf(asked)


def test_the_error_of_the_making_is_told_in_its_own_words(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--quant: 'q99' is not a format") as caught:
        make_gguf_files([GgufJob("as-gguf-test", str(tiny), quant="q99")])
    assert "take one of" in str(caught.value.hint)
    assert not (models_dir() / "as-gguf-test").exists()
