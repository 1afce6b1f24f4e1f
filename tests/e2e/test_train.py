"""Training from the recipe to the finished run: what is refused, what stops, what is told."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import warm
from tests.conftest import Cli
from tests.e2e.train_helpers import Training, cut_back, write_recipe, write_rows
from tunesmith.core.errors import RunFailed, UserError
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import MANIFEST, RunFolder
from tunesmith.train.metrics import loss_curve
from tunesmith.workflows.plan_recipe import plan_recipe
from tunesmith.workflows.train import train_recipe

SHORT = {"max_steps": 4, "save_every": 2, "keep_checkpoints": 10}


@pytest.fixture(scope="module")
def finished(trainee: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of SHORT, and a copy of its folder as the finished run left it."""
    folder = tmp_path_factory.mktemp("finished") / "short"
    folder.mkdir()
    recipe = write_recipe(folder, trainee, train=SHORT)
    with pytest.MonkeyPatch.context() as settings:
        settings.setenv("TUNESMITH_CACHE", str(folder.with_name("cache")))
        train_recipe(recipe, [])
    shutil.copytree(folder, folder.with_name("kept"))
    return recipe


@pytest.fixture
def short(finished: Path) -> Path:
    """The recipe of SHORT, its run just finished; it may be changed."""
    shutil.rmtree(finished.parent)
    shutil.copytree(finished.parent.with_name("kept"), finished.parent)
    return finished


def run_of(recipe: Path) -> RunFolder:
    return RunFolder(recipe.parent / "runs" / "run")


def test_the_whole_way_and_its_files(tmp_path: Path, trainee: Path, cli: Cli) -> None:
    samples = {"prompts": ["Add 1 and 2."], "max_new_tokens": 4}
    recipe = write_recipe(tmp_path, trainee, train=SHORT, samples=samples)
    plan = cli.json("train", recipe, "--dry-run")
    run = RunFolder(tmp_path / "runs" / "run")
    assert plan["work"]["steps"] == 4 and not run.path.exists()  # type: ignore[index]
    found = cli.json("train", recipe, env=warm.COLD)
    assert found["steps"] == 4 and found["run"] == str(run.path) and found["resumed"] is False
    assert found["tokens"] == plan["work"]["tokens"]  # type: ignore[index]
    assert found["eval_loss"] < found["eval_loss_before"]  # type: ignore[operator]
    assert run.recipe.read_text() == recipe.read_text() and '"auto"' not in run.resolved.read_text()
    kinds = [event["event"] for event in read_events(run.events)]
    assert kinds[:3] == ["start", "data", "plan"] and kinds[-1] == "end"
    assert {"step", "eval", "sample", "checkpoint"} <= set(kinds)
    assert [path.name for path in run.complete_checkpoints()] == [f"step-00000{n}" for n in (0, 2, 4)]
    assert "| optimizer steps | 4 | 4 |" in run.report.read_text()
    assert (run.path / "tokenizer" / "chat_template.jinja").is_file()
    again = cli.json("train", recipe)
    assert again["already_finished"] is True and again["final_loss"] == found["final_loss"]


@pytest.mark.parametrize(
    ("settings", "changed"),
    [({"lr": 1e-3}, "train.lr: 0.005 -> 0.001"), ({"seed": 1}, "train.seed: 0 -> 1")],
)
def test_a_changed_recipe_is_refused_with_the_difference(
    short: Path, settings: dict[str, Any], changed: str
) -> None:
    if "seed" in settings:  # the one finished, the other not
        cut_back(run_of(short), to_step=2)
    overrides = [f"train.{key}={value}" for key, value in settings.items()]
    with pytest.raises(UserError) as refused:
        train_recipe(short, overrides)
    assert changed in refused.value.what and refused.value.exit_code == 2
    assert "--fresh" in (refused.value.hint or "")


def test_what_does_not_change_the_training_may_change(short: Path) -> None:
    first = train_recipe(short, [])
    assert first.already_finished
    cut_back(first.run, to_step=2)
    free = ["serve.port=1", "train.keep_checkpoints=1", "train.log_every=1", "samples.max_new_tokens=3"]
    second = train_recipe(short, free)
    assert second.resumed and second.final_loss == first.final_loss
    assert [path.name for path in second.run.complete_checkpoints()] == ["step-000004"]


