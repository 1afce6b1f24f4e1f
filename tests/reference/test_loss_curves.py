"""Our loop against the plain one that anybody would write with transformers and peft: same losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.reference.conftest import Document, make_documents, make_model, one_batch
from tunesmith.model.adapters import attach_lora
from tunesmith.train.loop import Trainer
from tunesmith.train.metrics import loss_curve

CLIP, DECAY = 1.0, 0.1


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Steps of `accumulation` batches of `per_batch` documents each."""

    vocabulary: int = 512
    steps: int = 20
    accumulation: int = 4
    per_batch: int = 3
    warmup: int = 3
    lr: float = 5e-3

    def step_documents(self, step: int) -> list[list[Document]]:
        """The same two sets of documents again and again, so that there is something to learn."""
        count = self.accumulation * self.per_batch
        found = make_documents(count, seed=step % 2, vocabulary=self.vocabulary)
        return [found[at : at + self.per_batch] for at in range(0, count, self.per_batch)]

    def plain_lr(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


TINY = Setup()
# With all weights, at 5e-3, Adam's first steps amplify rounding beyond the tolerance.
GENTLE = Setup(lr=2e-3)


def padded(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    labels = torch.full((len(documents), width), -100)
    mask = torch.zeros(len(documents), width, dtype=torch.long)
    for row, (document, wanted) in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document)
        labels[row, 1 : len(document)] = torch.from_numpy(wanted)[1:]
        mask[row, : len(document)] = 1
    return ids, labels, mask


def plain_loop(model: Any, setup: Setup = TINY) -> list[float]:
    """Padded batches, all logits, mean over the labels of the whole step, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=setup.lr,
        foreach=False,
    )
    model.train()
    losses = []
    for step in range(setup.steps):
        batches = [padded(documents) for documents in setup.step_documents(step)]
        count = sum(int((labels != -100).sum()) for _, labels, _ in batches)
        total = 0.0
        for ids, labels, mask in batches:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach()) / count
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = setup.plain_lr(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def our_losses(model: Any, make_trainer: Callable[..., Trainer], setup: Setup = TINY) -> list[float]:
    def batches(step: int) -> list[Any]:
        return [one_batch(documents) for documents in setup.step_documents(step)]

    settings = {
        "lr": setup.lr,
        "warmup_steps": setup.warmup,
        "grad_accumulation": setup.accumulation,
        "max_grad_norm": CLIP,
        "weight_decay": DECAY,
    }
    trainer = make_trainer(model, batches, steps=setup.steps, train=settings)
    trainer.run()
    curve = loss_curve(trainer.task.run.events)
    assert list(curve) == list(range(1, setup.steps + 1))
    return list(curve.values())


def assert_same_curve(ours: list[float], plain: list[float], tolerance: float) -> None:
    worst = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    assert worst < tolerance, f"largest difference {worst}: {ours} {plain}"
    assert plain[0] - plain[-1] > 0.1, f"too little is learned for the comparison to tell anything: {plain}"


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "qwen3"])
def test_full_fine_tuning_equals_a_plain_loop(kind: str, make_trainer: Callable[..., Trainer]) -> None:
    model = make_model(kind)
    plain = plain_loop(copy.deepcopy(model), GENTLE)
    assert_same_curve(our_losses(model, make_trainer, GENTLE), plain, 1e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "qwen3"])
def test_lora_equals_a_plain_loop_with_peft(kind: str, make_trainer: Callable[..., Trainer]) -> None:
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}
    ours = attach_lora(make_model(kind), **settings, seed=7)
    torch.manual_seed(7)
    plain = get_peft_model(
        make_model(kind), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs = plain_loop(plain)
    assert_same_curve(our_losses(ours, make_trainer), theirs, 1e-5)


def test_gradient_checkpointing_changes_no_loss(make_trainer: Callable[..., Trainer]) -> None:
    plain = plain_loop(make_model("llama-tied"), GENTLE)
    model = make_model("llama-tied")
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same_curve(our_losses(model, make_trainer, GENTLE), plain, 1e-5)


def test_lora_on_smollm2_equals_a_plain_loop(smol: Path, make_trainer: Callable[..., Trainer]) -> None:
    """A real model: its losses start near 10 on random tokens, so 1e-5 is one part in a million."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)

    setup = Setup(vocabulary=2000, steps=4, accumulation=2, per_batch=2, warmup=1, lr=1e-3)
    settings = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}
    plain = plain_loop(attach_lora(load(), **settings, seed=0), setup)
    ours = our_losses(attach_lora(load(), **settings, seed=0), make_trainer, setup)
    assert_same_curve(ours, plain, 1e-5)
