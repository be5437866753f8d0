"""Early stop hides tails: the correction is learnt from full groups, and stopped prompts keep their budget."""

import json
import math

import numpy as np
import pytest
from pools import pool_of

from darts.config import DartsConfig
from darts.history import CORRECTION_WEIGHT, MAX_CORRECTION, LengthHistory, StopCorrection, censored_std
from darts.latency import StepTimes
from darts.planning import RolloutPlanner

LOW, HIGH = 8, 12


def heavy_tailed(rng, count: int) -> np.ndarray:
    """Half of the responses are short, the others longer by a geometric number of tokens."""
    return np.where(rng.random(count) < 0.5, rng.integers(5, 15, size=count), rng.geometric(0.01, size=count) + 15)


def stopped(lengths: np.ndarray, ended: int = LOW) -> tuple[list[int], list[bool]]:
    """What is seen of a group that early stop ends after its 8th, or another."""
    end = np.sort(lengths)[ended - 1]
    return np.minimum(lengths, end).tolist(), (lengths > end).tolist()


@pytest.mark.parametrize("high", [12, 16])
def test_stopped_prompts_are_not_taken_for_even_ones(high):
    """All prompts have the same distribution; a third has M_up candidates and is stopped, the others end."""
    rng, count = np.random.default_rng(0), 300
    correction, history = StopCorrection(), LengthHistory()
    for _ in range(4):
        full = [heavy_tailed(rng, int(rng.integers(LOW + 1, high))) for _ in range(2 * count)]
        correction.learn(full, LOW, high)
        for number, lengths in enumerate(full):
            history.update(f"full {number}", lengths, np.zeros(len(lengths), dtype=bool))
        for number in range(count):
            history.update(f"stopped {number}", *stopped(heavy_tailed(rng, high)), correction.factor)

    def typical(kind: str, number: int) -> float:
        return np.sqrt(np.mean([history.std(f"{kind} {n}") ** 2 for n in range(number)]))

    assert correction.factor > 1.4
    assert typical("stopped", count) == pytest.approx(typical("full", 2 * count), rel=0.2)
    assert typical("stopped", count) / correction.factor < 0.75 * typical("full", 2 * count), "what it would be without"


def test_the_planner_learns_from_full_groups_and_corrects_stopped_ones():
    planner = RolloutPlanner(ema_weight=0.3, response_length=10_000)
    darts = DartsConfig.from_block({"allocation": {"mode": "uniform", "mean_candidates": 10, "high": 12}}, LOW)
    rng, same = np.random.default_rng(0), StopCorrection()
    rows = [heavy_tailed(rng, 10) for _ in range(20)]
    cut, censored = stopped(rows[-1])
    fates = ["k" * 10] * 19 + ["".join("a" if hidden else "k" for hidden in censored)]
    plan = planner.plan([str(number) for number in range(20)], darts)
    pool = pool_of([*[row.tolist() for row in rows[:-1]], cut], fates)
    observed, metrics = planner.observe(plan, darts, pool, 1.0, StepTimes())
    same.learn(rows[:-1], LOW, 12)
    assert metrics["darts/history/stop_correction"] == planner.correction.factor == same.factor != 1
    assert observed[-1] == pytest.approx(censored_std(cut, censored) * same.factor)
    assert observed[0] == pytest.approx(rows[0].std())


def test_the_factor_is_the_root_of_the_ratio_of_moving_means_at_the_depth_of_early_stop():
    rng, correction = np.random.default_rng(1), StopCorrection()
    assert correction.factor == 1.0
    means = []
    for _ in range(2):
        groups = [heavy_tailed(rng, 9) for _ in range(30)]
        correction.learn(groups, LOW, HIGH)
        estimates = [censored_std(*stopped(group, 6)) ** 2 for group in groups]  # 6 of 9 are 8 of 12
        means.append([np.mean([group.var() for group in groups]), np.mean(estimates)])
    first, second = np.array(means)
    truth, estimate = first + CORRECTION_WEIGHT * (second - first)
    assert correction.factor == pytest.approx(np.sqrt(truth / estimate))
    assert correction.state_dict() == pytest.approx([truth, estimate])


def test_groups_that_tell_nothing_are_left_out():
    correction = StopCorrection()
    correction.learn([], LOW, HIGH)
    correction.learn([np.arange(1, LOW + 1)], LOW, LOW)
    assert correction.state_dict() is None, "nothing is ever stopped"
    correction.learn([np.full(HIGH, 7)], LOW, HIGH)
    assert correction.factor == 1.0, "equal lengths: nothing to divide by"


def test_the_factor_is_bounded():
    correction = StopCorrection()
    correction.load_state_dict([100.0, 1.0])
    assert correction.factor == MAX_CORRECTION
    correction.load_state_dict([1.0, 100.0])
    assert correction.factor == 1 / MAX_CORRECTION


def test_state_round_trips_and_bad_ones_are_refused():
    correction, again = StopCorrection(), StopCorrection()
    correction.learn([heavy_tailed(np.random.default_rng(2), HIGH)], LOW, HIGH)
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
