"""Rollouts as discrete events: by hand, against `darts.latency`, and against a simulator without events."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.config import DartsConfig
from darts.group import CandidateGroup, num_due
from darts.latency import LatencyCurve, makespan
from darts.simulation.costs import Cluster
from darts.simulation.engine import Engine
from darts.simulation.rollout import SimulatedRollout, route

BY_HAND = (1.0, 2.0, 4.0)  # seconds of a step with 1, 2, 3 running


def fleet(engines=1, slots=8, step_seconds=(1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 8.0), abort_s=0.0):
    """Engines of one GPU, and their curve."""
    curve = LatencyCurve(range(1, len(step_seconds) + 1), step_seconds)
    return Cluster(gpus=engines, max_num_seqs=slots, abort_s=abort_s), curve


def rules(group_size, **block):
    return DartsConfig.from_block(block, group_size)


def shortest(group_size, early_stop="eager", **block):
    return rules(group_size, selection={"mode": "shortest_only"}, early_stop=early_stop, **block)


def run(lengths, budgets, some_rules, some_fleet, truncated=None, **options):
    lengths = np.array(lengths, dtype=np.int64)
    cut = np.zeros(len(lengths), dtype=bool) if truncated is None else np.array(truncated, dtype=bool)
    return SimulatedRollout(lengths, cut, np.array(budgets, dtype=np.int64), some_rules, *some_fleet, **options).run()


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_all_run_to_their_end():
    """10 steps of three, 10 of two, 20 of one: 40 + 20 + 20."""
    outcome = run([10, 20, 40], [3], rules(3, enable=False), fleet(step_seconds=BY_HAND))
    assert outcome.seconds == 80.0
    assert outcome.pool.ended_at.tolist() == [40.0, 60.0, 80.0]
    assert outcome.pool.kept.all()
    assert outcome.slot_seconds == 40 + 60 + 80


def test_eager_stops_the_rest_and_the_rollout_ends_with_it():
    outcome = run([10, 20, 40], [3], shortest(2), fleet(step_seconds=BY_HAND))
    assert outcome.seconds == 60.0
    assert outcome.pool.length.tolist() == [10, 20, 20]
    assert outcome.pool.aborted.tolist() == [False, False, True]
    assert outcome.pool.kept.tolist() == [True, True, False]


def test_an_abort_takes_its_time():
    """It arrives 5 s after 60 s; the loser runs alone then, a token each second."""
    outcome = run([10, 20, 40], [3], shortest(2), fleet(step_seconds=BY_HAND, abort_s=5.0))
    assert outcome.seconds == 65.0
    assert outcome.pool.length.tolist() == [10, 20, 25]
    late = run([10, 20, 24], [3], shortest(2), fleet(step_seconds=BY_HAND, abort_s=5.0))
    assert late.seconds == 64.0  # it has ended while the abort was on its way
    assert late.pool.aborted.tolist() == [False] * 3
    assert late.pool.ended_at.tolist() == [40.0, 60.0, 64.0]
    assert late.pool.kept.tolist() == [True, True, False]


def test_a_freed_slot_goes_to_the_next_in_the_queue():
    """Two slots, two groups of 3 for 2. The first group ends at 20 tokens; what waited of it never starts."""
    outcome = run([10, 20, 30, 5, 5, 9], [3, 3], shortest(2), fleet(slots=2, step_seconds=BY_HAND))
    # 10 and 20 run until 10; then 30 starts; at step 20 the 20 ends, 30 (10 tokens so far) is aborted, two 5 start; 9
    # waits, and is aborted at step 25 without a token.
    assert outcome.pool.length.tolist() == [10, 20, 10, 5, 5, 0]
    assert outcome.seconds == 25 * 2.0
    assert outcome.pool.kept.tolist() == [True, True, False, True, True, False]


def test_exact_hears_of_growth_in_chunks():
    some = shortest(2, "exact", streaming={"chunk_tokens": 8})
    outcome = run([10, 20, 40], [3], some, fleet(step_seconds=BY_HAND))
    assert outcome.pool.length.tolist() == [10, 20, 24]  # 24 is the first report above 20
    assert outcome.seconds == 60 + 4
    assert run([10, 20, 22], [3], some, fleet(step_seconds=BY_HAND)).pool.length.tolist() == [10, 20, 22]


def test_the_deadline_falls_once_all_groups_but_a_few_are_ready_and_the_others_go_on_until_they_are():
    some = rules(2, selection={"mode": "dual_end", "long_wait": "deadline"})
    outcome = run([2, 4, 40, 3, 8, 50, 5, 20, 60], [3, 3, 3], some, fleet(slots=16, step_seconds=[1.0] * 17))
    assert outcome.seconds == 20.0
    assert outcome.pool.length.tolist() == [2, 4, 8, 3, 8, 8, 5, 20, 20]
    assert outcome.complete == [0, 1, 2]
    assert outcome.pool.kept.tolist() == [True, True, False] * 3


def test_a_group_that_is_complete_before_the_deadline_counts():
    some = rules(2, selection={"mode": "dual_end", "long_wait": "deadline"})
    lengths, truncated = [2, 4, 5, 3, 8, 50, 3, 30, 40], [False, True, True] + [False] * 6
    outcome = run(lengths, [3, 3, 3], some, fleet(slots=16, step_seconds=[1.0] * 17), truncated)
    assert outcome.complete == [0, 1, 2]
    assert outcome.pool.length.tolist() == [2, 4, 5, 3, 8, 8, 3, 30, 30]
    assert outcome.pool.kept.tolist() == [True, True, False] * 3


CUT = {"mode": "dual_end", "long_end": "cut"}


def test_a_cut_group_keeps_what_runs_at_the_deadline_with_what_it_has():
    some = rules(2, selection=CUT)
    outcome = run([2, 40, 60, 3, 8, 50], [3, 3], some, fleet(step_seconds=[1.0] * 6))
    assert outcome.seconds == 3.0, "of two groups one is a few, and the other goes on until it is settled"
    assert outcome.pool.length.tolist() == [2, 2, 2, 3, 3, 3]
    assert outcome.pool.kept.tolist() == [True, False, True] * 2
    assert outcome.pool.cut.tolist() == [False, False, True] * 2
    assert outcome.pool.aborted.tolist() == [False, True, False] * 2


def test_the_harvest_cuts_the_groups_that_it_takes_and_gives_up_the_others():
    some = rules(2, selection=CUT)
    outcome = run([2, 40, 60, 9, 50, 3, 30], [3, 2, 2], some, fleet(step_seconds=[1.0] * 7), harvest=2)
    assert outcome.seconds == 3.0
    assert outcome.complete == [0, 2]
    assert outcome.pool.length.tolist() == [2, 3, 3, 3, 3, 3, 3]
    assert outcome.pool.cut.tolist() == [False, False, True, False, False, False, True]


def test_a_candidate_that_waits_for_a_slot_has_nothing_to_be_cut_with():
    outcome = run([2, 6, 60], [3], rules(2, selection=CUT), fleet(slots=1, step_seconds=[1.0] * 4))
    assert outcome.seconds == 2.0, "the second has begun at that instant"
    assert outcome.pool.length.tolist() == [2, 1, 0]
    assert outcome.pool.kept.tolist() == [True, True, False]


def test_the_harvest_abandons_the_others():
    outcome = run([4, 9, 2, 3, 7, 30], [2, 2, 2], shortest(2), fleet(step_seconds=[1.0] * 6), harvest=2)
    assert outcome.seconds == 9.0
    assert outcome.complete == [0, 1]
    assert outcome.pool.length.tolist() == [4, 9, 2, 3, 7, 9]
    assert outcome.pool.kept.tolist() == [True] * 4 + [False] * 2


def test_routing():
    assert route([3, 2, 3], [0, 1, 2], 2, "balanced") == [0, 1, 0, 1, 0, 1, 0, 1]
    assert route([3, 2, 3], [2, 0, 1], 2, "balanced") == [1, 0, 1, 0, 1, 0, 1, 0]
    assert route([3, 2, 3], [0, 1, 2], 2, "group") == [0, 0, 0, 1, 1, 1, 1, 1]


def test_nothing_at_all():
    assert run([], [], rules(2), fleet()).seconds == 0.0


def test_an_engine_that_is_empty_for_a_while_goes_on():
    engine = Engine([0.0, 1.0, 2.0], slots=2)
    engine.submit(0, 3)
    assert engine.fill(0.0) == [0]
    assert engine.pop_event(engine.next_event()) == (0, True)
    assert engine.next_event() == math.inf
    engine.submit(1, 2)
    assert engine.fill(10.0) == [1]
    assert engine.next_event() == 12.0
    assert engine.leave(1, 11.5) == 1


# --- against the cost model ------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 12),
    st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3),
)
def test_without_aborts_the_seconds_are_those_of_the_cost_model(lengths, engines, slots, seconds):
    curve = LatencyCurve([1, 4, 16], seconds)
    some = Cluster(gpus=engines, max_num_seqs=slots), curve
    outcome = run(lengths, [1] * len(lengths), rules(1, enable=False), some)
    parts = [lengths[engine::engines] for engine in range(engines)]
    assert outcome.seconds == pytest.approx(makespan(parts, curve, slots), rel=1e-12)
    assert outcome.pool.length.tolist() == lengths


# --- against a simulator without events ------------------------------------------------------------------------------


class Naive:
    """Looks at every candidate at every instant at which anything may happen; times are exact in binary."""

    def __init__(self, lengths, truncated, budgets, some_rules, some_fleet, order, harvest):
        self.rules, (self.cluster, self.curve), self.harvest = some_rules, some_fleet, harvest
        self.total, self.truncated = list(lengths), list(truncated)
        self.done = [0.0] * len(lengths)
        self.ended_at = [None] * len(lengths)
        self.aborted = [False] * len(lengths)
        self.group_of = [prompt for prompt, budget in enumerate(budgets) for _ in range(budget)]
        self.first = [sum(budgets[:prompt]) for prompt in range(len(budgets))]
        self.groups = [CandidateGroup(budget, some_rules.group_rules(budget)) for budget in budgets]
        submitted = [self.first[prompt] + index for prompt in order for index in range(budgets[prompt])]
        engine_of = route(budgets, order, self.cluster.engines, some_rules.routing)
        self.queues = [[c for c in submitted if engine_of[c] == engine] for engine in range(self.cluster.engines)]
        self.now, self.settled, self.begun = 0.0, [], set()
        self.trained = list(range(len(budgets)))

    def running(self, engine):
        return [c for c in self.queues[engine] if self.ended_at[c] is None][: self.cluster.max_num_seqs]

    def milestones(self, c):
        """Tokens at which something may happen to a candidate that runs."""
        chunk = self.rules.streaming.chunk_tokens
        group_rules = self.rules.group_rules(sum(prompt == self.group_of[c] for prompt in self.group_of))
        exact = group_rules.num_long == 0 and group_rules.early_stop == "exact"
        report = (math.floor(self.done[c] / chunk) + 1) * chunk
        return min(report, self.total[c]) if exact else self.total[c]

    def begin(self):
        """Those that have come to run may be cut."""
        while True:
            new = [c for e in range(self.cluster.engines) for c in self.running(e) if c not in self.begun]
            if not new:
                return
            self.begun.add(new[0])
            prompt = self.group_of[new[0]]
            if self.groups[prompt].rules.cuts:
                self.abort(prompt, self.groups[prompt].progress(new[0] - self.first[prompt], 1))

    def live(self):
        self.begin()
        while any(at is None for at in self.ended_at):
            running = [self.running(engine) for engine in range(self.cluster.engines)]
            speeds = [self.curve(len(some)) for some in running]
            waits = [
                (self.milestones(c) - self.done[c]) * s for some, s in zip(running, speeds, strict=True) for c in some
            ]
            passed = min(waits)
            reached = []
            for some, seconds in zip(running, speeds, strict=True):
                then = [c for c in some if (self.milestones(c) - self.done[c]) * seconds == passed]
                for c in some:
                    self.done[c] += passed / seconds
                reached += sorted(c for c in then if self.done[c] < self.total[c])
                reached += [c for c in then if self.done[c] >= self.total[c]]
            self.now += passed
            for c in reached:
                if self.ended_at[c] is None:
                    self.event(c)
        return self

    def event(self, c):
        group, index = self.groups[self.group_of[c]], c - self.first[self.group_of[c]]
        if self.done[c] >= self.total[c]:
            self.ended_at[c] = self.now
            losers = group.finish(index, self.total[c], self.truncated[c])
        else:
            losers = group.progress(index, int(self.done[c]))
        self.abort(self.group_of[c], losers)
        self.begin()

    def abort(self, prompt, losers):
        for index in losers:
            c = self.first[prompt] + index
            self.ended_at[c], self.aborted[c] = self.now, True
            self.total[c] = max(math.floor(self.done[c]), self.groups[prompt].lengths[index])
            self.groups[prompt].stop(index, self.total[c])
        group = self.groups[prompt]
        if prompt not in self.settled and (group.complete or group.ready):
            self.settled.append(prompt)
            waits = self.rules.enable and self.rules.selection.long_wait == "deadline"
            if self.harvest == len(self.settled):
                self.trained = list(self.settled)
                self.end_all()
            elif self.harvest is None and waits and len(self.settled) == num_due(len(self.groups)):
                self.end_all()

    def end_all(self):
        for prompt, group in enumerate(self.groups):
            self.abort(prompt, group.deadline() if prompt in self.trained else group.abandon())


MODES = [
    {"selection": {"mode": "shortest_only"}, "early_stop": "eager"},
    {"selection": {"mode": "shortest_only"}, "early_stop": "exact", "streaming": {"chunk_tokens": 3}},
    {"selection": {"mode": "shortest_only"}, "early_stop": "off"},
    {"selection": {"mode": "dual_end", "long_wait": "all"}},
    {"selection": {"mode": "dual_end", "long_wait": "deadline"}},
    {"selection": {"mode": "auto", "long_wait": "deadline"}, "allocation": {"high": 4}},
    {"selection": {"mode": "dual_end", "long_wait": "none"}},
    {"selection": {"mode": "auto", "long_end": "cut"}, "allocation": {"high": 4}},
    {"selection": {"mode": "dual_end", "long_end": "cut", "long_wait": "none"}},
    {"selection": {"mode": "dual_end", "long_end": "truncated", "long_wait": "deadline"}},
    {"enable": False},
]


@st.composite
def rollouts(draw):
    mode = draw(st.sampled_from(MODES))
    budgets = draw(st.lists(st.integers(2, 4), min_size=1, max_size=6))
    if mode.get("enable") is False:
        budgets = [2] * len(budgets)
    count = sum(budgets)
    lengths = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
    truncated = draw(st.lists(st.sampled_from([False] * 5 + [True]), min_size=count, max_size=count))
    order = draw(st.permutations(range(len(budgets))))
    harvest = draw(st.one_of(st.none(), st.integers(1, len(budgets))))
    routing = draw(st.sampled_from(["balanced", "group"]))
    some = rules(2, **mode, **({} if mode.get("enable") is False else {"routing": routing}))
    return lengths, truncated, budgets, some, fleet(draw(st.integers(1, 3)), draw(st.integers(1, 8))), order, harvest


@settings(max_examples=300)
@given(rollouts())
def test_it_is_what_a_simulator_without_events_gives(case):
    lengths, truncated, budgets, some, some_fleet, order, harvest = case
    outcome = run(lengths, budgets, some, some_fleet, truncated, order=order, harvest=harvest)
    naive = Naive(*case).live()
    assert outcome.pool.ended_at.tolist() == naive.ended_at
    assert outcome.pool.length.tolist() == naive.total
    assert (outcome.pool.aborted | outcome.pool.cut).tolist() == naive.aborted
    assert outcome.complete == sorted(naive.trained)
    for prompt, group in enumerate(naive.groups):
        first = naive.first[prompt]
        kept = outcome.pool.kept[first : first + budgets[prompt]]
        chosen = group.kept if prompt in naive.trained else []
        assert sorted(chosen) == np.flatnonzero(kept).tolist()
        assert kept.sum() == (2 if prompt in outcome.complete else 0)


@settings(max_examples=100)
@given(rollouts(), st.floats(0.1, 30.0))
def test_late_aborts_change_times_but_no_rule(case, abort_s):
    lengths, truncated, budgets, some, some_fleet, order, harvest = case
    slow = fleet(some_fleet[0].engines, some_fleet[0].max_num_seqs, abort_s=abort_s)
    outcome = run(lengths, budgets, some, slow, truncated, order=order, harvest=harvest)
    assert np.isfinite(outcome.pool.ended_at).all()
    assert outcome.pool.kept.sum() == 2 * len(outcome.complete)
    assert len(outcome.complete) == (harvest or len(budgets))
    assert not (outcome.pool.kept & outcome.pool.aborted).any()
    assert (outcome.pool.length <= lengths).all()


@settings(max_examples=60)
@given(rollouts())
def test_exact_keeps_what_a_run_without_stops_keeps(case):
    lengths, truncated, budgets, _, some_fleet, order, _ = case
    outcomes = [
        run(lengths, budgets, shortest(2, early, streaming={"chunk_tokens": 2}), some_fleet, truncated, order=order)
        for early in ("exact", "off")
    ]
    assert outcomes[0].pool.kept.tolist() == outcomes[1].pool.kept.tolist()
    assert outcomes[0].seconds <= outcomes[1].seconds
