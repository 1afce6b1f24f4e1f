import pytest

from tunesmith.plan.duration import (
    Arithmetic,
    Load,
    Pass,
    RunLoad,
    StepTime,
    factor_of,
    plan_run_time,
)

# 10 operations a token, 1 a pair, 100 a label.
ARITHMETIC = Arithmetic(per_token=10, per_square=1, per_label=100)


def load(tokens: float, squares: float = 0, labels: float = 0) -> Load:
    return Load(tokens=tokens, squares=squares, labels=labels)


def one(tokens: float, seconds: float) -> Pass:
    return Pass(load=load(tokens), seconds=seconds)


def step(timed: Pass, *, update_s: float = 0.0, evaluate: Pass | None = None) -> StepTime:
    return StepTime(arithmetic=ARITHMETIC, one=timed, update_s=update_s, evaluate=evaluate)


def test_arithmetic_is_counted_by_tokens_pairs_and_labels() -> None:
    assert ARITHMETIC.flops(load(tokens=4, squares=16, labels=2)) == 40 + 16 + 200


def test_loads_add_up_and_are_shared_out() -> None:
    total = Load.sum([load(3, 9, 1), load(5, 25, 2)])
    assert total == load(8, 34, 3)
    assert total.times(0.5) == load(4, 17, 1.5)


def test_a_pass_takes_time_in_proportion_to_its_arithmetic() -> None:
    assert step(one(100, 2.0)).pass_s(load(150)) == pytest.approx(3.0)


def test_a_run_is_its_steps_evaluations_saves_and_start() -> None:
    # Two micro-batches of 50 tokens a step: 1 s each, and 0.5 s for the update.
    plan = plan_run_time(
        step(one(100, 2.0), update_s=0.5, evaluate=one(10, 0.25)),
        RunLoad(
            steps=10,
            passes=20,
            load=load(1000),
            evaluations=3,
            eval_load=load(40),
            saves=2,
            save_bytes=500,
            start_bytes=300,
            largest=load(100),
        ),
        source="probe",
        device="cpu",
        disk_bytes_per_s=100.0,
        price_per_hour=36.0,
    )
    assert plan.step_s == pytest.approx(2.5)
    assert plan.train_s == pytest.approx(25.0)
    assert plan.eval_s == pytest.approx(3 * 4 * 0.25)
    assert plan.save_s == pytest.approx(2 * 500 / 100)
    assert plan.start_s == pytest.approx(300 / 100 + 2.0)  # read, and the largest micro-batch tried
    assert plan.total_s == pytest.approx(25 + 3 + 10 + 5)
    assert plan.tokens_per_s == pytest.approx(1000 / 25)
    assert plan.flops == 10_000
    assert plan.cost == pytest.approx(36.0 * 43 / 3600)
    assert plan.low_s < plan.step_s < plan.high_s
    assert plan.as_dict()["cost"] == plan.cost
    assert "2.5 s a step" in plan.text() and "43.0 s in all" in plan.text()


def test_processes_share_the_micro_batches() -> None:
    alone = RunLoad(steps=10, passes=40, load=load(4000))
    shared = RunLoad(steps=10, passes=20, load=load(4000), processes=2)
    times = [
        plan_run_time(step(one(100, 2.0)), run, source="probe", device="cpu", disk_bytes_per_s=1.0)
        for run in (alone, shared)
    ]
    assert times[0].step_s == pytest.approx(8.0)
    assert times[1].step_s == pytest.approx(4.0)
    assert times[1].tokens_per_s == pytest.approx(2 * times[0].tokens_per_s)


def test_real_steps_correct_the_sum_of_the_operations() -> None:
    factor = factor_of([1.0, 2.0, 4.0], [1.2, 2.2, 8.0])
    assert factor == pytest.approx(1.2)
    plan = plan_run_time(
        step(one(100, 2.0)),
        RunLoad(steps=5, passes=5, load=load(500)),
        source="probe + steps",
        device="cpu",
        disk_bytes_per_s=1.0,
        factor=factor,
    )
    assert plan.step_s == pytest.approx(2.4)
    assert plan.source == "probe + steps"


def test_without_a_price_there_is_no_cost() -> None:
    run = RunLoad(steps=1, passes=1, load=load(10))
    plan = plan_run_time(step(one(10, 1.0)), run, source="probe", device="cpu", disk_bytes_per_s=1.0)
    assert plan.cost is None
    assert plan.text().endswith("in all")


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="2 measured steps beside 1 predicted"):
        factor_of([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="0 steps"):
        plan_run_time(
            step(one(10, 1.0)),
            RunLoad(steps=0, passes=0, load=load(0)),
            source="probe",
            device="cpu",
            disk_bytes_per_s=1.0,
        )
