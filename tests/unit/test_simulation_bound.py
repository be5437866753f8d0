"""No rollout is faster than the bound: every assignment, choice and batch of small cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.latency import LatencyCurve, makespan
from darts.simulation.bound import Throughput, shortest


def curves():
    return st.lists(st.floats(0.1, 4.0), min_size=4, max_size=4).map(lambda s: LatencyCurve([1, 2, 3, 5], s))


@settings(max_examples=60)
@given(curves(), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 2), st.integers(1, 3))
def test_no_assignment_to_engines_in_any_order_is_faster(curve, lengths, engines, slots):
    best = min(
        makespan([[length for length, engine in zip(order, where, strict=True) if engine == e] for e in range(engines)],
                 curve, slots)
        for order in set(itertools.permutations(lengths))
        for where in itertools.product(range(engines), repeat=len(lengths))
    )  # fmt: skip
    bound = Throughput(curve, engines, slots).least_seconds(lengths)
    assert bound <= best * (1 + 1e-9)
    assert bound >= max(lengths) * curve(1) * (1 - 1e-9)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=5, max_size=5), st.integers(1, 4), curves())
def test_no_choice_of_candidates_is_faster_than_the_shortest(lengths, num_keep, curve):
    throughput = Throughput(curve, 2, 3)
    bound = throughput.least_seconds(shortest(np.array([lengths]), num_keep))
    for chosen in itertools.combinations(lengths, num_keep):
        assert bound <= throughput.least_seconds(chosen) * (1 + 1e-9)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=6, max_size=6), curves())
def test_no_batches_are_faster_than_the_oracles_own(kept, curve):
    throughput, kept = Throughput(curve, 2, 2), np.array(kept)
    bound = throughput.least_seconds_of(kept, num_prompts=2)
    for order in itertools.permutations(range(6)):
        batches = [kept[list(order[first : first + 2])] for first in (0, 2, 4)]
        assert bound <= sum(map(throughput.least_seconds, batches)) * (1 + 1e-9)


def test_the_bound_of_batches_is_reached_where_the_longest_alone_count():
    """Batches (9, 8) and (3, 2), each on engines of their own: 9 + 3; as they stand, 9 + 8."""
    throughput = Throughput(LatencyCurve([1, 2], [1.0, 1.0]), 8, 8)
    kept = np.array([[9], [3], [8], [2]])
    assert throughput.least_seconds_of(kept, num_prompts=2) == 12.0


def test_the_bound_is_reached_where_nothing_is_uneven():
    curve = LatencyCurve([1, 4], [1.0, 2.0])
    throughput = Throughput(curve, 3, 4)
    assert throughput.least_seconds([50]) == 50.0
    assert throughput.least_seconds([50] * 12) == makespan([[50] * 4] * 3, curve) == 100.0
    assert throughput.least_seconds([]) == 0.0
    # 100 tokens alone take 100 s; 12 x 10 tokens more need (100 + 120) / (3 x 2 a second) = 36.7 s.
    assert throughput.least_seconds([100] + [10] * 12) == 100.0


def test_a_curve_that_is_worst_in_the_middle():
    """PTL jumps at 2: an engine of 4 has 1 token a second, of 1 also; the best of 5 has 1.25."""
    throughput = Throughput(LatencyCurve([1, 2, 4, 5], [1.0, 4.0, 4.0, 4.0]), 1, 5)
    assert throughput([1, 2, 4, 5, 9]).tolist() == pytest.approx([1.0, 1.0625, 1.1875, 1.25, 1.25])
