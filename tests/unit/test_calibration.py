"""What a model of lengths misses is learnt from full groups, by depth, and stopped prompts keep their budget."""

import json
import math

import numpy as np
import pytest
from pools import pool_of

from darts.censoring import LengthModel
from darts.config import DartsConfig
from darts.history import (
    CORRECTION_MEMORY,
    DEPTHS,
    EQUAL_GROUPS,
    MAX_CORRECTION,
    LengthHistory,
    StopCorrection,
    censored_std,
)
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


def planner_and_settings(**selection) -> tuple[RolloutPlanner, DartsConfig]:
    block = {"allocation": {"mode": "uniform", "mean_candidates": 10, "high": 12}, "selection": selection}
    return RolloutPlanner(ema_weight=0.3, response_length=10_000), DartsConfig.from_block(block, LOW)


@pytest.mark.parametrize("high", [12, 16])
def test_stopped_prompts_are_not_taken_for_even_ones(high):
    """All prompts have the same distribution; a third has M_up candidates and is stopped, the others end."""
    rng, count = np.random.default_rng(0), 300
    model, correction, history = LengthModel(), StopCorrection(), LengthHistory()
    for _ in range(8):
        full = [heavy_tailed(rng, int(rng.integers(LOW + 1, high))) for _ in range(2 * count)]
        short = [stopped(heavy_tailed(rng, high)) for _ in range(count)]
        means, stds = model.observe([*[(lengths, [False] * len(lengths)) for lengths in full], *short])
        correction.learn(full, model)
        mean_factor, std_factor = (factors[0] for factors in correction.factors([LOW / high]))
        for number, lengths in enumerate(full):
            history.update(f"full {number}", lengths, np.zeros(len(lengths), dtype=bool))
        for number in range(count):
            moments = means[2 * count + number] * mean_factor, stds[2 * count + number] * std_factor
            history.update(f"stopped {number}", *short[number], moments)

    def typical(kind: str, number: int) -> tuple[float, float]:
        keys = [f"{kind} {place}" for place in range(number)]
        return math.sqrt(np.mean([history.std(key) ** 2 for key in keys])), np.mean([history.mean(key) for key in keys])

    assert typical("stopped", count) == pytest.approx(typical("full", 2 * count), rel=0.1)
    assert abs(std_factor - 1) > 0.05, "the model alone would not do"


def test_the_planner_learns_from_full_groups_and_corrects_stopped_ones_at_their_depth():
    planner, darts = planner_and_settings()
    rng, model, same = np.random.default_rng(0), LengthModel(), StopCorrection()
    rows = [heavy_tailed(rng, 10) for _ in range(40)]
    seen = [*[(row.tolist(), [False] * 10) for row in rows[:38]], stopped(rows[38], 4), stopped(rows[39], 8)]
    fates = ["".join("a" if hidden else "k" for hidden in censored) for _, censored in seen]
    plan = planner.plan([str(number) for number in range(40)], darts)
    pool = pool_of([lengths for lengths, _ in seen], fates)
    observed, metrics = planner.observe(plan, darts, pool, 1.0, StepTimes())
    means, stds = model.observe(seen)
    same.learn(rows[:38], model)
    depths = [1 - np.mean(censored) for _, censored in seen[38:]]
    assert depths[0] < 0.6 < depths[1] < 1
    mean_factors, std_factors = same.factors(depths)
    assert metrics["darts/history/stop_correction"] == pytest.approx(std_factors.mean())
    assert len({*mean_factors, *std_factors, 1.0}) == 5
    assert observed[38:] == pytest.approx(stds[38:] * std_factors)
    assert [planner.history.mean(key) for key in ("38", "39")] == pytest.approx(means[38:] * mean_factors)
    assert observed[0] == pytest.approx(rows[0].std())
    assert planner.correction.state_dict() == same.state_dict()


def test_groups_that_a_rule_might_have_ended_are_not_taken_for_full_ones():
    """They are full because they happened to be short."""
    rng = np.random.default_rng(0)
    untouched = StopCorrection().state_dict()
    for selection, is_learnt in (({}, True), ({"long_wait": "deadline"}, False), ({"mode": "shortest_only"}, False)):
        planner, darts = planner_and_settings(**selection)
        plan = planner.plan(["a", "b"], darts)
        pool = pool_of([heavy_tailed(rng, 10).tolist() for _ in range(2)])
        _, metrics = planner.observe(plan, darts, pool, 1.0, StepTimes())
        assert (planner.correction.state_dict() != untouched) == is_learnt
        assert metrics["darts/history/stop_correction"] == 1.0, "nothing was stopped"


