"""Real trouble: too little memory, a disk that fills up, a row that breaks the loss."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from tests import warm
from tests.conftest import ROOT
from tests.e2e.train_helpers import cut_back, write_recipe
from tests.reference.conftest import make_documents, make_model, one_batch, trainer_in
from tests.small_disk import mounted
from tunesmith.core.errors import RunFailed
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import RunFolder
from tunesmith.model.batch import Batch, join
from tunesmith.train import faults
from tunesmith.train.checkpoint import SaveFailed
from tunesmith.train.metrics import loss_curve
from tunesmith.workflows.train import train_recipe

# -- memory ------------------------------------------------------------------------------------------------


def long_rows(path: Path, count: int = 40, answer: int = 20) -> Path:
    """Long questions and answers of so many characters."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        question = " ".join(str(draw.randint(0, 9)) for _ in range(draw.randint(380, 420)))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": question[:answer]},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def big_batches(
    folder: Path, tiny: Path, *, held_out: float = 0.0, answer: int = 20, **sections: dict[str, Any]
) -> Path:
    folder.mkdir()
    steps = {"max_steps": 10, "micro_batch_size": 8, "grad_accumulation": 1, "save_every": 1}
    source = {"path": str(long_rows(folder / "long.jsonl", answer=answer))}
    train = steps | {"keep_checkpoints": 100, "lr": 1e-3} | sections.pop("train", {})
    return write_recipe(
        folder,
        tiny,
        data={"sources": [source], "max_length": 1024, "eval_fraction": held_out},
        method={"type": "full"},
        train=train,
        **sections,
    )


def train_with(when: str, recipe: Path) -> tuple[int, str, RunFolder]:
    command = [sys.executable, "-m", "tests.e2e.little_memory", when, str(recipe)]
    pipe = subprocess.PIPE
    process = warm.popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors, RunFolder(recipe.parent / "runs" / "run")


