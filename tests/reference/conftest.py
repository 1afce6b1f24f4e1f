"""Small random models of several architectures, batches of unequal documents, and a ready Trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from tests.tiny_models import VOCAB, make
from tunesmith.core.events import EventLog
from tunesmith.core.run_folder import RunFolder
from tunesmith.model import attention
from tunesmith.model.batch import IGNORE, Batch, join
from tunesmith.recipe.resolve import Facts, resolve, resolve_steps
from tunesmith.recipe.schema import Recipe
from tunesmith.train.loop import Task, Trainer

MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"family": "llama", "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": False},
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral"},
    "llama-biased": {
        "family": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}

Document = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def make_model(kind: str) -> Any:
    sizes = {"intermediate_size": 128, "max_position_embeddings": 512, "eos_token_id": 2}
    return make(wide=False, **sizes, **(MODELS | OTHERS)[kind]).train()


def make_documents(count: int, *, seed: int = 0, vocabulary: int = VOCAB) -> list[Document]:
    """Documents of 2 to 90 tokens whose last part is supervised."""
    draw = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(draw.integers(2, 91))
        ids = draw.integers(3, vocabulary, length)
        labels = ids.copy()
        labels[: int(draw.integers(1, length))] = IGNORE
        documents.append((ids, labels))
    return documents


def one_batch(documents: list[Document]) -> Batch:
    return join(documents, tuple(range(len(documents))))


def resolved_recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe without "auto", for one process on the CPU in fp32; `sections` say what it has of its own."""
    fixed = {"model": {"path": "unused"}, "data": {"sources": [{"path": "unused"}]}}
    facts = Facts(context_length=512, device="cpu", threads=1, precision="fp32", serve_precision="fp32")
    return resolve_steps(resolve(Recipe.model_validate(fixed | sections), facts), total_steps=100)


def trainer_in(
    folder: Path,
    model: Any,
    batches: Callable[[int], list[Batch]],
    *,
    steps: int,
    train: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
) -> Trainer:
    """A Trainer over made-up batches that writes into `folder`."""
    attention.install(model)
    settings = {"lr": 1e-3, "precision": "fp32", "save_every": 1000} | (train or {})
    recipe = resolved_recipe(
        train=settings,
        method={"type": "lora" if isinstance(model, PeftModel) else "full"} | (method or {}),
        eval={"every": 0},
        samples={"every": 0},
    )
    run = RunFolder(folder / "run")
    task = Task(
        recipe=recipe,
        run=run,
        model=model,
        total_steps=steps,
        batches=batches,
        longest=batches(0)[0],
        epochs_after=float,
    )
    return Trainer(task, EventLog(run.events))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    return partial(trainer_in, tmp_path)
