"""TRL's own loss curves on `preference_case`, as JSON: the numbers in test_preference_trl.py.

pip install torch==2.13.0 trl==1.16.0 && PYTHONPATH=. python tests/reference/trl_preference.py
"""

from __future__ import annotations

import json
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOTrainer

from tests.reference.preference_case import BETA, LR, PAIRS, STEPS, small_model, step_pairs


class InOrder(DPOTrainer):
    """Rows in their order, losses not rounded."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset or self.train_dataset)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


def curve(loss_type: str) -> list[float]:
    rows = [
        {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}
        for step in range(STEPS)
        for prompt, answers in step_pairs(step)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            loss_type=loss_type,
            beta=BETA,
            max_length=None,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS,
            logging_steps=1,
            max_grad_norm=0.0,
            weight_decay=0.0,
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        text = Dataset.from_list([{"prompt": "3 ", "chosen": "4", "rejected": "5"}])
        trainer = InOrder(
            small_model(),
            ref_model=small_model(),
            args=config,
            train_dataset=text,
            processing_class=tokenizer(),
        )
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.losses = []
        trainer.train()
    return trainer.losses


def odds_ratio() -> list[float]:
    """beta x the odds-ratio term of ORPO for three pairs of mean log-probabilities."""
    chosen, rejected = torch.tensor([-2.2, -2.5, -2.5]), torch.tensor([-2.0, -1.625, -29 / 9])
    settings: Any = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    return (-ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)[0]).tolist()


if __name__ == "__main__":
    found = {name: curve(name) for name in ("sigmoid", "hinge", "ipo")}
    print(json.dumps(found | {"orpo": odds_ratio()}))
