"""Trouble in one of two processes: the run goes on in both of them, or ends soon in both with a word."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.e2e.test_train_faults import POISON, Break, big_batches, poisoned, train_with, warnings_of
from tests.e2e.train_helpers import Training, cut_back, write_recipe
from tests.reference.conftest import make_documents, make_model
from tests.reference.parallel_runs import end, recipe_for
from tests.small_disk import mounted
from tunesmith.core.errors import RunFailed
from tunesmith.core.events import EventLog, read_events
from tunesmith.core.run_folder import RunFolder
from tunesmith.model import attention
from tunesmith.model.batch import Batch, join
from tunesmith.train.engines import make_engine
from tunesmith.train.gathered import HostCopies
from tunesmith.train.group import join_group
from tunesmith.train.loop import Task, Trainer
from tunesmith.train.metrics import loss_curve
from tunesmith.train.objective import Supervised
from tunesmith.train.ranks import ranks_from
from tunesmith.workflows.train import train_recipe

pytestmark = pytest.mark.slow

TWO = {"device": "cpu", "threads": 1, "processes": 2}
ONE = TWO | {"processes": 1}
each_engine = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


def end_of(training: Training) -> str:
    code, _, errors = training.end()
    assert code == 0, errors
    return errors


# -- memory ------------------------------------------------------------------------------------------------


def test_out_of_memory_in_one_rank_cuts_the_micro_batches_of_all(tmp_path: Path, tiny: Path) -> None:
    steps = {"grad_accumulation": 2, "micro_batch_size": 6, "max_steps": 8}
    plain = train_recipe(big_batches(tmp_path / "one", tiny, answer=100, train=steps, hardware=ONE), []).run
    recipe = big_batches(tmp_path / "two", tiny, answer=100, train=steps, hardware=TWO)
    code, errors, run = train_with("step", recipe)
    assert code == 0, errors
    events = list(read_events(run.events, "out_of_memory"))
    assert events and events[0]["max_tokens"] < events[0]["tokens"], errors
    assert events[0]["what"] == "another process ran out of memory", "rank 0 had memory enough"
    found = loss_curve(run.events)
    assert found == pytest.approx(loss_curve(plain.events), abs=1e-5) and len(found) == 8
    tokens = [[event["tokens"] for event in read_events(r.events, "step")] for r in (plain, run)]
    assert tokens[0] == tokens[1]
    cut_back(run, to_step=max(events[0]["step"] - 2, 0))
    end_of(Training(recipe))
    assert loss_curve(run.events) == found


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("step", r"does not fit into memory"),
        pytest.param(
            "save",
            r"memory ran out while the weights were gathered for a checkpoint",
            marks=pytest.mark.whole,
        ),
    ],
)
def test_out_of_memory_where_the_others_wait_ends_all(
    tmp_path: Path, tiny: Path, when: str, told: str
) -> None:
    parallel = {"engine": "fsdp"}
    steps = {"grad_accumulation": 2, "micro_batch_size": 6, "max_steps": 10}
    recipe = big_batches(tmp_path / "two", tiny, train=steps, hardware=TWO, parallel=parallel)
    code, errors, run = train_with(when, recipe)
    assert code == 4 and "error: rank 1: " in errors and told in errors, errors
    assert "Traceback" not in errors
    last = list(read_events(run.events, "step"))[-1]["step"]
    good = run.latest_checkpoint()
    assert good in (run.checkpoint(last), run.checkpoint(last - 1))
    assert not list(read_events(run.events, "end"))
    end_of(Training(recipe))
    assert run.latest_checkpoint() == run.checkpoint(10)


def test_rank_0_gathers_to_the_end_whatever_it_can_keep(tmp_path: Path) -> None:
    copies = HostCopies(tmp_path)
    kept = copies.take(torch.ones(3))
    assert torch.equal(kept, torch.ones(3)) and not copies.lacking
    assert copies.take(torch.zeros(1).expand(2**50)).numel() == 0
    assert "memory" in copies.lacking and copies.take(torch.ones(3)).numel() == 0
    assert HostCopies(None).take(torch.ones(3)).numel() == 0


# -- disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 MiB."""
    with mounted(tmp_path / "disk", mib=256) as folder:
        yield folder


