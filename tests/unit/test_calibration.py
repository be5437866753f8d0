"""Early stop hides tails: the correction is learnt from full groups, and stopped prompts keep their budget."""

import json
import math

import numpy as np
import pytest
from pools import pool_of

from darts.calibration import MOST, WEIGHT, StopCorrection
from darts.config import DartsConfig
from darts.history import LengthHistory, censored_std
from darts.latency import StepTimes
from darts.planning import RolloutPlanner

LOW, HIGH = 8, 12


def heavy_tailed(rng, count: int) -> np.ndarray:
    """Half of the responses are short, the others longer by a geometric number of tokens."""
    return np.where(rng.random(count) < 0.5, rng.integers(5, 15, size=count), rng.geometric(0.01, size=count) + 15)


def stopped(lengths: np.ndarray) -> tuple[list[int], list[bool]]:
    """What is seen of a group that early stop ends at its 8th."""
    end = np.sort(lengths)[LOW - 1]
    return np.minimum(lengths, end).tolist(), (lengths > end).tolist()


def test_stopped_prompts_are_not_taken_for_even_ones():
    """All prompts have the same distribution; half of them are stopped in every step."""
    rng, keys = np.random.default_rng(0), [f"prompt {number}" for number in range(200)]
    planner = RolloutPlanner(ema_weight=0.3, response_length=10_000)
    darts = DartsConfig.from_block({"allocation": {"mode": "uniform", "mean_candidates": HIGH}}, LOW)
    for _ in range(6):
        lengths, fates = [], []
        for number in range(len(keys)):
            row = heavy_tailed(rng, HIGH)
            seen, censored = stopped(row) if number % 2 else (row.tolist(), [False] * HIGH)
            lengths.append(seen)
            fates.append("".join("a" if hidden else "k" for hidden in censored))
        plan = planner.plan(keys, darts)
        _, metrics = planner.observe(plan, darts, pool_of(lengths, fates), 1.0, StepTimes())
    full, cut = (np.sqrt(np.mean([planner.history.std(key) ** 2 for key in keys[start::2]])) for start in (0, 1))
    assert metrics["darts/history/stop_correction"] == planner.correction.factor > 1.2
    assert cut == pytest.approx(full, rel=0.1)
    assert cut / planner.correction.factor < 0.8 * full, "what it would be without"


def test_the_factor_is_the_ratio_of_moving_means():
    rng, correction = np.random.default_rng(1), StopCorrection()
    assert correction.factor == 1.0
    means = []
    for _ in range(2):
        groups = [heavy_tailed(rng, HIGH) for _ in range(30)]
        correction.learn(groups, LOW)
        estimates = [censored_std(*stopped(group)) ** 2 for group in groups]
        means.append([np.mean([group.var() for group in groups]), np.mean(estimates)])
    first, second = np.array(means)
    truth, estimate = first + WEIGHT * (second - first)
    assert correction.factor == pytest.approx(np.sqrt(truth / estimate))
    assert correction.state_dict() == pytest.approx([truth, estimate])


def test_groups_that_early_stop_would_not_cut_say_nothing():
    correction = StopCorrection()
    correction.learn([], LOW)
    correction.learn([np.arange(1, LOW + 1)], LOW)
    assert correction.state_dict() is None
    correction.learn([np.full(HIGH, 7)], LOW)
    assert correction.factor == 1.0, "equal lengths: nothing to divide by"


def test_the_factor_is_bounded():
    correction = StopCorrection()
    correction.load_state_dict([100.0, 1.0])
    assert correction.factor == MOST
    correction.load_state_dict([1.0, 100.0])
    assert correction.factor == 1 / MOST


def test_state_round_trips_and_bad_ones_are_refused():
    correction, again = StopCorrection(), StopCorrection()
    correction.learn([heavy_tailed(np.random.default_rng(2), HIGH)], LOW)
    again.load_state_dict(json.loads(json.dumps(correction.state_dict())))
    assert again.factor == correction.factor
    for bad in ([1.0], [1.0, -1.0], [1.0, math.nan], "ab", {}):
        with pytest.raises(ValueError, match="correction="):
            again.load_state_dict(bad)
    assert again.factor == correction.factor
    again.load_state_dict(None)
    assert again.factor == 1.0


def test_a_correction_scales_the_spread_of_its_observation_alone():
    plain, corrected = LengthHistory(), LengthHistory()
    for lengths_of, factor in ((plain, 1.0), (corrected, 2.0)):
        lengths_of.update("a", [10, 20, 30], [False, False, True], factor)
        lengths_of.update("b", [10, 20, 30], [False, False, True])
    assert corrected.std("a") == pytest.approx(2 * plain.std("a"))
    assert corrected.std("b") == plain.std("b")
    assert corrected.mean("a") == plain.mean("a")
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="correction="):
            plain.update("a", [1], [False], wrong)
