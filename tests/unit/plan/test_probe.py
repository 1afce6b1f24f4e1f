from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.plan.test_operations import heard
from tunesmith.plan import probe
from tunesmith.plan.operations import FAR, Call, Calls, Operand, Operands
from tunesmith.plan.probe import Bench, measure, shortened, write_rate

ATEN = torch.ops.aten


def operand(*shape: int, dtype: torch.dtype = torch.float32, far: int = 0) -> Operand:
    return Operand(tuple(shape), torch.empty(shape, device="meta").stride(), dtype, far)


def measured_all(work: Any) -> tuple[Calls, probe.Measured]:
    calls = heard(work)
    return calls, measure(calls.of("forward"), calls.operations, budget_s=60.0)


def test_every_operation_of_a_small_step_can_be_repeated() -> None:
    layer, x = torch.nn.Linear(32, 16), torch.ones(8, 32)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def work() -> None:
        torch.nn.functional.silu(layer(x)).softmax(-1).sum().backward()
        optimizer.step()

    calls, found = measured_all(work)
    assert found.share == pytest.approx(1.0)
    assert set(found.seconds) == set(calls.of("forward"))
    assert all(0 < seconds < 1 for seconds in found.seconds.values())


def test_weights_and_inputs_of_the_step_are_left_alone() -> None:
    x = torch.arange(6.0).view(2, 3)
    calls = heard(lambda: x.clone().mul_(2.0))
    measure(calls.of("forward"), calls.operations, budget_s=60.0)
    assert torch.equal(x, torch.arange(6.0).view(2, 3))


def test_more_arithmetic_takes_more_time() -> None:
    small, large = torch.ones(64, 64), torch.ones(512, 512)
    calls, found = measured_all(lambda: (small @ small, large @ large))
    seconds = {operation.flops: found.seconds[call] for call, operation in calls.operations.items()}
    assert seconds[2 * 512**3] > 4 * seconds[2 * 64**3]


def test_what_there_is_no_time_for_is_guessed() -> None:
    x = torch.ones(64, 64)
    calls = heard(lambda: (x @ x, x + x))
    found = measure(calls.of("forward"), calls.operations, budget_s=0.0)
    assert found.share == 0.0
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_what_cannot_be_repeated_is_left_out_of_the_share() -> None:
    impossible = Call(ATEN.mm.default, Operands((operand(2, 3), operand(4, 5))), ())
    calls = heard(lambda: torch.ones(4, 4) @ torch.ones(4, 4))
    known = next(iter(calls.operations.values()))
    assert Bench().seconds(impossible, known) is None


def test_far_operands_lie_at_another_place_each_time_and_near_ones_come_round() -> None:
    bench = Bench()
    far, near = operand(256, 256, far=FAR), operand(256, 256, far=2)
    places = bench._places(Call(ATEN.add.Tensor, Operands((far, near)), ()))
    addresses = [[make().data_ptr() for make in places] for _ in range(8)]
    assert len({pair[0] for pair in addresses}) == 8
    assert len({pair[1] for pair in addresses}) == 4  # 2 MiB are four times the 512 KiB of both


def test_no_two_operands_of_a_call_overlap() -> None:
    bench = Bench()
    operands = [operand(512, 512, far=far) for far in (FAR, 2, 0, FAR)]
    places = bench._places(Call(ATEN.cat.default, Operands((Operands(operands),)), ()))
    for _ in range(300):
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (make() for make in places))
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_many_operands_take_no_more_memory_than_few() -> None:
    """An optimizer's list: each of its tensors would otherwise go round in 32 MiB of its own."""
    bench = Bench()
    tensors = Operands(operand(8, 576, far=4) for _ in range(400))
    bench._places(Call(ATEN._foreach_norm.Scalar, Operands((tensors,)), ()))
    assert bench.arenas[torch.float32].values.nbytes < 48 << 20


def test_a_large_pass_over_memory_is_measured_on_a_part_of_it() -> None:
    rows = 1 << 20
    call = Call(ATEN.add.Tensor, Operands((operand(rows, 64), operand(rows, 64))), ())
    operation = probe.Operation("add.Tensor", "memory", "fp32", 0, 3 * rows * 256)
    times, short = shortened(call, operation)
    assert short.operands[0].shape == short.operands[1].shape == (rows // 8, 64)
    assert times == pytest.approx(8.0)


def test_an_optimizer_of_many_tensors_is_measured_on_some() -> None:
    tensors = Operands(operand(1024, 1024) for _ in range(40))
    call = Call(ATEN._fused_adamw_.default, Operands((tensors,) * 4), (("lr", 0.1),))
    operation = probe.Operation("_fused_adamw_", "optimizer", "fp32", 0, 40 * 7 * 4 * 2**20)
    times, short = shortened(call, operation)
    assert [len(each) for each in short.args] == [4, 4, 4, 4]  # 16 MiB a weight, 64 MiB in all
    assert times == pytest.approx(10.0)


def test_a_product_is_never_shortened() -> None:
    call = Call(ATEN.mm.default, Operands((operand(8192, 8192), operand(8192, 8192))), ())
    operation = probe.Operation("mm", "matmul", "fp32", 2 * 8192**3, 3 * 4 * 8192**2)
    assert shortened(call, operation) == (1.0, call)


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    assert write_rate(tmp_path / "run", num_bytes=1 << 20) > 0
    assert list((tmp_path / "run").iterdir()) == []
