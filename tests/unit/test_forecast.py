"""Forecasts: drawn lengths have their moments, groups stop what a real group stops, seconds follow the model."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.config import DartsConfig
from darts.forecast import CostModel, MeasuredEngines, draw_lengths, engine_slots, stopped_lengths
from darts.group import LONG_WAIT, CandidateGroup, num_due
from darts.latency import LatencyCurve, StepTimes, makespan

CURVE = LatencyCurve([1, 4], [1.0, 1.6])
ENGINES = MeasuredEngines(
    model="a model", device="a device", tensor_parallel=2, engines=8, max_num_seqs=512, kv_tokens=100_000
)


def settings_of(**block) -> DartsConfig:
    return DartsConfig.from_block(block, group_size=3)


def test_drawn_lengths_have_the_moments_and_the_limit():
    mean, std = np.array([400.0, 50.0]), np.array([200.0, 0.0])
    lengths = draw_lengths(mean, std, 4000, 100_000)
    assert lengths.shape == (16, 2, 4000)
    assert lengths[0, 0].mean() == pytest.approx(400, rel=0.03)
    assert lengths[0, 0].std() == pytest.approx(200, rel=0.1)
    assert set(lengths[0, 1]) == {50}
    assert draw_lengths(mean, std, 4000, 300).max() == 300
    assert (draw_lengths(mean, std, 4000, 100_000) == lengths).all(), "the same in every step"


def test_small_batches_are_drawn_often_enough():
    lengths = draw_lengths(np.array([9.0]), np.array([3.0]), 16, 100)
    assert lengths.shape == (128, 1, 16)
    assert (lengths == np.round(lengths)).all()
    assert lengths.min() >= 1


def decoded_by_groups(lengths: list[list[int]], darts: DartsConfig, limit: int) -> list[list[int]]:
    """The real state machines, token by token; all candidates start together."""
    groups = [CandidateGroup(len(row), darts.group_rules(len(row))) for row in lengths]
    running = [set(range(len(row))) for row in lengths]
    decoded = [[0] * len(row) for row in lengths]
    for token in range(1, limit + 1):
        aborted: list[set[int]] = [set() for _ in groups]
        for number, (group, row) in enumerate(zip(groups, lengths, strict=True)):
            for candidate in sorted(running[number]):
                decoded[number][candidate] = token
            for candidate in sorted(running[number]):
                if row[candidate] == token:
                    running[number].discard(candidate)
                    if candidate not in aborted[number]:
                        aborted[number] |= set(group.finish(candidate, token, truncated=token == limit))
                else:
                    aborted[number] |= set(group.progress(candidate, token))
        num_settled = sum(group.ready or group.complete for group in groups)
        if darts.selection.long_wait == "deadline" and num_settled >= num_due(len(groups)):
            for number, group in enumerate(groups):
                aborted[number] |= set(group.deadline())
        for number, losers in enumerate(aborted):
            running[number] -= losers
    return decoded


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=3, max_size=6), min_size=1, max_size=4),
    st.sampled_from(["eager", "exact", "off"]),
    st.sampled_from(["auto", "dual_end", "shortest_only"]),
    st.sampled_from([("finished", wait) for wait in LONG_WAIT] + [("cut", "deadline"), ("cut", "none")]),
)
def test_what_groups_stop_is_what_the_state_machine_stops(lengths, early_stop, mode, long):
    selection = {"mode": mode} | dict(zip(("long_end", "long_wait"), long, strict=True))
    darts = settings_of(early_stop=early_stop, selection=selection)
    budgets = np.array([len(row) for row in lengths])
    padded = np.array([row + [7] * (6 - len(row)) for row in lengths], dtype=np.float64)
    got = stopped_lengths(padded[None], budgets, darts, limit=12)[0]
    expected = decoded_by_groups(lengths, darts, limit=12)
    for row, budget, want in zip(got, budgets, expected, strict=True):
        assert row[budget:].tolist() == [0] * (6 - budget)
        # `exact` stops what has grown past the third shortest: one token later than what `eager` stops.
        slack = 1 if early_stop == "exact" else 0
        assert (np.abs(row[:budget] - np.array(want)) <= slack).all(), (row, want)


def test_seconds_are_the_slowest_engines():
    model = CostModel(CURVE, "test")
    lengths = np.array([[[10.0, 20.0, 30.0, 0.0]]])
    assert model.seconds(lengths, 1, None) == pytest.approx(10 * CURVE(3) + 10 * CURVE(2) + 10 * CURVE(1))
    # in turns: 10 and 30 on one engine, 20 on the other
    assert model.seconds(lengths, 2, None) == pytest.approx(10 * CURVE(2) + 20 * CURVE(1))
    assert model.seconds(lengths, 1, 1) == pytest.approx(60 * CURVE(1))
    two = np.concatenate([lengths, lengths * 3])
    assert model.seconds(two, 1, None) == pytest.approx(2 * model.seconds(lengths, 1, None)), "the mean of the draws"
    assert CostModel(CURVE, "test", [(3, 7.0)]).seconds(lengths, 1, 1) == pytest.approx(67)
    assert CostModel(CURVE, "test", [(1, 7.0)]).seconds(lengths, 1, 1) == pytest.approx(81), "three candidates"


def test_refining_learns_what_decoding_does_not_explain():
    """By the median of the last five, so that a first rollout that warms up does not count for long."""
    model, decoded = CostModel(CURVE, "test"), np.array([10, 20, 30])
    seen = []
    for seconds, overhead in ((200.0, 140), (65.0, 72.5), (66.0, 6), (64.0, 5.5), (64.0, 5), (64.0, 4), (1.0, 4)):
        model.refine(decoded, seconds, StepTimes(), 1, 1)
        seen.append(model.overhead_s(3))
        assert model.overhead_s(3) == pytest.approx(overhead), seen
    assert model.curve == CURVE, "no chunk was seen"
    for _ in range(3):
        model.refine(decoded, 1.0, StepTimes(), 1, 1)
    assert model.overhead_s(3) == 0, "a rollout faster than its decoding has no overhead"


def test_refining_follows_the_engines_steps():
    model, seen = CostModel(CURVE, "test"), StepTimes()
    seen.add(running=1, seconds=200.0, steps=100)
    for _ in range(30):
        model.refine(np.array([10]), 20.0, seen, 1, None)
    assert model.curve(1) == pytest.approx(2.0, rel=0.05)
    assert model.overhead_s(1) == pytest.approx(0.0, abs=0.5)


def test_state_round_trips_and_bad_ones_are_refused():
    model = CostModel(CURVE, "profile of today", [(2, 0.5), (2, 0.25)], ENGINES)
    again = CostModel.from_state(json.loads(json.dumps(model.state_dict())))
    assert (again.curve, again.source, again.overhead_s(2)) == (CURVE, "profile of today", 0.375)
    assert again.engines == ENGINES
    assert CostModel.from_state(CostModel(CURVE, "test").state_dict()).engines is None
    good = model.state_dict()
    for change, message in (
        ({"overheads": [-1]}, r"overheads=\[-1\]"),
        ({"overheads": [[8, -1]]}, r"overheads=\[\[8, -1\]\]"),
        ({"overheads": [[0, 1]]}, r"overheads=\[\[0, 1\]\]: must be pairs of candidates, at least 1"),
        ({"overheads": [[8, float("nan")]]}, r"overheads=\[\[8, nan\]\]"),
        ({"engines": 3}, "engines=3: must have model, device"),
        ({"engines": asdict(ENGINES) | {"engines": "8"}}, "engines.engines='8': must be an integer"),
        ({"engines": asdict(ENGINES) | {"device": None}}, "engines.device=None: must be a text"),
        ({"overheads": 3}, "overheads=3"),
        ({"source": 3}, "source=3"),
        ({"extra": 3}, "must have curve, source, overheads and engines"),
        ({"curve": {}}, "batch_sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            CostModel.from_state(good | change)
    with pytest.raises(ValueError, match="must have curve"):
        CostModel.from_state([1])


@given(
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 12)),
    st.integers(0, 99),
    st.booleans(),
)
def test_the_seconds_of_all_draws_are_those_of_each_slowest_engine(prompts, most, engines, max_running, seed, uneven):
    """Also where draws launch different candidates, and where more are launched than find a slot."""
    rng = np.random.default_rng(seed)
    lengths = draw_lengths(rng.uniform(10, 900, prompts), rng.uniform(0, 500, prompts), most, 1000)[:4]
    lengths = np.where(np.arange(most) < rng.integers(0, most + 1, prompts)[:, None], lengths, 0.0)
    if uneven:
        lengths = np.where(rng.random(lengths.shape) < 0.5, lengths, 0.0)
    expected = []
    for draw in lengths:
        launched = draw[draw > 0]
        expected.append(makespan([launched[engine::engines] for engine in range(engines)], CURVE, max_running))
    found = CostModel(CURVE, "measured", [(1, 0.5)]).seconds(lengths, engines, max_running)
    assert found == pytest.approx(np.mean(expected) + 0.5 * (lengths > 0).sum() / len(lengths), rel=1e-12)


def overheads_of(line, counts, rng=None):
    """What rollouts of so many candidates take besides decoding, by a line and with a noise of 20 %."""
    noise = np.ones(len(counts)) if rng is None else rng.uniform(0.8, 1.2, len(counts))
    return [(count, (line[0] + line[1] * count) * factor) for count, factor in zip(counts, noise, strict=True)]


@pytest.mark.parametrize("counts", [[96] * 10, [96, 97, 95, 100, 90], [96] * 8 + [64]])
def test_candidates_are_not_free_as_long_as_their_number_hardly_varies(counts):
    model = CostModel(CURVE, "test", overheads_of((4.0, 0.1), counts))
    assert model.overhead_s(96) == pytest.approx(13.6, rel=0.05), "what is seen is met"
    assert model.overhead_s(192) == pytest.approx(2 * model.overhead_s(96), rel=0.02)


@pytest.mark.parametrize("line", [(4.0, 0.1), (10.0, 0.0), (0.0, 0.2)])
def test_rollouts_with_few_and_many_candidates_tell_the_constant_part(line):
    rng = np.random.default_rng(0)
    model = CostModel(CURVE, "test", overheads_of(line, [64, 96, 80, 64, 96, 72, 88, 64] * 3))
    assert model.overhead_line == pytest.approx(line, abs=1e-9)
    noisy = CostModel(CURVE, "test", overheads_of(line, [64, 128] * 12, rng))
    for count in (64, 96, 128):
        assert noisy.overhead_s(count) == pytest.approx(line[0] + line[1] * count, rel=0.15)


@given(st.lists(st.tuples(st.integers(1, 999), st.floats(0, 1e4)), max_size=30), st.integers(0, 2000))
def test_an_overhead_is_never_negative_and_never_falls_with_more_candidates(overheads, count):
    model = CostModel(CURVE, "test", overheads)
    assert min(model.overhead_line) >= 0
    assert 0 <= model.overhead_s(count) <= model.overhead_s(count + 1)


def test_one_slow_rollout_does_not_move_the_line():
    """The first one compiles, and warms up."""
    steady = overheads_of((4.0, 0.1), [64, 96] * 6)
    for count in (64, 96):
        model = CostModel(CURVE, "test", [(count, 200.0), *steady])
        assert model.overhead_line == pytest.approx((4.0, 0.1), abs=1e-9)


def test_slots_are_those_of_the_kv_cache_where_it_is_small():
    lengths = np.array([[300.0, 0.0], [100.0, 200.0]])
    held = 100 + (300**2 + 100**2 + 200**2) / (2 * 600)
    assert engine_slots(lengths, 512, None, 100) == 512
    assert engine_slots(lengths, None, None, 100) is None
    assert engine_slots(lengths, 512, 10 * round(held) + 9, 100) == 10
    assert engine_slots(lengths, 7, 10_000, 100) == 7
    assert engine_slots(lengths, None, 10_000, 100) == int(10_000 / held)
    assert engine_slots(lengths, 512, 1, 100) == 1, "one runs always"
    assert engine_slots(np.zeros((2, 3)), 512, 10, 100) == 512, "nothing runs"


def test_engines_differ_by_what_they_are_and_not_by_a_little_memory():
    assert ENGINES.differences(ENGINES) == []
    assert ENGINES.differences(replace(ENGINES, kv_tokens=95_000)) == []
    assert ENGINES.differences(replace(ENGINES, kv_tokens=50_000)) == ["kv_tokens 100000 instead of 50000"]
    assert ENGINES.differences(replace(ENGINES, kv_tokens=None)) == ["kv_tokens 100000 instead of None"]
    others = replace(ENGINES, device="an older one", engines=4)
    assert ENGINES.differences(others) == ["device a device instead of an older one", "engines 8 instead of 4"]
