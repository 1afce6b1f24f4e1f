"""The GPU's ways against the CPU's: attention over documents, fused layers, Liger's kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_documents, make_model, one_batch
from tunesmith.model import attention
from tunesmith.model.fast_attention import attend_documents
from tunesmith.recipe.schema import Train
from tunesmith.train.objective import Supervised
from tunesmith.train.speed import speed_up

pytestmark = pytest.mark.gpu
LENGTHS = [3, 1, 200, 40, 300, 7]


def test_flash_attention_over_documents() -> None:
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 64) for heads in (6, 2, 2)]
    exact = [torch.randn(shape).transpose(0, 1)[None].requires_grad_() for shape in shapes]
    rounded = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    wanted = attend_documents(*exact, LENGTHS, 0.125)
    found = attend_documents(*rounded, LENGTHS, 0.125)
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0.02, atol=0.02)
    weights = torch.randn(wanted.shape)
    theirs = torch.autograd.grad((wanted * weights).sum(), exact)
    ours = torch.autograd.grad((found * weights.cuda().bfloat16()).sum(), rounded)
    for gradient, reference in zip(ours, theirs, strict=True):
        off = (gradient.float().cpu() - reference).norm() / reference.norm()
        assert float(off) < 0.02


def gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = Supervised().total(model, one_batch(make_documents(6)))
    loss.backward()
    return float(loss.detach()), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernels", ["torch", "liger"])
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3"])
def test_a_step_on_the_gpu_is_that_of_the_cpu(kind: str, kernels: str) -> None:
    if kernels == "liger":
        pytest.importorskip("liger_kernel")
    model = make_model(kind)
    attention.install(model)
    on_gpu = copy.deepcopy(model).cuda()
    speed_up(on_gpu, Train.model_validate({"kernels": kernels, "compile": False}))
    loss, wanted = gradients(model.train())
    found_loss, found = gradients(on_gpu.train())
    assert found_loss == pytest.approx(loss, rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) < 1e-3 * largest, name
