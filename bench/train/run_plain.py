"""The loop that anybody would write: transformers and peft, rows padded, all logits, AdamW."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from job import Job, Row, StepLog, read_job, use_threads, weights_dtype
from torch.nn import functional as F
from transformers import AutoModelForCausalLM


def load(job: Job) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=weights_dtype(job)).to(job.device)
    if job.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, labels, mask, each [rows, longest]."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    labels = torch.full((len(rows), width), -100)
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[at, :length], mask[at, :length] = torch.tensor(row["input_ids"]), 1
        labels[at, :length] = torch.tensor(row["labels"])
    return ids, labels, mask


def main() -> None:
    job = read_job()
    use_threads(job)
    torch.manual_seed(job.seed)
    log = StepLog(job, "transformers", "peft")
    model = load(job)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    casts = torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16" else nullcontext()
    model.train()
    for rows in job.steps:
        ids, labels, mask = (part.to(job.device) for part in padded(rows))
        with casts:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.step(float(loss.detach()))


if __name__ == "__main__":
    main()
