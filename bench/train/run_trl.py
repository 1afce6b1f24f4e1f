"""TRL's SFTTrainer. packed: padding-free, which lays a step's rows end to end with their own positions."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from job import Job, StepLog, hugging_face_callback, read_job, use_threads, weights_dtype
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def lora(job: Job) -> Any:
    if job.method == "full":
        return None
    from peft import LoraConfig

    return LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def config(job: Job) -> SFTConfig:
    return SFTConfig(
        job.folder,
        per_device_train_batch_size=job.rows_per_step,
        max_steps=len(job.steps),
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="adamw_torch_fused" if job.device == "cuda" else "adamw_torch",
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        max_length=None,
        padding_free=job.packed,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
        use_liger_kernel=bool(job.options.get("liger")),
    )


def main() -> None:
    job = read_job()
    use_threads(job)
    torch.manual_seed(job.seed)
    log = StepLog(job, "trl", "transformers", "peft", "accelerate")
    settings = config(job)
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=weights_dtype(job))
    trainer = SFTTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list(job.rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job),
        callbacks=[hugging_face_callback(log)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
