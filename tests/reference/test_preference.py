"""Preference losses against the published formulas, and our loop against one that computes them plainly."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.reference.conftest import MODELS, make_model, resolved_recipe
from tunesmith.core.errors import RunFailed
from tunesmith.core.events import EventLog, read_events
from tunesmith.core.run_folder import RunFolder
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.batch import IGNORE, Batch, join
from tunesmith.recipe.schema import Objective
from tunesmith.train import logprobs
from tunesmith.train.logprobs import answer_logprobs
from tunesmith.train.loop import Task, Trainer
from tunesmith.train.metrics import loss_curve
from tunesmith.train.preference import Answers, Preference, dpo_losses, kto_losses, orpo_losses
from tunesmith.train.reference import Reference

Pair = tuple[list[int], list[list[int]]]


def make_pairs(count: int, *, answers: int = 2, seed: int = 0) -> list[Pair]:
    """Prompts of 1 to 20 tokens with answers of 1 to 30, all of them supervised."""
    draw = np.random.default_rng(seed)
    return [
        (
            draw.integers(3, 512, draw.integers(1, 21)).tolist(),
            [draw.integers(3, 512, draw.integers(1, 31)).tolist() for _ in range(answers)],
        )
        for _ in range(count)
    ]


def batch_of(pairs: list[Pair]) -> Batch:
    documents = []
    for prompt, answers in pairs:
        ids = np.array(prompt + [token for answer in answers for token in answer])
        labels = ids.copy()
        labels[: len(prompt)] = IGNORE
        documents.append((ids, labels))
    branches = np.array([[len(prompt), *map(len, answers)] for prompt, answers in pairs])
    return join(documents, tuple(range(len(pairs))), branches)


def plain_logps(model: Any, pairs: list[Pair]) -> Tensor:
    """[P, B], one whole sequence at a time, as the definition says."""
    rows = []
    for prompt, answers in pairs:
        for answer in answers:
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
            at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            rows.append(logits[at].log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum())
    return torch.stack(rows).view(len(pairs), -1)


# -- log-probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_logprobs_and_gradients_equal_whole_sequences(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 512 * 7)
    model = make_model(kind).double()
    if method != "full":
        save = ["lm_head"] if method == "head" else None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=save))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        model = model.double()
    plain = copy.deepcopy(model)
    attention.install(model)
    pairs = make_pairs(5, answers=3)
    weights = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    found, tokens = answer_logprobs(model, batch_of(pairs))
    expected = plain_logps(plain, pairs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert tokens.tolist() == [[len(answer) for answer in answers] for _, answers in pairs]
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    # transformers' norms compute in fp32 even in a float64 model, where a shared prompt is rounded once.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = gradients[name]
            worst = float((parameter.grad - wanted).abs().max() / wanted.abs().max())
            assert worst < 1e-6, f"{name}: {worst}"


def test_parts_and_single_answers_of_a_batch() -> None:
    pairs = make_pairs(4, answers=3)
    batch = batch_of(pairs)
    half, last = batch.part(1, 3), batch.answers(2, 3)
    assert half.input_ids.tolist() == batch_of(pairs[1:3]).input_ids.tolist() and half.rows == (1, 2)
    expected = batch_of([(prompt, answers[2:]) for prompt, answers in pairs])
    for name in ("input_ids", "labels", "starts", "branches", "positions", "predictors"):
        assert getattr(last, name).tolist() == getattr(expected, name).tolist(), name


# -- formulas -------------------------------------------------------------------------------------------------

PI = [[-11.0, -14.0], [-7.5, -3.25], [-30.0, -29.0]]
REF = [[-12.0, -13.0], [-7.0, -4.0], [-28.0, -30.5]]
TOKENS = [[5.0, 7.0], [3.0, 2.0], [12.0, 9.0]]


def answers() -> tuple[Answers, Answers]:
    pi, ref, tokens = (torch.tensor(values, dtype=torch.float64) for values in (PI, REF, TOKENS))
    return tuple(Answers(pi[:, i], tokens[:, i], ref[:, i]) for i in (0, 1))  # type: ignore[return-value]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def settings(**values: Any) -> Objective:
    return Objective.model_validate(values)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_published_formula(beta: float, smoothing: float) -> None:
    chosen, rejected = answers()
    found = dpo_losses(chosen, rejected, settings(type="dpo", beta=beta, label_smoothing=smoothing))
    for i in range(3):
        margin = (PI[i][0] - REF[i][0]) - (PI[i][1] - REF[i][1])
        expected = -(1 - smoothing) * math.log(sigmoid(beta * margin)) - smoothing * math.log(
            sigmoid(-beta * margin)
        )
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)


def test_variants_of_dpo_are_the_published_formulas() -> None:
    chosen, rejected = answers()
    hinge = dpo_losses(chosen, rejected, settings(type="dpo", loss="hinge", beta=0.3))
    ipo = dpo_losses(chosen, rejected, settings(type="dpo", loss="ipo", beta=0.3))
    mixed = dpo_losses(chosen, rejected, settings(type="dpo", beta=0.3, sft_weight=0.7))
    pure = dpo_losses(chosen, rejected, settings(type="dpo", beta=0.3))
    for i in range(3):
        ratios = [PI[i][j] - REF[i][j] for j in (0, 1)]
        assert float(hinge[i]) == pytest.approx(max(0.0, 1 - 0.3 * (ratios[0] - ratios[1])), rel=1e-12)
        by_token = ratios[0] / TOKENS[i][0] - ratios[1] / TOKENS[i][1]
        assert float(ipo[i]) == pytest.approx((by_token - 1 / 0.6) ** 2, rel=1e-12)
        assert float(mixed[i] - pure[i]) == pytest.approx(-0.7 * PI[i][0] / TOKENS[i][0], rel=1e-12)


def test_orpo_is_the_published_formula() -> None:
    chosen, rejected = answers()
    found = orpo_losses(chosen, rejected, settings(type="orpo", beta=0.25))
    for i in range(3):
        p = [math.exp(PI[i][j] / TOKENS[i][j]) for j in (0, 1)]
        odds = [value / (1 - value) for value in p]
        expected = -math.log(p[0]) - 0.25 * math.log(sigmoid(math.log(odds[0] / odds[1])))
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)


def test_orpo_has_a_gradient_for_a_certain_answer() -> None:
    logps = torch.tensor([0.0, -1e-9, -80.0], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=torch.float64)
    other = Answers(-2 * ones, ones, ones)
    orpo_losses(Answers(logps, ones, ones), other, settings(type="orpo")).sum().backward()
    assert logps.grad is not None and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_kto_is_the_published_formula(shift: float) -> None:
    chosen, rejected = answers()
    given = settings(type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    found = kto_losses(chosen, rejected, given, torch.tensor(shift, dtype=torch.float64))
    z = max(0.0, shift)
    for i in range(3):
        ratios = [PI[i][j] - REF[i][j] for j in (0, 1)]
        gain = 1.5 * (1 - sigmoid(0.3 * (ratios[0] - z)))
        harm = 0.5 * (1 - sigmoid(0.3 * (z - ratios[1])))
        assert float(found[i]) == pytest.approx((gain + harm) / 2, rel=1e-12)


# -- the loop -------------------------------------------------------------------------------------------------

STEPS, LR = 8, 2e-3


class Setup:
    """Steps of two micro-batches of three pairs, the same two sets again and again."""

    def __init__(self, answers: int = 2) -> None:
        self.sets = [[make_pairs(3, answers=answers, seed=2 * s + m) for m in (0, 1)] for s in (0, 1)]

    def __call__(self, step: int) -> list[Batch]:
        return [batch_of(pairs) for pairs in self.sets[step % 2]]

    def documents(self) -> Iterator[Batch]:
        return (batch_of(pairs) for pairs_of_step in self.sets for pairs in pairs_of_step)


def trainer_in(
    folder: Path, model: Any, setup: Any, objective: dict[str, Any], steps: int, lr: float = LR
) -> Trainer:
    """A Trainer of a preference; `setup` gives a step's micro-batches, and all `documents`."""
    attention.install(model)
    train = {"lr": lr, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": None}
    recipe = resolved_recipe(
        objective=objective,
        train={"precision": "fp32", "save_every": 1000} | train,
        method={"type": "lora" if isinstance(model, PeftModel) else "full"},
        eval={"every": 0},
        samples={"every": 0},
    )
    run = RunFolder(folder / "run")
    reference = Reference(setup.documents, folder / "cache", {})
    task = Task(
        recipe=recipe,
        run=run,
        model=model,
        total_steps=steps,
        batches=setup,
        longest=setup(0)[0],
        epochs_after=float,
        eval_batches=list(setup.documents()),
        objective=Preference(recipe.objective, None if objective["type"] == "orpo" else reference),
    )
    return Trainer(task, EventLog(run.events))


def plain_curve(model: Any, setup: Setup, objective: dict[str, Any]) -> list[float]:
    """One sequence at a time, a second model as the reference, AdamW."""
    given = settings(**objective)
    base = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, foreach=False
    )
    curve = []
    for step in range(STEPS):
        losses = []
        for pairs in setup.sets[step % 2]:
            pi = plain_logps(model, pairs)
            with torch.no_grad():
                ref = plain_logps(base, pairs)
            lengths = torch.tensor([[len(a) for a in answers] for _, answers in pairs]).double()
            one, two = (Answers(pi[:, i], lengths[:, i], ref[:, i]) for i in (0, 1))
            if given.type == "kto":
                losses.append(kto_losses(one, two, given, (pi[:, 2] - ref[:, 2]).mean()))
            else:
                losses.append({"dpo": dpo_losses, "orpo": orpo_losses}[given.type](one, two, given))
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "dpo"},
        {"type": "dpo", "loss": "ipo", "beta": 0.5, "sft_weight": 0.3},
        {"type": "orpo"},
        {"type": "kto"},
    ],
    ids=["dpo", "ipo+sft", "orpo", "kto"],
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_curve_equals_the_plain_loop(tmp_path: Path, method: str, objective: dict[str, Any]) -> None:
    setup = Setup(answers=3 if objective["type"] == "kto" else 2)
    model = make_model("llama-tied")
    if method == "lora":
        model = attach_lora(model, rank=4, alpha=8, dropout=0, targets="all-linear", rslora=False, seed=0)
    expected = plain_curve(copy.deepcopy(model), setup, objective)
    trainer = trainer_in(tmp_path, model, setup, objective, STEPS)
    trainer.run()
    found = list(loss_curve(trainer.task.run.events).values())
    assert expected[-1] < expected[0] - 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_reference_pass_without_memory_says_so_and_ends_the_run(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: torch.empty(2**60) and None)
    trainer = trainer_in(tmp_path, model, Setup(), {"type": "dpo"}, STEPS)
    with pytest.raises(RunFailed, match="memory ran out in the reference's log-prob") as error:
        trainer.run()
    assert "with shorter rows" in str(error.value.hint) or "train.micro_batch_size=" in str(error.value.hint)
    assert [event["status"] for event in read_events(trainer.task.run.events, "end")] == ["failed"]