# Logits of a hundred tokens of each row: a row alone needs a quarter of what all of them need together.
@pytest.fixture(scope="module")
def enough(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that has memory enough."""
    folder = tmp_path_factory.mktemp("enough")
    with pytest.MonkeyPatch.context() as settings:
        settings.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        return train_recipe(big_batches(folder / "plain", tiny, answer=100), []).run


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", pytest.param("longest", marks=pytest.mark.whole)])
def test_out_of_memory_cuts_the_micro_batches_and_nothing_else(
    tmp_path: Path, tiny: Path, enough: RunFolder, when: str
) -> None:
    code, errors, run = train_with(when, recipe := big_batches(tmp_path / "squeezed", tiny, answer=100))
    assert code == 0, errors
    events = list(read_events(run.events, "out_of_memory"))
    assert events and events[0]["max_tokens"] < events[0]["tokens"], errors
    assert "the same rows are taken again" in errors
    curve = loss_curve(run.events)
    assert curve == pytest.approx(loss_curve(enough.events), abs=1e-5) and len(curve) == 10
    tokens = [[event["tokens"] for event in read_events(r.events, "step")] for r in (enough, run)]
    assert tokens[0] == tokens[1]
    # From before the trouble and from after it, with all memory: cut where it was cut, so the same bits.
    at = events[0]["step"]
    for step in sorted({at, max(at - 3, 0)}, reverse=True):
        cut_back(run, to_step=step)
        assert train_recipe(recipe, []).resumed
        assert loss_curve(run.events) == curve
    assert "cut" in run.report.read_text()


def warnings_of(run: RunFolder) -> list[tuple[int, str]]:
    return [(event["step"], event["what"]) for event in read_events(run.events, "warning") if "step" in event]


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


@pytest.mark.slow
def test_an_evaluation_without_memory_is_cut_and_gives_the_same(tmp_path: Path, tiny: Path) -> None:
    evaluations = {"held_out": 0.4, "eval": {"every": 1}, "train": {"max_steps": 12, "save_every": 100}}
    plain = train_recipe(big_batches(tmp_path / "plain", tiny, **evaluations), []).run  # type: ignore[arg-type]
    code, errors, run = train_with("eval", big_batches(tmp_path / "cut", tiny, **evaluations))  # type: ignore[arg-type]
    assert code == 0, errors
    warned = [what for _, what in warnings_of(run)]
    assert warned and all("memory ran out in the evaluation" in what for what in warned), errors
    losses = [[event["loss"] for event in read_events(r.events, "eval")] for r in (plain, run)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[1]) == 13
    assert loss_curve(run.events) == loss_curve(plain.events)
    assert "memory ran out in the evaluation" in run.report.read_text()


@pytest.mark.slow
def test_samples_without_memory_are_left_out_and_named(tmp_path: Path, tiny: Path) -> None:
    samples = {"every": 2, "prompts": ["Say something. " * 40], "max_new_tokens": 4}
    steps = {"max_steps": 4, "save_every": 100}
    recipes = [big_batches(tmp_path / name, tiny, samples=samples, train=steps) for name in ("plain", "cut")]
    plain = train_recipe(recipes[0], []).run
    code, errors, run = train_with("samples", recipes[1])
    assert code == 0, errors
    assert [step for step, _ in warnings_of(run)] == [2, 4]
    assert all(
        "samples.max_new_tokens" in what and "training goes on" in what for _, what in warnings_of(run)
    )
    assert [event["step"] for event in read_events(run.events, "sample")] == [0]
    assert len(list(read_events(plain.events, "sample"))) == 3
    assert loss_curve(run.events) == loss_curve(plain.events)


@pytest.mark.slow
def test_an_update_without_memory_ends_the_run_with_the_last_checkpoint_good(
    tmp_path: Path, tiny: Path
) -> None:
    states = {"optimizer": "adamw-8bit", "max_steps": 6}
    recipes = [big_batches(tmp_path / name, tiny, train=states) for name in ("plain", "cut")]
    plain = train_recipe(recipes[0], []).run
    code, errors, run = train_with("update", recipes[1])
    assert code == 4 and "Traceback" not in errors, errors
    assert "error: step 4: memory ran out in the optimizer's update: " in errors
    assert f"the last good checkpoint is {run.checkpoint(3)}" in errors
    assert "hint: free memory, and the same command goes on from there" in errors
    assert run.latest_checkpoint() == run.checkpoint(3), "half updated weights were saved"
    assert [event["status"] for event in read_events(run.events, "end")] == ["failed"]
    assert train_recipe(recipes[1], []).resumed
    assert loss_curve(run.events) == loss_curve(plain.events)
    found, wanted = (weights_of(r.checkpoint(6)) for r in (run, plain))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_save_without_memory_is_left_out_and_training_goes_on(tmp_path: Path, tiny: Path) -> None:
    saves = {"max_steps": 6, "keep_checkpoints": 2}
    recipes = [big_batches(tmp_path / name, tiny, train=saves) for name in ("plain", "cut")]
    plain = train_recipe(recipes[0], []).run
    code, errors, run = train_with("save", recipes[1])
    assert code == 0, errors
    assert [step for step, _ in warnings_of(run)] == [3, 4]
    for _, what in warnings_of(run):
        assert "memory ran out while the checkpoint was written" in what
        assert f"training goes on, and the last good one is {run.checkpoint(2)}" in what
    assert [event["step"] for event in read_events(run.events, "checkpoint")] == [0, 1, 2, 5, 6]
    assert not list(run.checkpoints.glob(".*"))
    assert loss_curve(run.events) == loss_curve(plain.events)


class Room:
    """A memory that holds micro-batches of so many tokens: for more, the allocator is asked for an exabyte."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.tokens, self.from_call, self.calls = tokens, 0, 0
        model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.calls += 1
        if args[0].numel() > self.tokens and self.calls > self.from_call:
            torch.empty(2**60)


def two_micro_batches(step: int) -> list[Batch]:
    documents = [d for d in make_documents(40, seed=step) if 20 <= len(d[0]) <= 60][:12]
    return [join(documents[at : at + 6], tuple(range(at, at + 6))) for at in (0, 6)]


def test_memory_that_runs_out_in_a_later_step_changes_the_split_and_no_more(tmp_path: Path) -> None:
    plain = trainer_in(tmp_path / "plain", make_model("qwen3"), two_micro_batches, steps=6)
    plain.run()
    model = make_model("qwen3")
    room = Room(model, tokens=130)
    room.from_call = 1 + 2 * 3 + 1  # the try, three steps, and the first half of the fourth
    trainer = trainer_in(tmp_path / "cut", model, two_micro_batches, steps=6)
    trainer.run()
    events = trainer.task.run.events
    assert {event["step"] for event in read_events(events, "out_of_memory")} == {4}
    assert trainer.state.max_tokens is not None and trainer.state.max_tokens <= 130
    curves = loss_curve(plain.task.run.events), loss_curve(events)
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert [curves[1][n] == curves[0][n] for n in (1, 2, 3)] == [True] * 3
    pairs = zip(plain.engine.model.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_a_document_that_memory_never_holds_is_named(tmp_path: Path) -> None:
    model = make_model("qwen3")
    Room(model, tokens=30)
    trainer = trainer_in(tmp_path, model, two_micro_batches, steps=2)
    with pytest.raises(
        RunFailed, match=r"step 1: a micro-batch of \d+ tokens \(row \d\) does not fit"
    ) as stopped:
        trainer.run()
    assert stopped.value.exit_code == 4 and "a smaller data.max_length" in (stopped.value.hint or "")
    events = trainer.task.run.events
    assert [event["status"] for event in read_events(events, "end")] == ["failed"]
    assert list(read_events(events, "out_of_memory"))


def test_a_held_out_document_that_memory_never_holds_is_named(tmp_path: Path) -> None:
    model = make_model("qwen3")
    trainer = trainer_in(tmp_path, model, two_micro_batches, steps=2)
    object.__setattr__(trainer.task, "eval_batches", two_micro_batches(9))
    Room(model, tokens=1).from_call = 1  # the try of the longest batch
    with pytest.raises(RunFailed, match=r"the evaluation: \d+ tokens \(row \d\) do not fit") as stopped:
        trainer.run()
    assert stopped.value.exit_code == 4 and "eval.max_rows" in (stopped.value.hint or "")


# -- disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 32 MiB."""
    with mounted(tmp_path / "disk", mib=32) as folder:
        yield folder


def batches_of(step: int) -> list[Batch]:
    return [one_batch(make_documents(4, seed=step % 5))]


class Disk:
    """Fills the disk when `full_from` begins, and frees it when `free_from` does."""

    def __init__(self, folder: Path, full_from: int, free_from: int) -> None:
        self.filler, self.full_from, self.free_from = folder / "filler", full_from, free_from

    def __call__(self, step: int) -> list[Batch]:
        if step == self.full_from:
            self.filler.write_bytes(bytes(shutil.disk_usage(self.filler.parent).free))
        if step == self.free_from:
            self.filler.unlink()
        return batches_of(step)


SAVING = {"save_every": 2, "keep_checkpoints": 2}


def test_a_full_disk_is_waited_for_while_training_goes_on(tmp_path: Path, small_disk: Path) -> None:
    plain = trainer_in(tmp_path, make_model("qwen2"), batches_of, steps=10, train=SAVING)
    plain.run()
    disk = Disk(small_disk, full_from=3, free_from=7)
    trainer = trainer_in(small_disk, make_model("qwen2"), disk, steps=10, train=SAVING)
    trainer.run()
    run = trainer.task.run
    assert loss_curve(run.events) == loss_curve(plain.task.run.events)
    assert len(list(read_events(run.events, "step"))) == 10, "events were lost while the disk was full"
    warnings = [(event["step"], event["what"]) for event in read_events(run.events, "warning")]
    assert [step for step, _ in warnings] == [4, 6]
    assert all("training goes on" in what and "step-000002" in what for _, what in warnings)
    assert [path.name for path in run.complete_checkpoints()] == ["step-000008", "step-000010"]
    assert not list(run.checkpoints.glob(".*"))


def test_a_disk_that_stays_full_fails_at_the_last_save_and_loses_nothing(
    tmp_path: Path, small_disk: Path
) -> None:
    plain = trainer_in(tmp_path, make_model("qwen2"), batches_of, steps=8, train=SAVING)
    plain.run()
    disk = Disk(small_disk, full_from=3, free_from=-1)
    trainer = trainer_in(small_disk, make_model("qwen2"), disk, steps=8, train=SAVING)
    with pytest.raises(SaveFailed, match="free") as failed:
        trainer.run()
    assert failed.value.exit_code == 4 and "free space" in (failed.value.hint or "")
    run = trainer.task.run
    last = run.latest_checkpoint()
    assert last is not None and last.name == "step-000002"
    trainer.events.close()
    disk.filler.unlink()
    from tunesmith.model.load import load_model

    again = trainer_in(
        small_disk,
        load_model(last / "model", dtype=torch.float32, device="cpu"),
        batches_of,
        steps=8,
        train=SAVING,
    )
    again.restore(last)
    again.run()
    assert loss_curve(run.events) == loss_curve(plain.task.run.events)


# -- rows ----------------------------------------------------------------------------------------------------

POISON = "☃"


def poisoned(tiny: Path, folder: Path) -> Path:
    """The tiny model, with no number where the embedding of POISON's tokens should be."""
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rare = AutoTokenizer.from_pretrained(tiny)(POISON, add_special_tokens=False)["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if config["tie_word_embeddings"]:  # as a head such a row would break every loss
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights["model.embed_tokens.weight"][rare[-1]] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("packing", [False, True])
def test_the_row_that_breaks_the_loss_is_named_first(tmp_path: Path, tiny: Path, packing: bool) -> None:
    recipe = write_recipe(
        tmp_path,
        poisoned(tiny, tmp_path / "model"),
        train={"max_steps": 12, "grad_accumulation": 4},
        data={"packing": packing, "eval_fraction": 0.0},
    )
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[30] = rows[30].replace("Add ", f"Add {POISON} ")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(
        RunFailed, match=r"the loss is nan; its rows, the worst first: row 31 \(nan\), row "
    ) as stopped:
        train_recipe(recipe, [])
    events = tmp_path / "runs" / "run" / "events.jsonl"
    warning = list(read_events(events, "warning"))[-1]
    assert warning["rows"][0] == {"row": 31, "value": "nan"} and warning["rows"][1]["value"] != "nan"
    steps = len(list(read_events(events, "step")))
    assert f"step {steps + 1}: " in stopped.value.what
    if steps:
        last = RunFolder(tmp_path / "runs" / "run").latest_checkpoint()
        assert last is not None and last.name == f"step-{steps:06d}" and str(last) in stopped.value.what


class Break(torch.autograd.Function):
    """The identity, whose gradient is not finite for tokens of the number 7."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        return embedded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        return torch.where((ids == 7)[..., None], torch.inf, grads[0]), None


def test_the_row_that_breaks_the_gradient_is_named_first(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: Break.apply(out, args[0]))
    documents = [(ids + 1 * (ids == 7), labels) for ids, labels in make_documents(8, seed=1)]
    documents = [(ids, np.where(labels == 7, 8, labels)) for ids, labels in documents]
    broken = documents[5][0].copy()
    broken[0] = 7
    with_seven = [*documents[:5], (broken, documents[5][1]), *documents[6:]]

    def batches(step: int) -> list[Batch]:
        found = with_seven if step == 2 else documents
        return [join(found[:4], (10, 11, 12, 13)), join(found[4:], (14, 15, 16, 17))]

    trainer = trainer_in(tmp_path, model, batches, steps=4)
    before: list[Tensor] = []

    def keep(step: int) -> list[Batch]:
        before[:] = [p.detach().clone() for p in model.parameters()]
        return batches(step)

    object.__setattr__(trainer.task, "batches", keep)
    with pytest.raises(
        RunFailed, match=r"step 3: the gradient norm is (inf|nan); .*: row 15 \((inf|nan)\), row"
    ):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def spiky(step: int) -> list[Batch]:
    """The same easy rows each step, and once among them one that nobody could have learned."""
    draw = np.random.default_rng(step)
    easy = [np.resize(np.arange(3 + start, 9 + start), 40) for start in range(4)]
    if step == 30:
        easy[2] = draw.integers(3, 500, 40)
    return [join([(ids, ids.copy()) for ids in easy], (20, 21, 22, 23))]


def test_a_spike_names_its_row_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def curve(name: str) -> dict[int, float]:
        trainer = trainer_in(tmp_path / name, make_model("qwen3"), spiky, steps=36, train={"lr": 3e-3})
        trainer.run()
        return loss_curve(trainer.task.run.events)

    watched = curve("watched")
    (warning,) = read_events(tmp_path / "watched" / "run" / "events.jsonl", "warning")
    assert warning["step"] == 31 and warning["rows"][0]["row"] == 22
    assert warning["rows"][0]["value"] > 2 * warning["rows"][1]["value"]
    assert "its rows, the worst first: row 22" in capfd.readouterr().err
    monkeypatch.setattr(faults, "FEWEST", 10**9)
    assert curve("unwatched") == watched
