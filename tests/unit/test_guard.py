"""The guard on a step's loss and gradient: what it objects to, from the first step on, and what it lets pass."""

import json
import math
import random

import pytest

from flexpert.train.guard import WINDOW, Guard


def trained(seed: int, steps: int, threshold: float | None = 10.0) -> Guard:
    """After steps of a loss that falls from ln V with noise, none of which it may object to."""
    guard, chooser = Guard(threshold, 50_000), random.Random(seed)
    for step in range(steps):
        loss = 3 + 7.8 * math.exp(-step / 50) + chooser.gauss(0, 0.1)
        norm = math.exp(chooser.gauss(0, 0.4))
        assert guard.objection(loss, norm) is None, step
        guard.accept(loss, norm)
    return guard


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_training_is_left_alone(seed: int) -> None:
    trained(seed, 400)


def test_the_first_step_is_judged_too() -> None:
    said = "loss 17 is 12.4 robust standard deviations above 10.82 (train.spike_threshold=10)"
    assert Guard(10.0, 50_000).objection(17.0, 1.0) == said
    assert Guard(10.0, 50_000).objection(13.0, 1.0) is None  # badly initialised, no spike
    assert Guard(10.0, 50_000).objection(2.0, 1.0) is None  # an expert begins where its base is


@pytest.mark.parametrize("steps", [1, 3, 30, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_taken(steps: int, value: float) -> None:
    for threshold in (10.0, None):
        guard = trained(0, steps, threshold)
        before = guard.state()
        assert guard.objection(value, 1.0) == guard.objection(3.0, value) == "loss or gradient is not finite"
        assert guard.state() == before


@pytest.mark.parametrize("steps", [3, 30, 300])
def test_a_spike_of_loss_or_gradient_is_named_and_leaves_no_trace(steps: int) -> None:
    guard = trained(0, steps)
    before = guard.state()
    usual = guard.deviation("loss", 0.0)[1]
    assert str(guard.objection(usual + 8, 1.0)).startswith(f"loss {usual + 8:.4g} is ")
    assert str(guard.objection(usual, 1e6)).startswith("gradient norm 1e+06 is ")
    assert guard.objection(usual, 1.0) is None
    assert guard.objection(0.0, 1e-9) is None, "only what is above counts"
    assert guard.state() == before, "what was not taken does not count"


def test_without_a_threshold_any_finite_step_is_taken() -> None:
    assert trained(0, 100, threshold=None).objection(1e9, 1e30) is None


def test_spikes_do_not_move_what_they_are_compared_with() -> None:
    """A mean and standard deviation would have let the third of them pass."""
    guard = trained(0, 300)
    assert all(guard.objection(11.0, 1.0) for _ in range(WINDOW))


def test_its_state_goes_through_a_checkpoint_unchanged() -> None:
    guard, other = trained(0, 300), Guard(10.0, 50_000)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    for loss, norm in ((3.4, 2.0), (3.7, 20.0), (4.6, 1.0)):
        assert other.objection(loss, norm) == guard.objection(loss, norm)
