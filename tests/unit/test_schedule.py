"""Learning-rate schedules at the points that define them."""

import itertools
import math

import pytest

from flexpert.config.groups import OptimConfig
from flexpert.train.schedule import lr_factor

STEPS, WARMUP = 110, 10


def optim(schedule: str, **changes: float | int | None) -> OptimConfig:
    values: dict[str, float | int | None] = {"warmup_steps": WARMUP, "final_lr_ratio": 0.1} | changes
    return OptimConfig(schedule=schedule, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_is_linear_and_its_last_step_is_the_peak(schedule: str) -> None:
    factors = [lr_factor(optim(schedule), step, STEPS) for step in range(WARMUP)]
    assert factors == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])
    assert factors[0] > 0
    assert factors[-1] == lr_factor(optim(schedule), WARMUP, STEPS) == 1


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_half_way_down(schedule: str, middle: float) -> None:
    assert lr_factor(optim(schedule), 60, STEPS) == pytest.approx(middle)


def test_cosine_is_slow_at_both_ends_and_linear_is_not() -> None:
    quarter, three_quarters = 35, 85
    assert lr_factor(optim("linear"), quarter, STEPS) == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_factor(optim("linear"), three_quarters, STEPS) == pytest.approx(0.1 + 0.9 * 0.25)
    down = 0.5 * (1 + math.cos(math.pi / 4))
    assert lr_factor(optim("cosine"), quarter, STEPS) == pytest.approx(0.1 + 0.9 * down)
    assert lr_factor(optim("cosine"), three_quarters, STEPS) == pytest.approx(0.1 + 0.9 * (1 - down))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_at_the_end_and_after_it_the_final_ratio_is_left(schedule: str, ratio: float) -> None:
    config = optim(schedule, final_lr_ratio=ratio)
    assert lr_factor(config, STEPS, STEPS) == pytest.approx(ratio)
    assert lr_factor(config, 10 * STEPS, STEPS) == pytest.approx(ratio)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_after_the_warm_up_the_rate_never_rises(schedule: str) -> None:
    factors = [lr_factor(optim(schedule), step, STEPS) for step in range(WARMUP, STEPS)]
    assert all(after < before for before, after in itertools.pairwise(factors))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_horizon_beyond_the_run_is_a_longer_schedule_cut_off(schedule: str) -> None:
    """FlexOlmo's public model: a cosine for 5T tokens, stopped at 1T."""
    long, cut = optim(schedule), optim(schedule, horizon_steps=5 * STEPS)
    run = [lr_factor(cut, step, STEPS) for step in range(STEPS)]
    assert run == [lr_factor(long, step, 5 * STEPS) for step in range(STEPS)]
    assert run[-1] > 0.8


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_horizon_within_the_run_is_followed_by_the_final_ratio(schedule: str) -> None:
    config = optim(schedule, horizon_steps=50)
    assert lr_factor(config, 49, STEPS) > 0.1
    assert all(lr_factor(config, step, STEPS) == pytest.approx(0.1) for step in range(50, STEPS))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_a_warm_up_the_first_step_is_the_peak(schedule: str) -> None:
    assert lr_factor(optim(schedule, warmup_steps=0), 0, STEPS) == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_shorter_than_its_warm_up_stays_in_it(schedule: str) -> None:
    assert [lr_factor(optim(schedule), step, 5) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_constant_stays_at_the_peak() -> None:
    assert {lr_factor(optim("constant"), step, STEPS) for step in range(WARMUP, 3 * STEPS)} == {1.0}
