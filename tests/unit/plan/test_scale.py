"""Cases computed by hand."""

from __future__ import annotations

import pytest

from tunesmith.plan.cards import card_named
from tunesmith.plan.scale import (
    LINK_SHARE,
    Exchange,
    Link,
    MeasuredNetwork,
    Network,
    Traffic,
    card_network,
    data_parallel,
    link_through,
    lost_share,
    overlapped_s,
    save_interval_s,
    sharded,
    tensor_parallel,
    traffic_s,
)

INNER = Link(latency_s=1.0, bytes_per_s=100.0)
OUTER = Link(latency_s=10.0, bytes_per_s=50.0)
FOUR = Network(gpus=4, inner=INNER)
TWO_OF_FOUR = Network(gpus=4, inner=INNER, hosts=2, outer=OUTER)


def traffic(collective: str, num_bytes: float, messages: float = 1) -> Traffic:
    return Traffic(collective=collective, messages=messages, num_bytes=num_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("collective", "sent"),
    # Of 400 bytes among four: all of them but the own quarter go on, and for a sum twice.
    [("all_gather", 300), ("reduce_scatter", 300), ("all_reduce", 600), ("broadcast", 400)],
)
def test_bytes_that_a_process_sends(collective: str, sent: float) -> None:
    assert traffic(collective, 400).sent_bytes(4) == pytest.approx(sent)
    assert traffic(collective, 400).sent_bytes(1) == 0


def test_a_ring_takes_a_round_for_every_other_process() -> None:
    assert FOUR.ring_s(traffic("all_gather", 400)) == pytest.approx(3 * 1 + 300 / 100)
    assert FOUR.ring_s(traffic("all_reduce", 400, messages=5)) == pytest.approx(5 * 6 * 1 + 600 / 100)


def test_the_slowest_link_and_the_slow_rounds_count() -> None:
    # Eight in a ring: seven rounds, one of them from host to host; 7/8 of 800 bytes at 50 a second.
    assert TWO_OF_FOUR.processes == 8
    assert TWO_OF_FOUR.bytes_per_s == 50
    assert TWO_OF_FOUR.ring_s(traffic("all_gather", 800)) == pytest.approx(6 * 1 + 10 + 700 / 50)
    alone = Network(gpus=1, inner=Link(latency_s=1.0, bytes_per_s=1.0), hosts=2, outer=OUTER)
    assert alone.ring_s(traffic("all_gather", 800)) == pytest.approx(10 + 400 / 50)


def test_small_sums_among_many_go_by_a_tree() -> None:
    many = Network(gpus=8, inner=INNER, hosts=128, outer=OUTER)
    # Seven rounds in the host, and seven of 128 hosts halved; up and down.
    small = traffic("all_reduce", 0.0)
    assert many.tree_s(small) == pytest.approx(2 * (7 * 1 + 7 * 10))
    assert many.seconds(small) == many.tree_s(small) < many.ring_s(small)
    large = traffic("all_reduce", 1e9)
    assert many.tree_s(large) == pytest.approx(2 * (77 + 1e9 / (0.9 * 50)))
    assert many.seconds(large) == many.ring_s(large)


def test_copies_around_a_message_are_in_its_time() -> None:
    slow = Network(gpus=4, inner=INNER, copy_bytes_per_s=200.0)
    assert slow.seconds(traffic("all_gather", 400)) == pytest.approx(6 + 2 * 400 / 200)


def test_one_process_sends_nothing() -> None:
    assert Network(gpus=1, inner=INNER).seconds(traffic("all_reduce", 400, messages=3)) == 0


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"gpus": 1, "hosts": 0}, {"gpus": 1, "hosts": 2}])
def test_a_network_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="hosts of"):
        Network(inner=INNER, **wrong)


