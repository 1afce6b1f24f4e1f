"""Training speed and memory, side by side in one run: ours, and the loop that anybody would write.

    python bench/training.py --model MODEL_FOLDER [--steps 4] [--rows 8] [--mean-length 80] [--method full]

Every contender trains the same rows in a process of its own: the same AdamW, the loss over the labels of the
step, so the same losses. Tokens are real ones, none of them padding. Machines are shared: read the ratio,
repeat, and with --threads 1 look at the tokens a CPU second.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

RANK = 16
LR = 1e-4
Rows = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def step_rows(args: argparse.Namespace, step: int) -> Rows:
    """Rows of random tokens with log-normal lengths; the second half of each is supervised."""
    draw = np.random.default_rng(step)
    lengths = np.exp(draw.normal(np.log(args.mean_length) - 0.08, 0.4, args.rows)).astype(int).clip(4, 2000)
    rows = []
    for length in lengths:
        ids = draw.integers(3, 40000, length)
        labels = ids.copy()
        labels[: length // 2] = -100
        rows.append((ids, labels))
    return rows


def load(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.method == "full":
        return model
    from tunesmith.model.adapters import attach_lora

    settings: dict[str, Any] = {"alpha": 2.0 * RANK, "dropout": 0.0, "targets": "all-linear"}
    return attach_lora(model, rank=RANK, rslora=False, seed=0, **settings)


def ours(args: argparse.Namespace) -> Iterator[float]:
    from tunesmith.core.events import EventLog
    from tunesmith.core.run_folder import RunFolder
    from tunesmith.model import attention
    from tunesmith.model.batch import Batch, join
    from tunesmith.recipe.schema import Recipe
    from tunesmith.train.loop import Task, Trainer

    def batches(step: int) -> list[Batch]:
        return [join(step_rows(args, step))]

    model = load(args)
    attention.install(model)
    train = {"lr": LR, "precision": "fp32", "schedule": "constant", "warmup_ratio": 0}
    sources = {"sources": [{"path": "none"}]}
    recipe = Recipe.model_validate({"model": {"path": "none"}, "data": sources, "train": train})
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        task = Task(
            recipe=recipe,
            run=run,
            model=model,
            total_steps=args.steps,
            batches=batches,
            longest=batches(0)[0],
            epochs_after=float,
        )
        trainer = Trainer(task, EventLog(run.events))
        model.train()
        for step in range(args.steps):
            yield trainer.step(batches(step)).loss


def plain(args: argparse.Namespace) -> Iterator[float]:
    """transformers and peft, padded, all logits."""
    import torch
    from torch.nn import functional as F

    model = load(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    model.train()
    for step in range(args.steps):
        ids, labels, mask = padded(step_rows(args, step))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def padded(rows: Rows) -> tuple[Any, Any, Any]:
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    labels = torch.full((len(rows), width), -100)
    for at, (row, wanted) in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = torch.from_numpy(row), 1
        labels[at, : len(row)] = torch.from_numpy(wanted)
    return ids, labels, mask


def trl(args: argparse.Namespace) -> Iterator[float]:
    """TRL's SFTTrainer as it comes, in fp32; its times are taken from its own callback."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    losses: list[tuple[float, float]] = []

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_log(self, settings: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "loss" in logs:
                losses.append((time.perf_counter(), float(logs["loss"])))

    rows = [row for step in range(args.steps) for row in step_rows(args, step)]
    data = Dataset.from_dict(
        {"input_ids": [ids.tolist() for ids, _ in rows], "labels": [labels.tolist() for _, labels in rows]}
    )
    settings = {"bf16": False, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, per_device_train_batch_size=args.rows, max_steps=args.steps, learning_rate=LR,
            lr_scheduler_type="constant", use_cpu=True, max_length=None, **settings,
        )  # fmt: skip
        torch.set_num_threads(args.threads)
        trainer = SFTTrainer(load(args), args=config, train_dataset=data, callbacks=[Note()])
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.train()
    args.times = [moment for moment, _ in losses]
    yield from (loss for _, loss in losses)


CONTENDERS: dict[str, Callable[[argparse.Namespace], Iterator[float]]] = {
    "ours": ours,
    "plain": plain,
    "trl": trl,
}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """tokens/s of all steps but the first, which warms up."""
    losses, times, cpu = [], [], []
    for loss in CONTENDERS[name](args):
        losses.append(loss)
        times.append(time.perf_counter())
        cpu.append(time.process_time())
    times = getattr(args, "times", times)
    tokens = sum(len(ids) for step in range(1, args.steps) for ids, _ in step_rows(args, step))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    per_cpu_s = tokens / (cpu[-1] - cpu[0]) if name != "trl" else 0.0
    rate = tokens / (times[-1] - times[0])
    return {"tokens_per_s": rate, "tokens_per_cpu_s": per_cpu_s, "peak_gib": peak, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--mean-length", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    names = [name for name in CONTENDERS if name != "trl" or find_spec("trl")]
    found = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'':8}{'tokens/s':>10}{'a CPU s':>10}{'peak GiB':>10}{'against plain':>15}  losses")
    for name, result in found.items():
        ratio = result["tokens_per_s"] / found["plain"]["tokens_per_s"]
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
        speeds = f"{result['tokens_per_s']:10.0f}{result['tokens_per_cpu_s']:10.0f}"
        print(f"{name:8}{speeds}{result['peak_gib']:10.2f}{ratio:14.2f}x  {losses}")


if __name__ == "__main__":
    main()
