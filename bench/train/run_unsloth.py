"""Unsloth's model under TRL's SFTTrainer; needs a GPU."""

from __future__ import annotations

import unsloth  # isort: skip - it patches transformers and trl, and so has to come before them
import torch
from datasets import Dataset
from job import StepLog, hugging_face_callback, read_job, use_threads
from run_trl import config
from trl import SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    job = read_job()
    use_threads(job)
    torch.manual_seed(job.seed)
    log = StepLog(job, "unsloth", "trl", "transformers", "peft")
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=job.longest,
        dtype=torch.bfloat16 if job.precision == "bf16" else torch.float32,
        load_in_4bit=False,
        full_finetuning=job.method == "full",
    )
    if job.method == "lora":
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=job.rank,
            lora_alpha=job.alpha,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=False,
            random_state=job.seed,
        )
    trainer = SFTTrainer(
        model,
        args=config(job),
        train_dataset=Dataset.from_list(job.rows),
        processing_class=tokenizer,
        callbacks=[hugging_face_callback(log)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
