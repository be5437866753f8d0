"""Stopped groups have the moments of whole ones, at any depth, for lengths of several kinds, also if none is whole."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.censoring import LEARNED_GROUPS, MAX_STRETCH, SHAPES, SPREADS, TAILS, LengthModel
from darts.history import censored_moments

KINDS = ["log-normal", "gamma"]
VARIATIONS = [0.3, 0.6, 1.0]


def drawn(rng, kind: str, variation: float, shape: tuple[int, ...]) -> np.ndarray:
    """Lengths of mean 1 and the given coefficient of variation."""
    if kind == "gamma":
        return rng.gamma(1 / variation**2, variation**2, shape)
    spread = math.sqrt(math.log(1 + variation**2))
    return np.exp(rng.normal(-(spread**2) / 2, spread, shape))


def stopped(lengths: np.ndarray, ended: int) -> tuple[np.ndarray, np.ndarray]:
    """What is known of a group when all that still run are stopped as so many have ended."""
    end = np.sort(lengths)[ended - 1]
    return np.minimum(lengths, end), lengths > end


def errors_by_depth(kind, variation, num_candidates, depths, num_rollouts, num_groups, seed=0):
    """Estimated over true mean and std of each depth, in the later half of some rollouts; prompts differ in length."""
    rng, model = np.random.default_rng(seed), LengthModel()
    by_depth = {depth: [] for depth in depths}
    for step in range(num_rollouts):
        scales = 800 * np.exp(rng.normal(0, 0.5, num_groups))
        groups = np.maximum(scales[:, None] * drawn(rng, kind, variation, (num_groups, num_candidates)), 1).round()
        group_depths = np.resize(depths, num_groups)
        means, stds = model.observe([stopped(*pair) for pair in zip(groups, group_depths, strict=True)])
        if step >= num_rollouts // 2:
            for depth, mean, std, scale in zip(group_depths, means, stds, scales, strict=True):
                by_depth[depth].append((mean / scale, (std / scale) ** 2))
    true_variance = variation**2 * (1 - 1 / num_candidates)
    moments = {depth: np.mean(pairs, axis=0) for depth, pairs in by_depth.items()}
    return {depth: (mean, math.sqrt(variance / true_variance)) for depth, (mean, variance) in moments.items()}


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_candidates", [pytest.param(12, marks=pytest.mark.slow), 16])
def test_groups_of_one_depth_have_the_moments_of_whole_ones_though_none_is_whole(kind, variation, num_candidates):
    """The shallower they are stopped, the more of them it takes: 4 of 16 show a quarter of the distribution."""
    for depth, num_rollouts, num_groups in ((11, 6, 150), (8, 6, 150), (4, 24, LEARNED_GROUPS)):
        errors = errors_by_depth(kind, variation, num_candidates, [depth], num_rollouts, num_groups)
        assert errors[depth] == pytest.approx((1, 1), rel=0.1)


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_candidates", "depths"), [(12, [4, 8, 11]), (16, [4, 8, 11, 16]), (12, [7, 8, 9, 10, 11])]
)
def test_groups_of_mixed_depths_have_the_moments_of_whole_ones_at_each(kind, variation, num_candidates, depths):
    for error in errors_by_depth(kind, variation, num_candidates, depths, 12, 60 * len(depths)).values():
        assert error == pytest.approx((1, 1), rel=0.1)


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folds", [0.0, 0.1, 0.5])
def test_groups_that_one_moment_stops_have_the_moments_of_whole_ones(kind, variation, folds):
    """A deadline for the batch, when the seventh of nine in ten groups has ended, of prompts alike or not."""
    rng, model, pairs = np.random.default_rng(1), LengthModel(), []
    for step in range(8):
        sizes, scales = rng.integers(9, 13, 128), 800 * np.exp(rng.normal(0, folds, 128))
        groups = [scale * drawn(rng, kind, variation, (size,)) for scale, size in zip(scales, sizes, strict=True)]
        deadline = np.quantile([np.sort(group)[6] for group in groups], 0.9)
        settled = [group for group in groups if np.sum(group <= deadline) >= 7]
        moments = model.observe([(np.minimum(group, deadline), group > deadline) for group in settled])
        if step >= 4:
            truth = [group.mean() for group in settled], [group.std() for group in settled]
            pairs += list(zip(*moments, *truth, strict=True))
    means, stds, true_means, true_stds = np.transpose(pairs)
    assert means.mean() == pytest.approx(true_means.mean(), rel=0.05)
    assert np.mean(stds**2) == pytest.approx(np.mean(true_stds**2), rel=0.15)


def test_a_model_follows_a_workload_that_becomes_another_one():
    rng, model, variances = np.random.default_rng(0), LengthModel(), []
    for step in range(32):
        groups = 800 * (drawn(rng, "log-normal", 1.0, (100, 12)) if step < 10 else drawn(rng, "gamma", 0.3, (100, 12)))
        variances.append(np.mean(model.observe([stopped(group, 8) for group in groups])[1] ** 2))
    stds = np.sqrt(np.divide(variances, 11 / 12)) / 800
    assert stds[5:10].mean() == pytest.approx(1.0, rel=0.1)
    assert stds[-5:].mean() == pytest.approx(0.3, rel=0.1)


def shape_functions(tail: float, spread: float):
    """Standardised log lengths; there the log density, and the moments 0 to 2 of what exceeds them."""
    logs = np.arange(-40, 40, 1e-3)
    skew = tail * spread
    with np.errstate(over="ignore"):
        exponents = (skew * logs - np.expm1(skew * logs)) / skew**2 if skew else -(logs**2) / 2
    log_density = exponents - np.log(np.sum(np.exp(np.maximum(exponents, -700))) * 1e-3)
    sums = [
        np.cumsum(np.exp(np.maximum(log_density + power * spread * logs, -700))[::-1])[::-1] * 1e-3
        for power in range(3)
    ]
    return logs, log_density, sums


def by_brute_force(lengths, censored):
    """The expected moments of a group alone, summed over every shape and a fine grid of locations."""
    values, flags = np.array(lengths) / max(lengths), np.array(censored)
    chances = np.exp(SHAPES.prior + SHAPES.guess)
    shape_shares = np.einsum("th,hs->ts", chances, SHAPES.populations) / chances.sum()
    totals, sums = np.zeros(2), np.zeros(2)
    for tail, shares in zip(TAILS, shape_shares, strict=True):
        for spread, share in zip(SPREADS, shares, strict=True):
            logs, log_density, (survival, first, second) = shape_functions(tail, spread)
            places = np.arange(-4, 6, 0.05 * spread)
            likelihood, squares, moved = np.zeros(len(places)), np.zeros(len(places)), np.zeros(len(places))
            total = np.zeros(len(places))
            for value, is_hidden in zip(values, flags, strict=True):
                place = (math.log(value) - places) / spread
                if not is_hidden:
                    likelihood += np.interp(place, logs, log_density) - math.log(spread)
                    total, squares = total + value, squares + value**2
                    continue
                above = np.maximum(np.interp(place, logs, survival), 1e-300)
                mean = np.exp(places) * np.interp(place, logs, first) / above
                square = np.exp(2 * places) * np.interp(place, logs, second) / above
                likelihood += np.log(above)
                total, squares, moved = total + mean, squares + square, moved + square - mean**2
            log_means = places + math.log(first[0])
            variances = squares / len(values) - (total**2 + moved) / len(values) ** 2
            for power, moments in ((1, total / len(values)), (2, variances)):
                weights = share * spread * np.exp(likelihood - power * log_means)
                weights[~np.isfinite(moments) | (likelihood < -600)] = 0
                totals[power - 1] += weights.sum()
                sums[power - 1] += (weights * np.nan_to_num(moments)).sum()
    mean, variance = sums / totals
    return max(lengths) * mean, max(lengths) * math.sqrt(variance)


@pytest.mark.parametrize(
    ("lengths", "censored"),
    [([640, 700, 790, 800, 800, 800], [False] * 3 + [True] * 3), ([300, 800, 500, 700], [False] * 3 + [True]),
     ([100, 400, 900, 2000, 1500, 700, 90], [False] * 4 + [True] * 3)],
)  # fmt: skip
def test_moments_are_those_of_brute_force(lengths, censored):
    means, stds = LengthModel().moments([(lengths, censored)])
    assert (means[0], stds[0]) == pytest.approx(by_brute_force(lengths, censored), rel=3e-3)
    assert (means[0], stds[0]) == censored_moments(lengths, censored)


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def rollouts(draw):
    """Observations of a rollout: anything, also lengths of 0 and groups of which nothing is known."""
    lengths = st.integers(0, 8192) | st.sampled_from([0, 1, 300, 8192])
    group = st.lists(st.tuples(lengths, st.booleans()), min_size=1, max_size=12)
    groups = draw(st.lists(group, max_size=5))
    return [tuple(zip(*pairs, strict=True)) for pairs in groups]


@settings(max_examples=40)
@given(st.lists(rollouts(), max_size=3), rollouts())
def test_moments_are_sensible_for_anything_after_anything(earlier, rollout):
    model = LengthModel()
    for observations in earlier:
        model.observe(observations)
    for means, stds in (model.moments(rollout), model.observe(rollout)):
        assert means.shape == stds.shape == (len(rollout),)
        for (lengths, censored), mean, std in zip(rollout, means, stds, strict=True):
            known = [length for length, cut in zip(lengths, censored, strict=True) if length or not cut]
            assert np.mean(known or [0]) * (1 - 1e-9) <= mean <= MAX_STRETCH * max(lengths)
            assert 0 <= std <= MAX_STRETCH / 2 * max(lengths)
            if not any(censored):
                assert (mean, std) == (np.mean(lengths), np.std(lengths))
    assert np.isfinite(json.loads(json.dumps(model.state_dict()))["evidence"]).all()


@settings(max_examples=20)
@given(st.lists(rollouts(), min_size=1, max_size=3), st.floats(1e-3, 1e3))
def test_moments_scale_with_the_lengths_of_the_workload(steps, factor):
    model, scaled_model = LengthModel(), LengthModel()
    for observations in steps:
        moments = model.observe(observations)
        scaled = scaled_model.observe([(np.multiply(lengths, factor), censored) for lengths, censored in observations])
        for one, other in zip(moments, scaled, strict=True):
            assert other == pytest.approx(factor * one, rel=1e-5)


@settings(max_examples=20)
@given(rollouts(), st.randoms())
def test_the_order_of_groups_does_not_matter(rollout, random):
    order = list(range(len(rollout)))
    random.shuffle(order)
    moments = LengthModel().observe(rollout)
    shuffled = LengthModel().observe([rollout[place] for place in order])
    for one, other in zip(moments, shuffled, strict=True):
        assert other == pytest.approx(one[order], rel=1e-7)


def test_a_group_alone_is_not_counted_twice():
    """What it says of its shape is in its moments; the model that learnt from it says no more of it."""
    observation = ([640, 700, 790, 800, 800, 800], [False] * 3 + [True] * 3)
    for moments in (LengthModel().observe([observation]), LengthModel().moments([observation])):
        assert (moments[0][0], moments[1][0]) == censored_moments(*observation)


def test_a_candidate_stopped_before_it_got_anywhere_says_nothing():
    """It began late; the others show how long it would have become."""
    lengths = [880, 950, 1000, 1040, 1130]
    means, stds = LengthModel().moments([(lengths, [False] * 5), ([*lengths, 3, 5], [False] * 5 + [True] * 2)])
    assert means[1] == pytest.approx(means[0], rel=0.03)
    assert stds[1] == pytest.approx(stds[0], rel=0.5)


@pytest.mark.parametrize("num_ended", [0, 1, 2])
def test_where_nearly_all_are_stopped_the_workload_says_how_long_they_would_become(num_ended):
    """Not this group's few lengths: no estimate explodes, and none stays at the bound."""
    rng, model = np.random.default_rng(0), LengthModel()
    for _ in range(4):
        groups = 800 * drawn(rng, "log-normal", 0.6, (100, 16))
        model.observe([stopped(group, 12) for group in groups])
    bounds = np.sort(800 * drawn(rng, "log-normal", 0.6, (100, 16)), axis=1)[:, num_ended, None]
    groups = [np.append(np.full(num_ended, 0.9 * bound), np.full(16 - num_ended, bound)) for bound in bounds[:, 0]]
    means, stds = model.moments([(lengths, np.arange(16) >= num_ended) for lengths in groups])
    assert (means > 1.3 * bounds[:, 0]).all()
    assert means.max() < 2 * 800
    assert stds.max() < 2 * 0.6 * 800


