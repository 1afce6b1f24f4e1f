"""Data, model, run and exports in an object store: a real S3 server, and processes that are killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import Training, write_recipe
from tests.object_store import ObjectStore, serve_objects, use
from tunesmith.core.errors import UserError
from tunesmith.core.store import PARTIAL, Store, get_folder, put_folder
from tunesmith.core.store_cache import stored_steps
from tunesmith.train.metrics import loss_curve
from tunesmith.workflows.evaluate import evaluate_model
from tunesmith.workflows.serve_settings import ServeOptions, deployment
from tunesmith.workflows.store import OWNER
from tunesmith.workflows.train import train_recipe

STEPS = {"max_steps": 12, "save_every": 2, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with serve_objects(tmp_path_factory.mktemp("moto")) as found:
        yield found


@pytest.fixture
def url(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    use(server, monkeypatch)
    return server.url(tmp_path.name)


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """One that shares nothing with the first but the store."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / name))


def recipe_in(folder: Path, base: str | Path, output: str | Path, **sections: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, base, output_dir=str(output), **{"train": STEPS} | sections)


def test_data_model_and_run_in_the_store(
    url: str, tmp_path: Path, trainee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same curve as from this disk; another machine finds the run finished, with all that belongs to it."""
    never = train_recipe(recipe_in(tmp_path / "local", trainee, tmp_path / "runs"), [])
    put_folder(trainee, f"{url}/model")
    Store(url).put(tmp_path / "local" / "rows.jsonl", "rows/rows.jsonl")
    sources = {"sources": [{"path": f"{url}/rows"}]}
    recipe = recipe_in(tmp_path / "store", f"{url}/model", f"{url}/runs", data=sources)
    result = train_recipe(recipe, [])
    assert loss_curve(result.run.events) == loss_curve(never.run.events)
    run = Store(f"{url}/runs/run")
    found = run.list()
    assert stored_steps(found) == ["step-000010", "step-000012"]
    assert {
        "recipe.yaml",
        "resolved.yaml",
        "lock.json",
        "plan.json",
        "report.md",
        "events.jsonl",
    } <= found.keys()
    lock = json.loads(run.read("lock.json") or b"")
    assert lock["model"]["origin"] == f"{url}/model"
    assert list(lock["data"]) == [f"sources.0/{url}/rows/rows.jsonl"]
    on_another_machine(monkeypatch, tmp_path, "other")
    again = train_recipe(recipe, [])
    assert again.already_finished and again.final_loss == result.final_loss and again.run != result.run
    assert [path.name for path in again.run.complete_checkpoints()] == ["step-000012"]


def test_sigkill_in_an_upload_and_resume_elsewhere(
    url: str, tmp_path: Path, trainee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half checkpoint for a reader, and the curve on the other machine is the one of a run never killed."""
    steps = {"train": STEPS | {"max_steps": 120, "save_every": 1}}
    never = train_recipe(recipe_in(tmp_path / "never", trainee, tmp_path / "runs", **steps), [])
    recipe = recipe_in(tmp_path / "killed", trainee, f"{url}/runs", **steps)
    run = Store(f"{url}/runs/run")
    training = Training(recipe)
    training.wait_for(lambda: is_uploading(run))
    training.kill()
    left = run.list()
    for name in stored_steps(run.list()):
        get_folder(f"{run.url}/checkpoints/{name}", tmp_path / "seen" / name)
    assert "report.md" not in left, "the run had ended"
    on_another_machine(monkeypatch, tmp_path, "other")
    result = train_recipe(recipe, [])
    assert loss_curve(result.run.events) == loss_curve(never.run.events)
    assert stored_steps(run.list()) == ["step-000119", "step-000120"]
    assert not [name for name in run.list() if name.endswith(PARTIAL)]


def is_uploading(run: Store) -> bool:
    """Between the first and the last object of a checkpoint, while an earlier one is whole."""
    found = run.list()
    return any(name.endswith(PARTIAL) for name in found) and bool(stored_steps(found))


def test_a_run_that_was_taken_over_stops(
    url: str, tmp_path: Path, trainee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines never write into one run."""
    recipe = recipe_in(tmp_path / "first", trainee, f"{url}/runs", train=STEPS | {"max_steps": 5000})
    run = Store(f"{url}/runs/run")
    training = Training(recipe)
    training.wait_for(lambda: bool(stored_steps(run.list())))
    run.write(OWNER, json.dumps({"id": "x", "host": "node7"}).encode())
    code, _, errors = training.end()
    assert code == 4 and "node7 has taken this run over" in errors, errors


def test_fresh_moves_the_run_in_the_store_aside(
    url: str, tmp_path: Path, trainee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path / "a", trainee, f"{url}/runs", train=STEPS | {"max_steps": 2})
    first = loss_curve(train_recipe(recipe, []).run.events)
    on_another_machine(monkeypatch, tmp_path, "other")
    again = train_recipe(recipe, ["train.seed=5"], fresh=True)
    assert loss_curve(again.run.events) != first
    old, new = Store(f"{url}/runs/run.1").list(), Store(f"{url}/runs/run").list()
    assert stored_steps(old) == stored_steps(new) == ["step-000000", "step-000002"]
    get_folder(f"{url}/runs/run.1/checkpoints/step-000002", tmp_path / "old")
    assert old["events.jsonl"].mark != new["events.jsonl"].mark


def test_secrets_stay_here(url: str, tmp_path: Path, trainee: Path) -> None:
    recipe = recipe_in(
        tmp_path / "a",
        trainee,
        f"{url}/runs",
        train=STEPS | {"max_steps": 1},
        serve={"api_key": "top-secret-key"},
    )
    train_recipe(recipe, [])
    run = Store(f"{url}/runs/run")
    assert not [name for name in run.list() if b"top-secret-key" in (run.read(name) or b"")]


def test_a_bucket_that_is_missing_is_told_before_the_training(
    url: str, tmp_path: Path, trainee: Path, cli: Cli
) -> None:
    recipe = recipe_in(tmp_path / "a", trainee, "s3://no-such-bucket/runs")
    done = cli("train", recipe)
    assert done.returncode == 2 and "there is no such bucket" in done.stderr, done.stderr
    recipe = recipe_in(tmp_path / "a", f"{url}/none", tmp_path / "runs")
    with pytest.raises(UserError, match="there is nothing at this URL"):
        train_recipe(recipe, [])


def test_a_run_by_its_url_is_exported_evaluated_and_served(
    url: str, tmp_path: Path, trainee: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """On a machine that did not train it."""
    put_folder(trainee, f"{url}/model")
    recipe = recipe_in(tmp_path / "a", f"{url}/model", f"{url}/runs", train=STEPS | {"max_steps": 4})
    trained = train_recipe(recipe, []).run
    on_another_machine(monkeypatch, tmp_path, "other")
    run = f"{url}/runs/run"
    done = cli.json("export", run, "--to", "adapter", "--checkpoint", "2", "--output", f"{url}/tuned")
    assert done["folder"] == f"{url}/tuned" and done["step"] == 2
    get_folder(f"{url}/tuned", tmp_path / "tuned")
    name = "adapter_model.safetensors"
    saved = trained.checkpoint(2) / "adapter" / name
    assert (tmp_path / "tuned" / name).read_bytes() == saved.read_bytes()
    assert not list((tmp_path / "other" / "exports").rglob("*.safetensors")), "the draft was left behind"
    rows = tmp_path / "a" / "rows.jsonl"
    near = evaluate_model(str(trained.path), data=rows, exact_match=False, max_rows=4)
    far = evaluate_model(run, data=rows, exact_match=False, max_rows=4)
    assert far.loss == near.loss
    served = deployment(run, ServeOptions())
    assert Path(served.path).name == "run" and Path(served.path).is_relative_to(tmp_path / "other")
    refused = cli("export", run, "--to", "adapter", "--output", f"{url}/runs")
    assert refused.returncode == 2 and "holds other files" in refused.stderr