@each_engine
def test_a_full_disk_is_waited_for_in_all_ranks(
    tmp_path: Path, small_disk: Path, tiny: Path, engine: str
) -> None:
    steps = {"max_steps": 8, "save_every": 2, "keep_checkpoints": 2, "lr": 1e-3}
    settings: Any = {"method": {"type": "full"}, "train": steps, "parallel": {"engine": engine}}
    recipe = write_recipe(tmp_path, tiny, hardware=TWO, output_dir=str(small_disk), **settings)
    code, errors, _ = train_with("disk", recipe)
    assert code == 0, errors
    run = RunFolder(small_disk / "run")
    assert [step for step, _ in warnings_of(run)] == [4, 6], errors
    for _, what in warnings_of(run):
        assert "training goes on" in what and str(run.checkpoint(2)) in what
    assert len(loss_curve(run.events)) == 8, "events were lost while the disk was full"
    assert run.complete_checkpoints()[-1] == run.checkpoint(8)
    assert not list(run.checkpoints.glob(".*"))


# -- rows ----------------------------------------------------------------------------------------------------


@each_engine
def test_the_row_that_breaks_the_loss_of_one_rank_is_named(tmp_path: Path, tiny: Path, engine: str) -> None:
    recipe = write_recipe(
        tmp_path,
        poisoned(tiny, tmp_path / "model"),
        train={"max_steps": 12, "grad_accumulation": 4},
        data={"eval_fraction": 0.0},
        hardware=TWO,
        parallel={"engine": engine},
    )
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[30] = rows[30].replace("Add ", f"Add {POISON} ")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    code, _, errors = Training(recipe).end()
    assert code == 4 and "its rows, the worst first: row 31 (nan), row " in errors, errors
    run = RunFolder(tmp_path / "runs" / "run")
    warning = list(read_events(run.events, "warning"))[-1]
    assert warning["rows"][0] == {"row": 31, "value": "nan"} and warning["rows"][1]["value"] != "nan"
    assert len(warning["rows"]) == 8, "rows of one rank only"
    steps = len(loss_curve(run.events))
    assert run.latest_checkpoint() in (run.checkpoint(steps), None)


def with_a_seven(step: int) -> list[Batch]:
    """Two micro-batches of four documents; in the third step row 15 begins with the token 7."""
    documents = [(ids + 1 * (ids == 7), labels) for ids, labels in make_documents(8, seed=1)]
    documents = [(ids, np.where(labels == 7, 8, labels)) for ids, labels in documents]
    if step == 2:
        documents[5][0][0] = 7
    return [join(documents[:4], (10, 11, 12, 13)), join(documents[4:], (14, 15, 16, 17))]


def break_a_gradient(local: int, out: Path, port: int) -> None:
    """One of two processes; what it says at its end is in `out`."""
    os.environ |= {
        "RANK": str(local),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    ranks = ranks_from(os.environ)
    join_group(ranks, "cpu")
    model = make_model("llama-tied")
    attention.install(model)
    model.get_input_embeddings().register_forward_hook(lambda _, args, found: Break.apply(found, args[0]))
    recipe, run = recipe_for("ddp", "full"), RunFolder(out / f"run-{local}")
    task = Task(
        recipe=recipe,
        run=run,
        model=model,
        total_steps=4,
        batches=with_a_seven,
        longest=with_a_seven(0)[0],
        epochs_after=float,
    )
    told = {}
    with EventLog(run.events) as events:
        try:
            Trainer(task, events, make_engine(model, Supervised(), recipe, ranks)).run()
        except RunFailed as error:
            told = {"what": error.what, "sum": float(sum(p.double().sum() for p in model.parameters()))}
    (out / f"{local}.json").write_text(json.dumps(told))
    end()


def test_the_row_that_breaks_the_gradient_of_one_rank_is_named(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(break_a_gradient, args=(tmp_path, port), nprocs=2)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for one in told:
        assert "step 3: the gradient norm is " in one["what"]
        assert "the worst first: row 15 (" in one["what"]
    assert told[0]["sum"] == told[1]["sum"], "the weights were touched in one rank"
