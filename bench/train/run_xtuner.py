"""xtuner 0.1's SupervisedFinetune under mmengine's runner. It pads to the longest row of a step."""

from __future__ import annotations

from typing import Any

import torch
from job import Job, Row, StepLog, read_job, use_threads, weights_dtype
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import SupervisedFinetune


class Rows(Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class Note(Hook):
    """Writes every step's loss to the runner's log."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.log.step(float(outputs["loss"].detach()))


def model(job: Job) -> Any:
    config = AutoConfig.from_pretrained(job.model)
    if rope := getattr(config, "rope_parameters", None):  # as transformers 5 writes it
        config.rope_theta = rope["rope_theta"]
    base = ConfigDict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=job.model,
        config=config,
        torch_dtype=weights_dtype(job),
    )
    lora = None
    if job.method == "lora":
        from peft import LoraConfig

        lora = LoraConfig(r=job.rank, lora_alpha=job.alpha, task_type="CAUSAL_LM")
    return SupervisedFinetune(base, lora=lora, use_activation_checkpointing=False)


def collate(rows: list[Row]) -> Any:
    return default_collate_fn(rows, pad_index=0)


def main() -> None:
    job = read_job()
    use_threads(job)
    torch.manual_seed(job.seed)
    log = StepLog(job, "xtuner", "mmengine", "transformers", "peft")
    rows = Rows(job.rows)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=job.rows_per_step, sampler=SequentialSampler(rows), collate_fn=collate
    )
    wrapper = {"type": "OptimWrapper"}
    if job.precision == "bf16":
        wrapper = {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
    runner = Runner(
        model(job),
        work_dir=f"{job.folder}/out",
        train_dataloader=loader,
        train_cfg={"by_epoch": False, "max_iters": len(job.steps)},
        optim_wrapper=wrapper
        | {
            "optimizer": {"type": "AdamW", "lr": job.lr, "weight_decay": 0.0},
            "clip_grad": {"max_norm": 1.0},
        },
        default_hooks={"checkpoint": None, "logger": None},
        custom_hooks=[Note(log)],
        randomness={"seed": job.seed},
    )
    runner.train()


if __name__ == "__main__":
    main()
