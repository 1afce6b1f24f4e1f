from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.unit.plan.hearing import Hearing
from tunesmith.plan.duration import Operation
from tunesmith.plan.operations import Call, Calls


def heard(work: Callable[[], Any]) -> Calls:
    with Hearing() as hearing:
        work()
    return hearing.calls


def only(calls: Calls, name: str) -> tuple[Call, Operation, int]:
    found = [(c, o, calls.of("forward")[c]) for c, o in calls.operations.items() if o.name.startswith(name)]
    assert len(found) == 1, found
    return found[0]


def test_a_product_is_two_operations_for_each_of_its_multiplications() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    _, product, count = only(heard(lambda: [a @ b for _ in range(4)]), "mm")
    assert product == Operation("mm", "matmul", "fp32", 2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    assert count <= 4


@pytest.mark.parametrize(
    ("work", "flops"),
    [
        (lambda: torch.addmm(torch.ones(7), torch.ones(3, 5), torch.ones(5, 7)), 2 * 3 * 5 * 7),
        (lambda: torch.ones(3, 7).addmm_(torch.ones(3, 5), torch.ones(5, 7)), 2 * 3 * 5 * 7),
        (lambda: torch.mm(torch.ones(3, 5), torch.ones(5, 7), out=torch.empty(3, 7)), 2 * 3 * 5 * 7),
        (lambda: torch.ops.aten.linear.default(torch.ones(3, 5), torch.ones(7, 5)), 2 * 3 * 5 * 7),
        (lambda: torch.bmm(torch.ones(2, 3, 5), torch.ones(2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (lambda: torch.mv(torch.ones(3, 5), torch.ones(5)), 2 * 3 * 5),
        (lambda: torch.ones(3).addmv_(torch.ones(3, 5), torch.ones(5)), 2 * 3 * 5),
        (lambda: torch.ones(3, 5) * 2, 0),
    ],
)  # fmt: skip
def test_operations_of_products(work: Callable[[], Any], flops: int) -> None:
    assert heard(work).flops("forward") == flops


def test_attention_as_one_kernel_causal_and_not_forward_and_backward() -> None:
    """Two products of [8, 8] by heads of 16 forward, five backward; a causal mask leaves half."""
    pairs = 2 * 8 * 8 * 16
    for causal, share in ((False, 1.0), (True, 0.5)):
        q, k, v = (torch.rand(1, 2, 8, 16, requires_grad=True) for _ in range(3))

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

        calls = heard(work)
        found = [o for o in calls.operations.values() if o.kind == "attention"]
        assert sorted(o.flops for o in found) == [share * 2 * 2 * pairs, share * 5 * 2 * pairs]


def test_bytes_are_read_once_and_written_once_and_an_expanded_operand_is_small() -> None:
    x, row = torch.ones(64, 32), torch.ones(1, 32).expand(64, 32)
    _, added, _ = only(heard(lambda: x + row), "add")
    assert added.num_bytes == 4 * (64 * 32 + 32 + 64 * 32)
    _, scaled, _ = only(heard(lambda: x.mul_(2.0)), "mul_")
    assert scaled.num_bytes == 4 * (64 * 32 + 64 * 32)


def test_views_and_empty_tensors_cost_nothing() -> None:
    x = torch.ones(64, 32)
    calls = heard(lambda: (x.t(), x[3:], x.view(32, 64), torch.empty_like(x)))
    assert {operation.kind for operation in calls.operations.values()} == {"none"}
    assert not any(operation.num_bytes for operation in calls.operations.values())


def test_calls_are_counted_by_phase() -> None:
    x = torch.ones(4)
    with Hearing() as hearing:
        x.abs()
        hearing.phase = "backward"
        x.abs()
        x.abs()
    assert sum(hearing.calls.of("forward").values()) == 1
    assert sum(hearing.calls.of("backward").values()) == 2
    assert sum(hearing.calls.of("forward", "backward").values()) == 3