def test_a_card_sends_over_its_own_link_or_the_bus() -> None:
    # H100: NVLink 450 GB/s; 8 network cards of 50 GB/s are slower than that.
    linked = card_network(card_named("h100"), 8, hosts=4, host_bytes_per_s=400e9)
    assert linked.inner.bytes_per_s == pytest.approx(450e9 * LINK_SHARE)
    assert linked.bytes_per_s == pytest.approx(400e9 * LINK_SHARE)
    on_bus = card_network(card_named("rtx4090"), 2)
    assert on_bus.bytes_per_s == pytest.approx(31.5e9 * LINK_SHARE)
    assert on_bus.inner.latency_s > linked.inner.latency_s


def test_a_link_goes_through_two_measurements() -> None:
    link = link_through((100, 1.5), (1100, 3.5))
    assert link.bytes_per_s == pytest.approx(500)
    assert link.latency_s == pytest.approx(1.3)
    measured = MeasuredNetwork(processes=2, links={"all_reduce": link}, copy_bytes_per_s=1000.0)
    assert measured.seconds(traffic("all_reduce", 1000, messages=2)) == pytest.approx(2 * 1.3 + 2 + 4)
    with pytest.raises(ValueError, match="beside"):
        link_through((100, 3.5), (1100, 1.5))


def test_data_parallel_sends_gradients_once() -> None:
    assert data_parallel(100, bucket_bytes=32) == [traffic("all_reduce", 100, messages=4)]


def test_shards_send_three_times_the_model_and_stage_2_twice() -> None:
    three = sharded(100, 100, units=5, passes=2)
    assert three == [traffic("all_gather", 400, messages=20), traffic("reduce_scatter", 200, messages=10)]
    # Rajbhandari et al.: 1.5 times what data parallel sends, which is twice the gradients.
    sent = sum(part.sent_bytes(4) for part in sharded(100, 100, units=5))
    assert sent == pytest.approx(1.5 * data_parallel(100, bucket_bytes=100)[0].sent_bytes(4))
    assert sharded(100, 100, units=5, stage=2)[0] == traffic("all_gather", 100, messages=5)


def test_tensor_parallel_sums_activations_four_times_a_layer() -> None:
    (found,) = tensor_parallel(layers=3, tokens=10, hidden=8)
    assert found == traffic("all_reduce", 4 * 3 * 10 * 8 * 2, messages=12)
    (again,) = tensor_parallel(layers=3, tokens=10, hidden=8, recomputed=True)
    assert again.messages == 18


def test_what_is_sent_hides_behind_what_is_computed() -> None:
    # Four parts of 2 s computing and 1 s sending: 2 2 2 2, and the last part's second.
    assert overlapped_s(8, 4, 4) == pytest.approx(9)
    assert overlapped_s(4, 8, 4) == pytest.approx(9)
    assert overlapped_s(8, 4, 1) == pytest.approx(12)


def test_a_step_waits_for_what_is_not_hidden() -> None:
    assert Exchange(pass_s=1, step_s=5).waited_s(3, 10) == pytest.approx(8)
    hidden = Exchange(pass_s=4, pass_parts=4, overlaps=True)
    assert hidden.waited_s(3, 8) == pytest.approx(3)
    # Gradients are sent during two thirds of the last micro-batch's 9 s: 8 s beside 6 in 3 parts.
    gradients = Exchange(step_s=8, step_parts=3, overlaps=True)
    assert gradients.waited_s(2, 9) == pytest.approx(8 + 6 / 3 - 6)


def test_traffic_adds_up() -> None:
    assert traffic_s([traffic("all_gather", 400), traffic("reduce_scatter", 400)], FOUR) == pytest.approx(12)


def test_checkpoints_come_as_often_as_loses_least() -> None:
    # 2 s to save, a failure every 10,000 s: every 200 s. 1% saving, 100 s again and 50 s to restart.
    assert save_interval_s(2, 10_000) == pytest.approx(200)
    assert lost_share(2, 10_000, 50) == pytest.approx(0.01 + 150 / 10_000)
