"""LLaMA-Factory. packed: its neat packing, one step's rows as one sequence under a block-diagonal mask."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from job import Job, Row, StepLog, hugging_face_callback, read_job, use_threads


def one_sequence(rows: list[Row]) -> dict[str, list[int]]:
    """A step's rows end to end; the attention mask numbers them, as neat packing does."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "attention_mask": [number for number, row in enumerate(rows, 1) for _ in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
    }


def tokenized(job: Job) -> Path:
    if job.packed:
        rows = [one_sequence(step) for step in job.steps]
    else:
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in job.rows]
    folder = Path(job.folder) / "rows"
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder)
    return folder


def model_folder(job: Job) -> str:
    """LLaMA-Factory computes in the dtype that config.json names, bf16 even where the CPU lacks it: for fp32,
    the same files under a config that says so."""
    if job.precision != "fp32":
        return job.model
    folder = Path(job.folder) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path(job.model).iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((Path(job.model) / "config.json").read_text())
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def settings(job: Job) -> dict[str, Any]:
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": model_folder(job),
        "template": "empty",
        "tokenized_path": str(tokenized(job)),
        "dataset": "rows",
        "neat_packing": job.packed,
        "packing": job.packed,
        "cutoff_len": job.longest,
        "disable_shuffling": True,
        "finetuning_type": job.method,
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_target": "all",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": 1 if job.packed else job.rows_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": len(job.steps),
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused" if job.device == "cuda" else "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "output_dir": f"{job.folder}/out",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }


def stand_in_for_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio at its start; its wheels need CUDA's libraries, text does not."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        spec = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)


def main() -> None:
    job = read_job()
    use_threads(job)
    stand_in_for_torchaudio()
    from llamafactory.train.tuner import run_exp

    log = StepLog(job, "llamafactory", "transformers", "peft", "accelerate")
    run_exp(settings(job), callbacks=[hugging_face_callback(log)])


if __name__ == "__main__":
    main()
