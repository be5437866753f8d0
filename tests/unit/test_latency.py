"""The cost model against brute force: one engine step after the other, by the rules of the module's contract."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.latency import HALF_TRUST_STEPS, LARGEST_RATIO, LatencyCurve, StepTimes, makespan, rollout_time

GPU = LatencyCurve([1, 2, 4, 8, 16, 32, 64], [1.0, 1.1, 1.2, 1.4, 1.8, 2.6, 4.2])
MANY = 10**9
"""Steps that make an observation count in full."""

milliseconds = st.floats(0.1, 100.0)
lengths = st.lists(st.integers(0, 30), max_size=12)
slots = st.none() | st.integers(1, 14)


@st.composite
def points(draw):
    sizes = draw(st.lists(st.integers(1, 512), min_size=2, max_size=8, unique=True))
    return sizes, draw(st.lists(milliseconds, min_size=len(sizes), max_size=len(sizes)))


curves = points().map(lambda both: LatencyCurve(*both))


def rising(both):
    """The same points, as a curve without noise would have them."""
    return sorted(both[0]), sorted(both[1])


def steps(*seen):
    times = StepTimes()
    for running, seconds, count in seen:
        times.add(running, seconds * count, count)
    return times


# --- the curve -------------------------------------------------------------------------------------------------------


@given(points())
def test_a_curve_never_falls_and_rising_points_stay_as_they_are(both):
    curve = LatencyCurve(*both)
    sizes = np.arange(1, 1200) / 2
    assert np.all(np.diff(curve(sizes)) >= -1e-9)
    assert curve.batch_sizes == tuple(sorted(both[0]))
    assert LatencyCurve(*rising(both)).seconds == tuple(sorted(both[1]))


@given(points())
def test_the_fit_is_the_nearest_of_all_that_never_fall(both):
    """Optimality of a projection onto a cone: what is left is orthogonal to the fit, and to no rising step positive."""
    sizes, seconds = both
    measured = np.array(seconds)[np.argsort(sizes)]
    fitted = np.array(LatencyCurve(sizes, seconds).seconds)
    left = measured - fitted
    assert left @ fitted == pytest.approx(0.0, abs=1e-6)
    assert left.sum() == pytest.approx(0.0, abs=1e-9)
    assert all(left[start:].sum() <= 1e-9 for start in range(len(left)))


@given(points(), st.floats(0, 1))
def test_between_two_points_it_is_linear(both, share):
    sizes, seconds = rising(both)
    curve = LatencyCurve(sizes, seconds)
    for n in range(len(sizes) - 1):
        between = sizes[n] + share * (sizes[n + 1] - sizes[n])
        assert curve(between) == pytest.approx(seconds[n] + share * (seconds[n + 1] - seconds[n]))


@given(points(), st.floats(0.01, 100))
def test_twice_as_slow_is_twice_the_curve(both, factor):
    sizes, seconds = both
    scaled = LatencyCurve(sizes, [factor * second for second in seconds])
    at = [1, 3, 77, 600]
    assert scaled(at) == pytest.approx(factor * LatencyCurve(sizes, seconds)(at))


def test_an_idle_engine_makes_no_step_and_below_the_first_point_is_its_value():
    curve = LatencyCurve([4, 8], [2.0, 3.0])
    assert (curve(0), curve(0.5), curve(1), curve(4)) == (0.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((2.0, 3.0), 7.0),  # the last slope goes on
        ((2.0, 2.0), 2.0),  # flat
        ((1.0, 8.0), 24.0),  # not 36: three times the sequences cost at most three steps
    ],
)
def test_beyond_the_last_point_the_slope_goes_on_up_to_proportional_growth(seconds, expected):
    assert LatencyCurve([4, 8], seconds)(24) == pytest.approx(expected)


@given(curves, st.integers(1, 8))
def test_beyond_the_last_point_a_multiple_of_the_sequences_costs_at_most_as_many_steps(curve, times):
    last = curve.batch_sizes[-1]
    assert curve(last) <= curve(times * last) <= times * curve(last) * (1 + 1e-9)


def test_an_array_gives_an_array_of_its_shape():
    answer = GPU(np.array([[0, 1], [2, 64]]))
    assert answer.tolist() == [[0.0, 1.0], [1.1, 4.2]]
    assert isinstance(GPU(np.int64(3)), float)
    assert GPU([]).tolist() == []


@given(curves)
def test_json_and_pickle_give_the_same_curve(curve):
    assert LatencyCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    assert pickle.loads(pickle.dumps(curve)) == curve
    assert curve != LatencyCurve(curve.batch_sizes, [1 + second for second in curve.seconds])
    assert curve != "curve"


def test_it_shows_its_points():
    assert repr(LatencyCurve([1, 32], [0.002, 0.00333])) == "LatencyCurve(1: 2 ms, 32: 3.33 ms)"


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ([], [], r"batch_sizes=\[\]: a curve needs at least 2 points"),
        ([4], [1.0], r"batch_sizes=\[4.0\]: a curve needs at least 2 points"),
        ([1, 2], [1.0], "seconds: 1 for 2 batch_sizes; one for each is needed"),
        ([1, 0.5], [1.0, 1.0], r"batch_sizes\[1\]=0.5: a batch size must be at least 1"),
        ([8, 2, 8], [1.0, 1.0, 1.0], r"batch_sizes\[2\]=8: each batch size must be given once"),
        ([1, math.inf], [1.0, 1.0], r"batch_sizes\[1\]=inf: must be finite"),
        ([1, 2], [1.0, math.nan], r"seconds\[1\]=nan: must be finite"),
        ([1, 2], [0.0, 1.0], r"seconds\[0\]=0: a step must take more than 0 s"),
        ([1, 2], [-1.0, 1.0], r"seconds\[0\]=-1: a step must take"),
        ("many", [1.0, 1.0], "batch_sizes='many': must be a list of numbers"),
        ([1, 2], [[1.0, 2.0]], r"seconds=\[\[1.0, 2.0\]\]: must be a list of numbers"),
        ([1, 2], ["fast", "slow"], r"seconds=\['fast', 'slow'\]: must be a list of numbers"),
    ],
)
def test_points_that_make_no_curve_are_refused(sizes, seconds, message):
    with pytest.raises(ValueError, match=message):
        LatencyCurve(sizes, seconds)


@pytest.mark.parametrize(
    ("size", "message"), [(-1, "batch_size=-1"), (math.nan, "=nan"), ([1, math.inf], r"\[1\]=inf")]
)
def test_batch_sizes_that_make_no_sense_are_refused(size, message):
    with pytest.raises(ValueError, match=message + ": must be finite and not negative"):
        GPU(size)


@pytest.mark.parametrize("state", [{}, {"batch_sizes": [1, 2]}, GPU.to_dict() | {"more": 1}, [1, 2]])
def test_a_state_with_other_keys_is_refused(state):
    with pytest.raises(ValueError, match="must have the keys batch_sizes and seconds, and no other"):
        LatencyCurve.from_dict(state)


# --- rollouts --------------------------------------------------------------------------------------------------------


def step_by_step(waiting, curve, max_running):
    """Seconds of an engine that fills its free slots, makes a step, and lets go who has all tokens."""
    waiting, running, seconds = list(waiting), [], 0.0
    while waiting or running:
        while waiting and (max_running is None or len(running) < max_running):
            running.append(waiting.pop(0))
            running = [left for left in running if left > 0]
        seconds += curve(len(running))
        running = [left - 1 for left in running if left > 1]
    return seconds


@settings(max_examples=400)
@given(lengths, curves, slots)
def test_a_rollout_takes_what_its_steps_take(some, curve, max_running):
    assert rollout_time(some, curve, max_running) == pytest.approx(step_by_step(some, curve, max_running))


@given(lengths, curves)
def test_it_is_the_sum_of_the_paper(some, curve):
    ordered = [0, *sorted(some)]
    many = len(some)
    paper = sum((ordered[j] - ordered[j - 1]) * curve(many - j + 1) for j in range(1, many + 1))
    assert rollout_time(some, curve) == pytest.approx(paper)


@given(st.floats(0, 1e4), curves, slots)
def test_one_sequence_takes_its_length_in_steps_of_one(length, curve, max_running):
    assert rollout_time([length], curve, max_running) == pytest.approx(length * curve(1))


@given(lengths, curves, st.data())
def test_longer_sequences_take_no_less(some, curve, data):
    longer = [length + data.draw(st.integers(0, 5)) for length in some]
    assert rollout_time(longer, curve) >= rollout_time(some, curve) - 1e-9


@given(lengths, curves)
def test_slots_for_all_are_as_good_as_no_limit_and_one_slot_is_one_after_the_other(some, curve):
    assert rollout_time(some, curve, max(len(some), 1)) == pytest.approx(rollout_time(some, curve))
    assert rollout_time(some, curve, 1) == pytest.approx(sum(some) * curve(1))


def test_who_waits_is_served_in_the_order_given():
    flat = LatencyCurve([1, 2], [1.0, 1.0])
    assert rollout_time([1, 1, 1, 9], flat, max_running=2) == 10.0
    assert rollout_time([9, 1, 1, 1], flat, max_running=2) == 9.0


@given(st.lists(lengths, max_size=4), curves, slots)
def test_the_makespan_is_the_slowest_engines(engines, curve, max_running):
    assert makespan(engines, curve, max_running) == max([rollout_time(e, curve, max_running) for e in engines] + [0.0])


def test_nothing_takes_no_time():
    assert rollout_time([], GPU) == rollout_time(np.array([]), GPU, 3) == makespan([], GPU) == 0.0


@pytest.mark.parametrize("run", [rollout_time, lambda some, *rest: makespan([[1], some], *rest)])
@pytest.mark.parametrize(
    ("some", "max_running", "message"),
    [
        ([3, -1], None, r"lengths\[1\]=-1: a length must not be negative"),
        ([math.nan], None, r"lengths\[0\]=nan: must be finite"),
        ([math.inf], 2, r"lengths\[0\]=inf: must be finite"),
        ([1], 0, "max_running=0: must be at least 1"),
        (5, None, "lengths=5: must be a list of numbers"),
    ],
)
def test_rollouts_that_make_no_sense_are_refused(run, some, max_running, message):
    with pytest.raises(ValueError, match=message):
        run(some, GPU, max_running)


# --- steps seen on running engines -----------------------------------------------------------------------------------


def test_steps_are_averaged_per_power_of_two():
    times = steps((5, 0.002, 10), (7, 0.004, 30), (8, 0.01, 1), (1, 0.001, 2))
    sizes, seconds, counts = zip(*times.points(), strict=True)
    assert sizes == (1.0, 6.5, 8.0)
    assert seconds == pytest.approx((0.001, 0.0035, 0.01))
    assert counts == (2, 40, 1)


seen = st.lists(st.tuples(st.floats(1, 2000), milliseconds, st.integers(1, 500)), max_size=20)


@given(seen, seen)
def test_merged_is_as_if_all_had_been_added_to_one(some, others):
    times = steps(*some)
    times.merge(steps(*others))
    for mine, both in zip(times.points(), steps(*some, *others).points(), strict=True):
        assert mine == pytest.approx(both)


@given(seen)
def test_step_times_stay_small_and_travel(some):
    times = steps(*some)
    assert len(times.points()) <= 11
    assert sum(count for _, _, count in times.points()) == sum(count for _, _, count in some)
    assert pickle.loads(pickle.dumps(times)) == times
    assert bool(times) == bool(some)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, 1), "running=0: must be finite and at least 1"),
        ((math.inf, 1.0, 1), "running=inf"),
        ((math.nan, 1.0, 1), "running=nan"),
        ((1, 0.0, 1), "seconds=0.0: must be finite and positive"),
        ((1, math.nan, 1), "seconds=nan"),
        ((1, math.inf, 1), "seconds=inf"),
        ((1, 1.0, 0), "steps=0: must be at least 1"),
    ],
)
def test_steps_that_nobody_can_see_are_refused_and_change_nothing(arguments, message):
    times = StepTimes()
    with pytest.raises(ValueError, match=message):
        times.add(*arguments)
    assert not times


# --- refinement ------------------------------------------------------------------------------------------------------


@given(curves, st.lists(st.tuples(st.integers(1, 600), st.integers(1, 500)), max_size=6), st.floats(0, 1))
def test_what_was_expected_changes_nothing(curve, some, weight):
    one_per_bin = {running.bit_length(): (running, curve(running), count) for running, count in some}
    assert curve.refined(steps(*one_per_bin.values()), weight).seconds == pytest.approx(curve.seconds)


def test_nothing_seen_or_no_weight_changes_nothing():
    assert GPU.refined(StepTimes(), 0.5) == GPU
    assert GPU.refined(steps((8, 9.0, MANY)), 0.0) == GPU


@given(curves, st.floats(1, 600), milliseconds, st.integers(1, MANY), st.floats(0, 1))
def test_one_observation_moves_the_curve_towards_it_and_not_beyond(curve, running, seconds, count, weight):
    before, after = curve(running), curve.refined(steps((running, seconds, count)), weight)(running)
    low, high = sorted((before, seconds))
    assert low * (1 - 1e-9) <= after <= high * (1 + 1e-9)
    if weight > 0.1 and count > running and abs(seconds / before - 1) > 0.1:
        assert after != pytest.approx(before, rel=1e-6)


def test_the_weight_is_that_of_an_exponential_moving_average():
    assert GPU.refined(steps((8, 2.8, MANY)), 0.25)(8) == pytest.approx(0.75 * 1.4 + 0.25 * 2.8)


def test_few_steps_count_less():
    some = steps((8, 2.8, 8 * HALF_TRUST_STEPS))  # eight sequences report each step
    assert GPU.refined(some, 0.5)(8) == pytest.approx(0.75 * 1.4 + 0.25 * 2.8)


def test_an_absurd_observation_counts_as_the_largest_ratio():
    for seconds, factor in ((3600.0, LARGEST_RATIO), (1e-9, 1 / LARGEST_RATIO)):
        assert GPU.refined(steps((8, seconds, MANY)), 1.0)(8) == pytest.approx(1.4 * factor, rel=1e-5)


def test_where_nothing_was_seen_the_curve_keeps_its_shape():
    faster = GPU.refined(steps((4, 0.6, MANY)), 1.0)
    assert faster.seconds == pytest.approx([second / 2 for second in GPU.seconds])
    bent = GPU.refined(steps((4, 1.2, MANY), (16, 3.6, MANY)), 1.0)
    assert [bent(b) / GPU(b) for b in (1, 4, 8, 16, 64)] == pytest.approx([1.0, 1.0, 1.5, 2.0, 2.0])


@given(curves, seen, st.floats(0, 1))
def test_a_refined_curve_has_the_same_batch_sizes_and_never_falls(curve, some, weight):
    refined = curve.refined(steps(*some), weight)
    assert refined.batch_sizes == curve.batch_sizes
    assert np.all(np.diff(refined.seconds) >= 0)


def test_repeated_refinement_arrives_at_what_engines_show():
    truth, curve = LatencyCurve(GPU.batch_sizes, [2.0, 2.0, 2.1, 2.2, 2.4, 3.0, 9.0]), GPU
    for _ in range(40):
        curve = curve.refined(steps(*((b, truth(b), 50 * b) for b in (1, 2, 4, 8, 16, 32, 64))), 0.3)
    assert curve.seconds == pytest.approx(truth.seconds, rel=0.05)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=rf"weight={weight}: must lie in \[0, 1\]"):
        GPU.refined(StepTimes(), weight)
