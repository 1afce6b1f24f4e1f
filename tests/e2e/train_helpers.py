"""A small recipe, and a real training process that can be killed."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests import warm
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import MANIFEST, RunFolder

ROWS = 48


def write_rows(path: Path, *, seed: int = 0, count: int = ROWS, longest: int = 20) -> Path:
    """Questions of up to `longest` numbers and answers of unequal lengths."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        numbers = [str(draw.randint(0, 99)) for _ in range(draw.randint(2, longest))]
        messages = [
            {"role": "user", "content": f"Add {' and '.join(numbers)}."},
            {"role": "assistant", "content": " ".join(numbers[: draw.randint(1, 10)])},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_recipe(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """recipe.yaml in `folder`: 24 or more steps, saved after every one; `sections` are laid over it."""
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": str(write_rows(folder / "rows.jsonl"))}],
            "max_length": 192,
            "eval_fraction": 0.1,
            "packing": False,
        },
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "train": {
            "max_steps": 30,
            "micro_batch_size": 2,
            "grad_accumulation": 2,
            "lr": 5.0e-3,
            "save_every": 1,
            "precision": "fp32",
        },
        "eval": {"every": 10},
        "hardware": {"device": "cpu", "threads": 1},
        "output_dir": str(folder / "runs"),
        "name": "run",
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)
    return path


def cut_back(run: RunFolder, *, to_step: int) -> None:
    """Make a finished run look as if it had been killed after the save of `to_step`."""
    for folder in run.checkpoints.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > to_step:
            (folder / MANIFEST).unlink()
    lines = run.events.read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "end"
    run.events.write_text("\n".join(lines[:-1]) + "\n")


class Training:
    """`tunesmith train RECIPE` in a process of its own."""

    def __init__(self, recipe: Path, *args: str) -> None:
        self.run = recipe.parent / "runs" / "run"
        self.events = self.run / "events.jsonl"
        self._seen = len(list(read_events(self.events)))
        pipe = subprocess.PIPE
        self.process = warm.start("train", recipe, *args, stdout=pipe, stderr=pipe, cwd=recipe.parent)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended before its time: {self.process.communicate()}"
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.001)

    def new_events(self, kind: str) -> int:
        """How many events of a kind this process has written."""
        return sum(event["event"] == kind for event in list(read_events(self.events))[self._seen :])

    def is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".*.partial-*"))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        out, errors = self.process.communicate(timeout=300)
        return self.process.returncode, out, errors
