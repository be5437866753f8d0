"""Budgets are the exact minimiser, sum to the total within their bounds; parts hold whole groups, balanced."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.allocation import (
    allocate,
    contiguous_parts,
    optimal_total,
    rounded_total,
    spread_parts,
)

# --- allocate --------------------------------------------------------------------------------------------------------


def greedy(weights: list[float], total: int, low: int, high: int) -> list[int]:
    """Unit by unit, to the prompt whose term falls most; ties to the lower index."""
    budgets = [low] * len(weights)
    heap = [(-weight / (low * (low + 1)), prompt) for prompt, weight in enumerate(weights) if low < high]
    heapq.heapify(heap)
    for _ in range(total - low * len(weights)):
        _, prompt = heapq.heappop(heap)
        budgets[prompt] += 1
        m = budgets[prompt]
        if m < high:
            heapq.heappush(heap, (-weights[prompt] / (m * (m + 1)), prompt))
    return budgets


# From 1e-9: the steps of smaller ones are not normal floats, so they tie and their order is lost.
weights_of = st.floats(1e-9, 1e6) | st.sampled_from([0.0, 1.0, 2.0, 6.0])  # equal ones often, for ties
problems = st.tuples(
    st.lists(weights_of, min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 9), st.floats(0, 1)
).map(lambda p: (p[0], p[1] * len(p[0]) + round(p[3] * p[2] * len(p[0])), p[1], p[1] + p[2]))


@settings(max_examples=300)
@given(problems)
def test_budgets_are_those_of_the_greedy_loop_and_sum_to_the_total_within_bounds(problem):
    weights, total, low, high = problem
    budgets = allocate(weights, total, low, high)
    assert budgets.dtype == np.int64
    assert budgets.sum() == total
    assert low <= budgets.min() <= budgets.max() <= high
    assert budgets.tolist() == greedy(weights, total, low, high)


@settings(max_examples=60)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 12))
def test_no_other_budgets_are_better(weights, low, width, extra):
    high = low + width
    total = low * len(weights) + min(extra, width * len(weights))
    budgets = allocate(weights, total, low, high)
    values = [
        sum(w / m for w, m in zip(weights, choice, strict=True))
        for choice in itertools.product(range(low, high + 1), repeat=len(weights))
        if sum(choice) == total
    ]
    assert sum(weights / budgets) == pytest.approx(min(values), rel=1e-12, abs=1e-300)


def test_large_problems_are_those_of_the_greedy_loop():
    rng = np.random.default_rng(0)
    weights = rng.lognormal(sigma=0.8, size=3000)
    weights[rng.integers(0, 3000, size=800)] = 0.5
    for total in (24_001, 33_333, 47_999):
        assert allocate(weights, total, 8, 16).tolist() == greedy(weights.tolist(), total, 8, 16)


@given(problems, st.floats(1e-3, 1e3))
def test_heavier_prompts_get_no_fewer_and_only_ratios_matter(problem, scale):
    weights, total, low, high = problem
    budgets = allocate(weights, total, low, high)
    heavier_first = np.argsort(-np.array(weights), kind="stable")
    assert (np.diff(budgets[heavier_first]) <= 0).all() or len(set(weights)) < len(weights)
    exact = 2.0 ** round(np.log2(scale))  # no rounding
    assert allocate(np.array(weights) * exact, total, low, high).tolist() == budgets.tolist()


def test_equal_weights_give_uniform_budgets_to_the_first():
    assert allocate(np.full(5, 3.0), 42, 8, 16).tolist() == [9, 9, 8, 8, 8]
    assert allocate([], 0, 8, 16).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, -1.0], 20, 8, 16), r"weights\[1\]=-1.0"),
        (([1.0, float("nan")], 20, 8, 16), r"weights\[1\]=nan"),
        (([1.0, float("inf")], 20, 8, 16), r"weights\[1\]=inf"),
        (([[1.0]], 8, 8, 16), "one weight per prompt"),
        (([1.0, 1.0], 15, 8, 16), "total=15: 2 prompts with low=8 and high=16 take 16 to 32"),
        (([1.0, 1.0], 33, 8, 16), "total=33"),
        (([], 1, 8, 16), "total=1: 0 prompts"),
        (([1.0], 8.5, 8, 16), "total=8.5: must be a whole number"),
        (([1.0], 8, 0, 16), "low=0, high=16"),
        (([1.0], 8, 9, 8), "low=9, high=8"),
    ],
)
def test_impossible_allocations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


# --- the total -------------------------------------------------------------------------------------------------------

GIVEN = {"seconds": [1.0, 1.02, 1.2], "base_seconds": 1.0, "group_size": 8, "variation": 0.6}


@settings(max_examples=200)
@given(
    st.integers(1, 60),
    st.integers(2, 10),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
    st.floats(0, 3),
    st.floats(0, 5),
)
def test_the_total_maximises_the_utility(num_prompts, low, seconds, variation, cost_weight):
    """Brute force over every total."""
    high = low + len(seconds) - 1
    given_ = {"seconds": seconds, "base_seconds": seconds[0], "group_size": low, "variation": variation}
    best = optimal_total(num_prompts, low, high, cost_weight=cost_weight, **given_)
    totals = np.arange(low * num_prompts, high * num_prompts + 1)
    means = totals / num_prompts
    gain = variation * (1 - low / means)
    cost = np.interp(means, range(low, high + 1), seconds) / seconds[0] - 1
    utility = gain - cost_weight * cost
    assert best.utility == pytest.approx(utility.max(), rel=1e-9, abs=1e-12)
    assert best.utility == pytest.approx(best.gain - cost_weight * best.cost, abs=1e-12)
    assert utility[best.total - totals[0]] == pytest.approx(utility.max(), rel=1e-9, abs=1e-12)


def test_a_flat_curve_takes_all_and_a_large_weight_none():
    flat = GIVEN | {"seconds": [1.0, 1.0, 1.0]}
    assert optimal_total(10, 8, 10, **flat).total == 100
    assert optimal_total(10, 8, 10, cost_weight=0, **GIVEN).total == 100
    assert optimal_total(10, 8, 10, cost_weight=1e6, **GIVEN).total == 80
    assert optimal_total(10, 8, 10, **GIVEN | {"variation": 0.0}).total == 80, "nothing to shape; ties to the smaller"
    assert optimal_total(10, 8, 8, **GIVEN | {"seconds": [1.0]}).total == 80
    assert optimal_total(0, 8, 10, **GIVEN).total == 0


def test_the_total_lies_between_whole_means_where_the_utility_peaks_there():
    """E' = 0.6 x 8 / m^2 falls to the slope 0.054 at m = 9.43."""
    best = optimal_total(1000, 8, 10, cost_weight=0.3, **GIVEN)
    assert best.total == pytest.approx(1000 * np.sqrt(0.6 * 8 / (0.3 * 0.18)), abs=1)
    mean = best.total / 1000
    gain, cost = 0.6 * (1 - 8 / mean), np.interp(mean, [8, 9, 10], GIVEN["seconds"]) - 1
    assert (best.gain, best.cost) == (pytest.approx(gain), pytest.approx(cost))
    asked = optimal_total(1000, 8, 10, cost_weight=0.3, total=8500, **GIVEN)
    assert asked == pytest.approx((8500, 0.6 * (1 - 8 / 8.5) - 0.3 * 0.01, 0.6 * (1 - 8 / 8.5), 0.01))
    assert asked.utility < best.utility


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": [1.0, 1.0]}, "seconds: 2 values, must be 3"),
        ({"seconds": [1.0, -1.0, 1.0]}, "seconds=-1.0"),
        ({"seconds": [1.0, float("nan"), 1.0]}, "seconds=nan"),
        ({"base_seconds": 0.0}, "base_seconds=0.0"),
        ({"variation": float("nan")}, "variation=nan"),
        ({"cost_weight": -1.0}, "cost_weight=-1.0"),
        ({"cost_weight": float("nan")}, "cost_weight=nan"),
        ({"total": 41}, r"total=41: must lie in \[32, 40\]"),
    ],
)
def test_impossible_terms_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        optimal_total(4, 8, 10, **GIVEN | changes)


