"""What train.memory stands for, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.core.errors import RecipeErrors, UserError
from tunesmith.recipe.load import check
from tunesmith.recipe.resolve import Facts, resolve
from tunesmith.recipe.schema import Train

FACTS = Facts(context_length=8192, device="cuda", threads=3, precision="bf16", serve_precision="bf16")
FP16 = Facts(context_length=8192, device="cuda", threads=3, precision="fp16", serve_precision="fp16")
CPU = Facts(context_length=8192, device="cpu", threads=3, precision="bf16", serve_precision="bf16")


def train(facts: Facts = FACTS, *, method: str = "full", engine: str = "auto", **train: Any) -> Train:
    base = {"model": {"path": "x"}, "data": {"sources": [{"path": "a", "format": "text"}]}}
    sections = {"method": {"type": method}, "train": train, "parallel": {"engine": engine}}
    return resolve(check(base | sections, "r"), facts).train


def chosen(found: Train) -> tuple[Any, ...]:
    return (
        found.precision,
        found.optimizer,
        found.stochastic_rounding,
        found.optimizer_in_backward,
        found.gradient_checkpointing,
    )


def test_what_each_plan_stands_for() -> None:
    assert chosen(train()) == ("bf16", "adamw", False, False, "none")
    assert chosen(train(memory="low")) == ("bf16-pure", "adamw-8bit", True, False, "full")
    smallest = train(memory="smallest", max_grad_norm=None)
    assert chosen(smallest) == ("bf16-pure", "adamw-8bit", True, True, "full")


def test_adapters_keep_exact_states() -> None:
    assert chosen(train(method="lora", memory="smallest")) == ("bf16", "adamw", False, False, "full")


def test_given_values_are_kept_and_the_rest_follows() -> None:
    assert chosen(train(memory="low", precision="fp32")) == ("fp32", "adamw-8bit", False, False, "full")
    assert chosen(train(memory="low", optimizer="adamw")) == ("bf16-pure", "adamw", True, False, "full")
    assert chosen(train(optimizer="adamw-offload")) == ("bf16-pure", "adamw-offload", False, False, "none")
    offload = train(memory="low", optimizer="adamw-offload", gradient_checkpointing=False)
    assert chosen(offload) == ("bf16-pure", "adamw-offload", False, False, "none")


def test_fp16_hardware_keeps_fp32_weights() -> None:
    assert chosen(train(FP16, memory="low")) == ("fp16", "adamw-8bit", False, False, "full")
    assert chosen(train(FP16, memory="smallest")) == ("fp16", "adamw-8bit", False, False, "full")


def test_engines_that_shard_keep_their_own_optimizer() -> None:
    assert chosen(train(engine="fsdp", memory="smallest")) == ("bf16", "adamw", False, False, "full")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"optimizer_in_backward": True}, r"optimizer_in_backward: true: .*max_grad_norm: 1 cannot"),
        ({"memory": "smallest"}, r"from train\.memory: smallest.*max_grad_norm: 1 cannot"),
        ({"memory": "smallest", "max_grad_norm": None, "grad_accumulation": 4}, r"grad_accumulation: 4"),
        (
            {"optimizer_in_backward": True, "max_grad_norm": None, "precision": "fp16"},
            "fp16 could not pass over",
        ),
        ({"stochastic_rounding": True}, r"stochastic_rounding: true with train\.precision: bf16"),
        (
            {"stochastic_rounding": True, "precision": "bf16-pure", "optimizer": "adamw-offload"},
            "no small update is lost",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        train(**settings)
    assert caught.value.hint


def test_activations_of_a_cpu_are_in_host_memory_already() -> None:
    assert train(FACTS, activation_offload=True).activation_offload
    with pytest.raises(UserError, match=r"activation_offload: true with hardware\.device: cpu"):
        train(CPU, activation_offload=True)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(RecipeErrors) as caught:
        train(optimizer_in_backward=True, grad_accumulation=2, stochastic_rounding=True)
    assert len(caught.value.faults) == 3
