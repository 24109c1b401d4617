import itertools
import math

import pytest

from grassland.train.config import LMConfig
from grassland.train.schedule import multiplier, total_steps


@pytest.mark.parametrize("step", [0, 4, 9])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_one(schedule, step):
    assert multiplier(step, 100, schedule, warmup=10, floor=0.1) == (step + 1) / 10


@pytest.mark.parametrize("step", [10, 33, 55, 99, 100])
def test_cosine_follows_its_formula(step):
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
    assert multiplier(step, 100, "cosine", warmup=10, floor=0.1) == pytest.approx(expected, abs=1e-15)


def test_wsd_is_stable_then_falls_linearly_to_the_floor():
    factors = [multiplier(step, 100, "wsd", warmup=10, decay=0.2, floor=0.1) for step in range(101)]
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[100] == pytest.approx(0.1)
    drops = [a - b for a, b in itertools.pairwise(factors[80:101])]
    assert drops == pytest.approx([0.9 / 20] * 20)


def test_linear_falls_from_the_end_of_the_warmup_to_the_floor():
    factors = [multiplier(step, 100, "linear", warmup=10, floor=0.1) for step in range(10, 101)]
    assert factors == pytest.approx([1 - 0.9 * step / 90 for step in range(91)])


def test_step_falls_to_a_tenth_at_each_milestone():
    factors = [multiplier(step, 100, "step", milestones=(0.3, 0.6, 0.9)) for step in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_constant_stays_after_the_warmup():
    assert {multiplier(step, 50, "constant", warmup=5) for step in range(5, 50)} == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_warmup_longer_than_the_run_never_passes_one(schedule):
    assert all(0 < multiplier(step, 10, schedule, warmup=20) <= 0.5 for step in range(10))


@pytest.mark.parametrize(
    "epochs, batches, accumulated, steps",
    [(1.1, 100.0, 1, 110), (100, 7 / 100, 1, 7), (1, 2.5, 1, 3), (1, 10.0, 4, 3), (1e-9, 10.0, 1, 1)],
)
def test_epochs_are_rounded_up_to_whole_steps_and_no_further(epochs, batches, accumulated, steps):
    config = LMConfig(epochs=epochs, grad_accum=accumulated)
    assert total_steps(config, batches) == steps


def test_more_epochs_than_there_can_be():
    with pytest.raises(ValueError, match="epochs must be fewer"):
        total_steps(LMConfig(epochs=1e308), 100.0)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'square'"):
        multiplier(0, 10, "square")