def test_a_model_that_loads_the_state_goes_on_as_the_saved_one():
    rng, first, second = np.random.default_rng(0), LengthModel(), LengthModel()
    for step in range(4):
        observations = [stopped(group, 8) for group in 800 * drawn(rng, "gamma", 0.6, (20, 12))]
        if step == 2:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        moments = first.observe(observations)
        if step >= 2:
            assert np.array_equal(moments, second.observe(observations))
    assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


def test_a_state_that_cannot_be_used_is_refused_and_changes_nothing():
    model = LengthModel()
    model.observe([([100, 300, 200], [False] * 3)])
    good = model.state_dict()
    changes = [
        *({"evidence": value} for value in ([[0.0]], None, "ab", (np.array(good["evidence"]) * math.nan).tolist())),
        *({"known": value} for value in (-1.0, None, [1.0], math.inf)),
        *({"centers": value} for value in ([1.0], [1.0, 0.0], [1.0, math.nan], "ab", 5.0)),
    ]
    for bad in (*(good | change for change in changes), {}, None, [], {"evidence": good["evidence"]}):
        with pytest.raises(ValueError, match="length model="):
            model.load_state_dict(bad)
    assert model.state_dict() == good
    untouched = LengthModel().state_dict()
    model.load_state_dict(untouched)
    assert model.state_dict() == untouched