def test_a_run_killed_before_the_last_removal_ends_with_no_checkpoint_too_many(short: Path) -> None:
    run = run_of(short)
    assert len(run.saved_checkpoints()) == 3
    cut_back(run, to_step=4)
    train_recipe(short, ["train.keep_checkpoints=2"])
    assert [path.name for path in run.saved_checkpoints()] == ["step-000002", "step-000004"]


def test_fresh_moves_the_old_run_aside(short: Path) -> None:
    first = train_recipe(short, [])
    assert first.already_finished
    second = train_recipe(short, ["train.seed=5"], fresh=True)
    third = train_recipe(short, [], fresh=True)
    assert (short.parent / "runs" / "run.1" / "report.md").is_file()
    assert (short.parent / "runs" / "run.2" / "report.md").is_file()
    assert first.final_loss == third.final_loss != second.final_loss


@pytest.mark.parametrize("what", ["data", "model"])
def test_changed_inputs_are_refused(tmp_path: Path, trainee: Path, what: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in trainee.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    recipe = write_recipe(tmp_path, model, train=SHORT)
    cut_back(train_recipe(recipe, []).run, to_step=2)
    if what == "data":
        write_rows(tmp_path / "rows.jsonl", seed=1)
    else:
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * 2
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{what}: .*(rows.jsonl|model.safetensors): sha256"):
        train_recipe(recipe, [])


def test_a_run_is_planned_once(short: Path) -> None:
    """What was predicted when it began holds as long as machine and recipe are the same."""
    run = run_of(short)
    began = list(read_events(run.events, "plan"))[-1]
    cut_back(run, to_step=2)
    assert train_recipe(short, []).resumed
    again = list(read_events(run.events, "plan"))[-1]
    assert again["time"] > began["time"] and again["verdict"] == began["verdict"]
    for key in ("memory", "duration", "notes"):  # a probe never takes the same time twice
        assert again[key] == began[key] and began[key] is not None
    cut_back(run, to_step=2)
    planned = json.loads(run.plan.read_text())
    planned["machine"]["capacity_bytes"] += 1
    run.plan.write_text(json.dumps(planned))
    assert train_recipe(short, []).resumed
    elsewhere = list(read_events(run.events, "plan"))[-1]
    assert elsewhere["memory"] == began["memory"] and elsewhere["duration"] != began["duration"]


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a bit flipped": lambda path: path.write_bytes(
        (raw := path.read_bytes())[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:]
    ),
    "a file missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(short: Path, damage: str) -> None:
    run = run_of(short)
    curve = loss_curve(run.events)
    cut_back(run, to_step=4)
    newest = run.checkpoint(4)
    if damage == "no manifest":
        (newest / MANIFEST).unlink()
    else:
        DAMAGES[damage](newest / "adapter" / "adapter_model.safetensors")
    assert run.latest_checkpoint() == run.checkpoint(2)
    assert train_recipe(short, []).resumed
    assert loss_curve(run.events) == curve
    assert run.latest_checkpoint() == newest
    assert [event["step"] for event in read_events(run.events, "resume")] == [2]


def test_two_processes_do_not_train_the_same_run(tmp_path: Path, trainee: Path) -> None:
    recipe = write_recipe(tmp_path, trainee)
    training = Training(recipe)
    try:
        training.wait_for(lambda: training.new_events("step") > 0)
        with pytest.raises(UserError, match="another process is training this run"):
            train_recipe(recipe, [])
    finally:
        training.kill()


def poisoned(trainee: Path, folder: Path) -> Path:
    """The trainee model with one weight that is not a number."""
    folder.mkdir()
    for path in trainee.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path: Path, trainee: Path) -> None:
    recipe = write_recipe(tmp_path, poisoned(trainee, tmp_path / "model"), train=SHORT)
    with pytest.raises(RunFailed) as stopped:
        train_recipe(recipe, [])
    assert "step 1: the loss is nan; its rows, the worst first: row " in stopped.value.what
    assert stopped.value.exit_code == 4 and "train.lr" in (stopped.value.hint or "")
    warning = next(read_events(tmp_path / "runs" / "run" / "events.jsonl", "warning"))
    assert warning["step"] == 1 and len(warning["rows"]) == 4