def test_factors_are_ratios_of_moving_sums_at_each_depth_and_between_them():
    rng, correction, model = np.random.default_rng(1), StopCorrection(), LengthModel()
    ends = [2, 4, 6, 7, 8]  # of 10; halves are rounded to even ones
    sums = np.zeros((len(DEPTHS), 4))
    for _ in range(2):
        groups = [heavy_tailed(rng, 10) for _ in range(30)]
        correction.learn(groups, model)
        truth = np.mean([(group.mean(), group.var()) for group in groups], axis=0) * 30
        for place, ended in enumerate(ends):
            means, stds = model.moments([stopped(group, ended) for group in groups])
            new_sums = [truth[0], means.sum(), truth[1], (stds**2).sum()]
            sums[place] = CORRECTION_MEMORY * sums[place] + new_sums
    true_means, means, true_variances, variances = sums.T
    equal = EQUAL_GROUPS / (30 + CORRECTION_MEMORY * 30)
    mean_ratios = (true_means + equal * means) / ((1 + equal) * means)
    std_ratios = np.sqrt((true_variances + equal * variances) / ((1 + equal) * variances))
    mean_ratios, std_ratios = np.clip([mean_ratios, std_ratios], 1 / MAX_CORRECTION, MAX_CORRECTION)
    at_depths = correction.factors(DEPTHS)
    assert at_depths[0] == pytest.approx(mean_ratios)
    assert at_depths[1] == pytest.approx(std_ratios)
    between = correction.factors([0.0, 0.475, 0.925, 1.0])
    for factors, ratios in zip(between, (mean_ratios, std_ratios), strict=True):
        assert factors == pytest.approx([ratios[0], (ratios[1] + ratios[2]) / 2, (ratios[-1] + 1) / 2, 1])


def test_groups_that_tell_nothing_are_left_out():
    correction, model = StopCorrection(), LengthModel()
    before = correction.state_dict()
    for groups in ([], [np.array([3, 9])], [np.array([5])]):
        correction.learn(groups, model)
        assert correction.state_dict() == before, "nothing can be stopped"
    correction.learn([np.full(HIGH, 7)], model)
    assert all((factors == 1).all() for factors in correction.factors(DEPTHS)), "all end at once: none is stopped"
    correction.learn([np.zeros(HIGH, dtype=int)], model)
    assert all(np.isfinite(factors).all() for factors in correction.factors(DEPTHS))


def test_factors_are_bounded():
    correction = StopCorrection()
    for truth, estimate, bound in ((1e9, 1.0, MAX_CORRECTION), (0.0, 1e9, 1 / MAX_CORRECTION)):
        correction.load_state_dict([[1e9, truth, estimate, truth, estimate]] * len(DEPTHS))
        for factors in correction.factors([*DEPTHS, 1.0]):
            assert factors.tolist() == [bound] * len(DEPTHS) + [1.0]


def test_state_round_trips_and_bad_ones_are_refused():
    correction, again = StopCorrection(), StopCorrection()
    correction.learn([heavy_tailed(np.random.default_rng(2), HIGH)], LengthModel())
    state = json.loads(json.dumps(correction.state_dict()))
    again.load_state_dict(state)
    assert np.array_equal(again.factors(DEPTHS), correction.factors(DEPTHS))
    for bad in (
        [1.0],
        state[:-1],
        [*state[:-1], [1.0] * 4],
        [*state[:-1], [-1.0] * 5],
        [*state[:-1], [math.nan] * 5],
        {},
        None,
    ):
        with pytest.raises(ValueError, match="correction="):
            again.load_state_dict(bad)
    assert np.array_equal(again.factors(DEPTHS), correction.factors(DEPTHS))


def test_known_moments_take_the_place_of_those_of_the_observation_alone():
    plain, corrected = LengthHistory(), LengthHistory()
    lengths, censored = [10, 20, 30], [False, False, True]
    for past, moments in ((plain, None), (corrected, (25.0, 17.0))):
        past.update("a", lengths, censored, moments)
        past.update("b", lengths, censored)
    assert (corrected.mean("a"), corrected.std("a")) == pytest.approx((25.0, 17.0))
    assert (corrected.mean("b"), corrected.std("b")) == (plain.mean("b"), plain.std("b"))
    assert plain.std("a") == pytest.approx(censored_std(lengths, censored))
    assert corrected.update("a", lengths, censored, (0.0, 0.0)) == 0.0
    assert corrected.std("a") == pytest.approx(17.0), "nothing was seen"
    for wrong in ((-1.0, 1.0), (1.0, -1.0), (math.inf, 1.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="moments="):
            plain.update("a", [1], [False], wrong)
