import pytest

from tunesmith.plan.card_rates import BANDWIDTH_SHARE, KERNEL_S, PEAK_SHARE, START_S, card_rates
from tunesmith.plan.cards import card_named
from tunesmith.plan.duration import Operation

A100 = card_rates(card_named("a100-80"))


def test_a_large_product_takes_the_share_of_the_peak_that_training_reaches() -> None:
    product = Operation("mm", "matmul", "bf16", flops=312 * 10**12, num_bytes=1000)
    assert A100.seconds(product) == pytest.approx(1 / PEAK_SHARE["matmul"])


def test_a_newer_card_reaches_less_of_a_higher_peak() -> None:
    product = Operation("mm", "matmul", "bf16", flops=10**15, num_bytes=1000)
    h100 = card_rates(card_named("h100"))
    assert 2.0 < A100.seconds(product) / h100.seconds(product) < 3.17  # 989 / 312


def test_a_product_of_little_arithmetic_takes_as_long_as_its_operands_are_read() -> None:
    product = Operation("mm", "matmul", "bf16", flops=1000, num_bytes=10**10)
    assert A100.seconds(product) == pytest.approx(10**10 / (A100.bytes_per_s * BANDWIDTH_SHARE))


def test_the_smallest_operation_takes_as_long_as_a_kernel_and_a_view_nothing() -> None:
    assert A100.seconds(Operation("add", "memory", "bf16", 0, 16)) == KERNEL_S
    assert A100.seconds(Operation("view", "none", "bf16", 0, 10**12)) == 0.0


def test_a_format_that_a_card_does_not_multiply_is_its_slowest() -> None:
    t4 = card_rates(card_named("t4"))
    slow = Operation("mm", "matmul", "bf16", flops=10**12, num_bytes=1)
    assert t4.seconds(slow) == t4.seconds(slow._replace(dtype="fp32"))
    assert t4.seconds(slow._replace(dtype="fp16")) < t4.seconds(slow)


def test_a_step_of_small_operations_takes_as_long_as_starting_them() -> None:
    small, view = Operation("add", "memory", "bf16", 0, 16), Operation("view", "none", "bf16", 0, 0)
    assert A100.all_s([(small, 10), (view, 1000)]) == pytest.approx(10 * START_S)
    large = Operation("add", "memory", "bf16", 0, 10**10)
    both = A100.seconds(large) + 10 * KERNEL_S
    assert A100.all_s([(large, 1), (small, 10)]) == pytest.approx(both)
    assert A100.all_s([(small, 10)], more_s=1.0) == pytest.approx(1.0 + 10 * KERNEL_S)
