"""A finished run written by hand from the real parts: quick, and with an adapter that visibly acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.core.events import EventLog
from tunesmith.core.run_folder import RunFolder, write_manifest
from tunesmith.hub.lock import write_lock
from tunesmith.hub.sources import resolve_model
from tunesmith.model.adapters import attach_lora, save_adapter
from tunesmith.workflows.open_model import load_files

RECIPE = "model: {{path: '{base}'}}\ndata: {{sources: [{{path: rows.jsonl}}]}}\nmethod: {{type: {method}}}\n"


def stir(model: Any, *, std: float, seed: int, only: str = "") -> None:
    """Add seeded noise to the parameters whose names hold `only`, as training would move them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def make_run(
    folder: Path, base: Path | str, *, steps: tuple[int, ...] = (5, 10), full: bool = False
) -> RunFolder:
    """Write a run over `base` with a complete checkpoint at each of `steps`."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.recipe.write_text(RECIPE.format(base=base, method="full" if full else "lora"))
    files = resolve_model(str(base))
    write_lock(run.lock, files, {"rows.jsonl": {"bytes": 1, "sha256": "0" * 64}})
    opened = load_files(files, dtype=torch.float32, device="cpu", merge=True)
    opened.tokenizer.save_pretrained(folder / "tokenizer")
    model = opened.model
    if not full:
        model = attach_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear", rslora=False, seed=1)
    with EventLog(run.events) as events:
        events.write("eval", step=0, loss=4.5)
        for step in steps:
            stir(model, std=0.05, seed=step, only="" if full else "lora_B")
            checkpoint = run.checkpoint(step)
            save_adapter(model, checkpoint / "adapter") if not full else model.save_pretrained(
                checkpoint / "model"
            )
            write_manifest(checkpoint, step=step)
            events.write("step", step=step, loss=3.0 - step / 10)
            events.write("eval", step=step, loss=3.5 - step / 10)
    return run