def test_an_absurd_learning_rate_leaves_the_last_good_checkpoint(tmp_path: Path, trainee: Path) -> None:
    train = {"max_steps": 20, "lr": 1e30, "save_every": 1, "keep_checkpoints": 50, "max_grad_norm": None}
    recipe = write_recipe(tmp_path, trainee, train=train, method={"type": "full"})
    with pytest.raises(RunFailed, match=r"is (nan|inf)"):
        train_recipe(recipe, [])
    last = RunFolder(tmp_path / "runs" / "run").latest_checkpoint()
    assert last is not None
    weights = load_file(last / "model" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_failing_disk_keeps_the_last_good_checkpoint(short: Path) -> None:
    """The operating system refuses to write beyond a limit, in the middle of a checkpoint's file."""
    run = run_of(short)
    curve = loss_curve(run.events)
    cut_back(run, to_step=2)
    largest = max(path.stat().st_size for path in run.checkpoint(2).rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, hard))
    try:
        with pytest.raises(RunFailed) as failed:
            train_recipe(short, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free space" in (failed.value.hint or "")
    assert run.latest_checkpoint() == run.checkpoint(2)
    assert not list(run.checkpoints.glob(".*"))
    train_recipe(short, [])
    assert loss_curve(run.events) == curve


@pytest.mark.parametrize(
    ("method", "precision"),
    [("full", "fp32"), ("full", "bf16"), ("full", "bf16-pure"), ("full", "fp16"), ("lora", "bf16-pure")]
    + [pytest.param("lora", precision, marks=pytest.mark.whole) for precision in ("fp32", "bf16", "fp16")],
)
def test_every_precision_learns_and_resumes_exactly(
    tmp_path: Path, trainee: Path, method: str, precision: str
) -> None:
    train = {"max_steps": 4, "precision": precision, "save_every": 2, "keep_checkpoints": 10}
    recipe = write_recipe(tmp_path, trainee, train=train, method={"type": method, "dropout": 0.0})
    write_rows(tmp_path / "rows.jsonl", longest=5)  # a CPU multiplies fp16 slowly
    first = train_recipe(recipe, [])
    curve = loss_curve(first.run.events)
    assert first.eval_loss_before - first.eval_loss > 0.1, (first.eval_loss_before, first.eval_loss)
    cut_back(first.run, to_step=2)
    second = train_recipe(recipe, [])
    assert second.resumed and loss_curve(first.run.events) == curve
    stored = load_file(
        first.run.checkpoint(4)
        / ("adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors")
    )
    wanted = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    assert {value.dtype for value in stored.values()} == {wanted}


def test_gradient_checkpointing_and_packing_in_the_whole(tmp_path: Path, trainee: Path) -> None:
    recipe = write_recipe(tmp_path, trainee, train=SHORT, method={"dropout": 0.1})
    plain = train_recipe(recipe, ["name=plain"])
    saved = train_recipe(recipe, ["name=saved", "train.gradient_checkpointing=true"])
    assert loss_curve(saved.run.events) == pytest.approx(loss_curve(plain.run.events), abs=1e-5)
    packed = train_recipe(recipe, ["name=packed", "data.packing=true", "data.max_length=512"])
    assert packed.tokens / packed.steps > plain.tokens / plain.steps


def test_tensorboard_on_request(tmp_path: Path, trainee: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train_recipe(write_recipe(tmp_path, trainee, train=SHORT | {"tensorboard": True}), [])
    board = EventAccumulator(str(result.run.path / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert board.Scalars("train/loss")[-1].value == pytest.approx(result.final_loss, rel=1e-6)


def test_a_plan_needs_no_run_folder(tmp_path: Path, trainee: Path) -> None:
    found = plan_recipe(write_recipe(tmp_path, trainee, train=SHORT), []).as_dict()
    assert found["work"]["steps"] == 4 and found["data"]["totals"]["kept"] > 0
    assert not (tmp_path / "runs" / "run").exists()