def test_a_negative_number_of_prompts_is_refused():
    with pytest.raises(ValueError, match="num_prompts=-1"):
        optimal_total(-1, 8, 10, **GIVEN)


# --- uniform budgets -------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 16), st.integers(0, 16), st.floats(0, 1))
def test_equal_weights_give_even_budgets_that_sum_to_the_rounded_total(num_prompts, low, width, share):
    high = low + width
    mean = low + share * width
    budgets = allocate(np.ones(num_prompts), rounded_total(num_prompts, mean), low, high)
    assert len(budgets) == num_prompts
    assert budgets.sum() == np.floor(mean * num_prompts + 0.5)
    if num_prompts:
        assert low <= budgets.min() <= budgets.max() <= high
        assert budgets.max() - budgets.min() <= 1


def test_half_a_candidate_gives_half_of_the_prompts_one_more():
    assert allocate(np.ones(8), rounded_total(8, 10.5), 8, 16).tolist() == [11, 11, 11, 11, 10, 10, 10, 10]


# --- parts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 16), max_size=60), st.integers(1, 70))
def test_parts_hold_every_prompt_once_in_order_and_are_balanced(budgets, num_parts):
    budgets = np.array(budgets, dtype=np.int64)
    parts = contiguous_parts(budgets, num_parts)
    assert len(parts) <= num_parts
    assert [i for part in parts for i in part] == list(range(len(budgets)))
    assert all(len(part) for part in parts)
    for part in parts:
        assert budgets[part].sum() <= budgets.sum() / num_parts + budgets.max()


def test_equal_prompts_split_equally():
    parts = contiguous_parts(np.full(256, 12), 8)
    assert [len(part) for part in parts] == [32] * 8


@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 70))
def test_spread_parts_hold_every_prompt_once_balanced_and_start_with_the_heaviest(work, num_parts):
    parts = spread_parts(work, num_parts)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(work)))
    assert all(len(part) for part in parts)
    assert len(parts) == min(num_parts, len(work))
    for part in parts:
        loads = np.array(work)[part]
        assert (np.diff(loads) <= 0).all()
        assert loads.sum() <= sum(work) / num_parts + max(work) + 1e-6


def test_the_heaviest_prompts_go_to_different_parts():
    parts = spread_parts([1, 90, 1, 80, 70, 1, 1, 1], 3)
    assert sorted(part[0] for part in parts) == [1, 3, 4]


@pytest.mark.parametrize("split", [lambda n: contiguous_parts(np.array([1]), n), lambda n: spread_parts([1.0], n)])
def test_no_part_is_refused(split):
    with pytest.raises(ValueError, match="num_parts=0"):
        split(0)


@pytest.mark.parametrize("work", [-1.0, float("nan")])
def test_impossible_work_is_refused(work):
    with pytest.raises(ValueError, match=f"work={work}"):
        spread_parts([1.0, work], 2)
