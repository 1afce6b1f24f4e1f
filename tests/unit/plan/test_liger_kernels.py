"""What Liger's kernels keep: hand-computed bytes beside traced ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from tests.reference.conftest import resolved_recipe
from tunesmith.plan.liger_kernels import MULTIPROCESSORS, Gated, RmsNorm, Rotation, imagined_liger
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_memory import full_batch, trace_recipe
from tunesmith.workflows.plan_step import Work

TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 96, 64, 160, 4, 2, 16


def made(*, part: str) -> tuple[int, int]:
    """(bytes that the forward pass makes and keeps, most that the backward pass makes on top of them and of
    the gradient that comes), of one kernel in bf16."""
    with FakeTensorMode(), Trace() as trace:

        def new(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)

        given: tuple[tuple[Tensor, ...], Any] = {
            "norm": ((new(TOKENS, HIDDEN), new(HIDDEN)), RmsNorm),
            "frozen norm": ((new(TOKENS, HIDDEN), new(HIDDEN).detach()), RmsNorm),
            "gated": ((new(TOKENS, INNER), new(TOKENS, INNER)), Gated),
        }[part]
        tensors, kernel = given
        before = live(trace)
        out = kernel.apply(*tensors)
        kept = live(trace) - before
        grad = torch.empty_like(out)
        held = live(trace)
        trace.at("backward")
        torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], grad)
        highest = trace.timeline.peaks().get(("backward", ""))
    return kept, max(highest.num_bytes - held, 0) if highest else 0


def live(trace: Trace) -> int:
    return sum(record.num_bytes for record in trace.timeline.records if record.freed is None)


def test_a_norm_keeps_its_input_and_a_root_for_each_row() -> None:
    kept, backward = made(part="norm")
    assert kept == TOKENS * HIDDEN * 2 + TOKENS * 4
    # One row in fp32 for each multiprocessor, their sum, and that in bf16.
    assert backward == MULTIPROCESSORS * HIDDEN * 4 + HIDDEN * (4 + 2)


def test_a_frozen_norms_gradient_takes_the_place_of_the_one_that_came() -> None:
    assert made(part="frozen norm") == (TOKENS * HIDDEN * 2 + TOKENS * 4, 0)


def test_both_gradients_of_swiglu_take_the_place_of_the_products() -> None:
    assert made(part="gated") == (TOKENS * INNER * 2, 0)


def test_the_rotation_writes_where_q_and_k_are() -> None:
    with FakeTensorMode(), Trace() as trace:
        shape = 1, TOKENS, HEADS, HEAD
        q, k = (torch.empty(shape, requires_grad=True).transpose(1, 2) for _ in range(2))
        tables = torch.empty(1, TOKENS, HEAD), torch.empty(1, TOKENS, HEAD)
        before = live(trace)
        turned = Rotation.apply(q, k, *tables)
        assert live(trace) == before
        assert [part.shape for part in turned] == [q.shape, k.shape]


def recipe_of(kernels: str, checkpointing: str) -> Recipe:
    return resolved_recipe(
        data={"sources": [{"path": "unused"}], "max_length": TOKENS},
        method={"type": "full"},
        train={
            "precision": "bf16-pure",
            "micro_batch_size": 1,
            "kernels": kernels,
            "gradient_checkpointing": checkpointing,
        },
    )


def activations(kind: str, kernels: str, layers: int, checkpointing: str = "none") -> int:
    """Bytes that are kept when the last layer's forward pass is over."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        num_hidden_layers=layers,
        vocab_size=50,
        max_position_embeddings=128,
    )
    peaks = trace_recipe(
        recipe_of(kernels, checkpointing),
        config,
        Work(batch=full_batch(TOKENS, 1)),
        device="cuda",
        exact=True,
    )
    records = peaks.timeline.records
    end = max(record.made for record in records if record.phase == "forward")
    return sum(
        record.num_bytes
        for record in records
        if record.category == "activations" and record.made <= end and (record.freed or end + 1) > end
    )


def test_a_layer_keeps_what_liger_and_transformers_save() -> None:
    a_layer = activations("llama", "liger", 3) - activations("llama", "liger", 2)
    stream = 4 * HIDDEN  # both residuals, both norms' outputs
    heads = 2 * HEADS * HEAD + 2 * KV_HEADS * HEAD  # q, k, v and attention's output
    products = 3 * INNER  # gate, up and what they make
    roots = 4 * (2 + HEADS)  # of two norms and of each head's softmax, in fp32
    of_attention = 2 * 4 + 2 * 8  # where documents begin, and the state of its random numbers
    assert a_layer == TOKENS * (2 * (stream + heads + products) + roots) + of_attention


def test_checkpointed_layers_keep_their_input_alone() -> None:
    kept = [activations("llama", "liger", layers, "full") for layers in (2, 3)]
    assert kept[1] - kept[0] == TOKENS * HIDDEN * 2


def test_our_own_layers_keep_less() -> None:
    theirs, ours = (
        activations("llama", kernels, 3) - activations("llama", kernels, 2) for kernels in ("liger", "torch")
    )
    # Norms' outputs and SwiGLU are worked out again.
    assert theirs - ours >= TOKENS * 2 * INNER


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "mistral"])
def test_other_kinds_are_patched_too(kind: str) -> None:
    """Against the same model as transformers has it, whose rotation and activation keep more."""
    config = AutoConfig.for_model(kind, num_hidden_layers=1)
    assert config.model_type == kind
    assert 0 < activations(kind, "liger", 2) != activations(kind, "torch", 2)


def test_a_kind_that_differs_stays_as_it_is() -> None:
    model = nn.Module()
    model.config = AutoConfig.for_model("phi3")  # type: ignore[assignment]
    with imagined_liger(model):
        assert "forward" not in vars(model)
