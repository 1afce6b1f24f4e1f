"""What is kept for the backward pass: less with checkpointing, host copies with offload, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.conftest import make_documents, make_model, one_batch
from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.live_tensors import LiveTensors
from tunesmith.train.activations import MIN_OFFLOAD_BYTES, OffloadedActivations, checkpoint_layers
from tunesmith.train.fast_lora import speed_up
from tunesmith.train.objective import Supervised

BATCH = one_batch(make_documents(12))


def model_of(kind: Any, *, lora: bool, fast: bool) -> Any:
    model: Any = make_model("llama-tied")
    if lora:
        settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "rslora": False}
        model = attach_lora(model, dropout=0.0, seed=0, **settings)
    attention.install(model)
    checkpoint_layers(model, kind)
    if fast:
        speed_up(model)
    return model.train()


def saved_and_gradients(model: Any) -> tuple[int, list[Tensor]]:
    """(bytes that a forward pass leaves for the backward pass, all gradients)"""
    with LiveTensors() as live:
        loss = Supervised().total(model, BATCH)
        saved = live.live_bytes
        loss.backward()
    return saved, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_less_is_kept_and_the_gradients_stay(lora: bool, fast: bool) -> None:
    found = {
        kind: saved_and_gradients(model_of(kind, lora=lora, fast=fast))
        for kind in ("none", "selective", "full")
    }
    # The fast layers are selective of themselves; with adapters on slow ones only attention could be kept.
    assert found["full"][0] < 0.4 * found["none"][0]
    assert found["full"][0] <= found["selective"][0] <= found["none"][0]
    assert fast or found["selective"][0] < 0.7 * found["none"][0]
    for kind in ("selective", "full"):
        for ours, wanted in zip(found[kind][1], found["none"][1], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_without_layers_to_compute_again_is_refused() -> None:
    with pytest.raises(UserError, match=r"gradient_checkpointing: 'full': Linear"):
        checkpoint_layers(nn.Linear(2, 2), "full")


def test_offloaded_tensors_come_back_and_weights_stay_where_they_are() -> None:
    size = MIN_OFFLOAD_BYTES // 4
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.ones(size))
    offload = OffloadedActivations(model)
    x = torch.arange(float(size), requires_grad=True)
    small = torch.ones(3, requires_grad=True)
    with offload.context():
        y = (model.weight * x).exp().sum() + small.exp().sum()
    y.backward()
    torch.testing.assert_close(x.grad, x.detach().exp())
    torch.testing.assert_close(small.grad, small.detach().exp())
    assert offload._pack(model.weight) is model.weight and offload._pack(small) is small
    packed = offload._pack(x.detach())
    assert isinstance(packed, tuple) and packed[1].data_ptr() != x.data_ptr()


@pytest.mark.gpu
def test_offload_on_a_gpu_frees_its_memory_and_changes_no_gradient() -> None:
    def run(offload: bool) -> tuple[int, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
        x = torch.randn(4096, 1024, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        context = OffloadedActivations(model).context()
        if offload:
            with context:
                y = model(x).square().sum()
        else:
            y = model(x).square().sum()
        held = torch.cuda.memory_allocated() - before
        y.backward()
        assert x.grad is not None
        return held, x.grad

    plain, moved = run(False), run(True)
    assert moved[0] < plain[0] / 4
    assert torch.equal(plain[1], moved[1])
