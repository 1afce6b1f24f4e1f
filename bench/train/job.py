"""What every runner is given and what it writes. Standard library only: it runs in each peer's environment.

    PYTHON run_NAME.py JOB.json

JOB.json names the model folder, the method and the rows: the token ids and labels of every optimizer step, so
that all contenders compute the same losses. A runner appends one JSON object a line to `log`: `start` with
the versions, then after every optimizer step `step` with its loss.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, list[int]]  # input_ids [L], labels [L]: -100 where nothing is learned


@dataclass(frozen=True)
class Job:
    """`steps` [S][rows of a step]; precision: fp32 or bf16; packed: lay a step's rows end to end."""

    model: str
    method: str
    rank: int
    alpha: int
    lr: float
    precision: str
    device: str
    threads: int
    seed: int
    packed: bool
    options: dict[str, Any]
    folder: str
    log: str
    steps: list[list[Row]]

    @property
    def rows(self) -> list[Row]:
        return [row for step in self.steps for row in step]

    @property
    def rows_per_step(self) -> int:
        return len(self.steps[0])

    @property
    def longest(self) -> int:
        return max(len(row["input_ids"]) for row in self.rows)


def read_job() -> Job:
    values = json.loads(Path(sys.argv[1]).read_text())
    steps = json.loads(Path(values.pop("rows")).read_text())
    return Job(steps=steps, **values)


class StepLog:
    """The runner's event log; its lines read like those of a run's events.jsonl."""

    def __init__(self, job: Job, *packages: str) -> None:
        self._path = Path(job.log)
        self._count = 0
        self._write("start", versions={name: _version(name) for name in ("torch", *packages)})

    def step(self, loss: float, at: float | None = None) -> None:
        """`at`: when the step ended (time.time()), if that was not just now."""
        self._count += 1
        self._write("step", at, step=self._count, loss=loss, **_gpu_peak())

    def _write(self, event: str, at: float | None = None, **fields: Any) -> None:
        line = {"time": time.time() if at is None else at, "event": event} | fields
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu_peak() -> dict[str, float]:
    torch = sys.modules["torch"]
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}


def hugging_face_callback(log: StepLog) -> Any:
    """For a transformers Trainer with logging_steps=1: every step's end and loss."""
    from transformers import TrainerCallback

    class Note(TrainerCallback):  # type: ignore[misc]
        ended = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                log.step(float(logs["loss"]), self.ended)

    return Note()


def weights_dtype(job: Job) -> Any:
    """The dtype of the loaded weights: adapters stand on bf16 weights, a full fine-tune keeps fp32."""
    import torch

    return torch.bfloat16 if job.precision == "bf16" and job.method == "lora" else torch.float32


def use_threads(job: Job) -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    torch.set_num_threads(job.threads)
