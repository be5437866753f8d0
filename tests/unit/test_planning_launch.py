"""The order of launch: what starts first, in the plan, its parts, the engines' queues and the forecast."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.allocation import contiguous_parts, spread_parts
from darts.config import LAUNCH_ORDERS, DartsConfig
from darts.forecast import CostModel, draw_lengths, stopped_lengths
from darts.group import CandidateGroup
from darts.latency import LatencyCurve
from darts.planning import Plan, RolloutPlanner, launch_order

LOW, HIGH = 4, 8


def darts_of(launch="heaviest", **block) -> DartsConfig:
    return DartsConfig.from_block({"launch": launch, **block}, group_size=LOW)


def plan_of(budgets, mean, adaptive, darts) -> Plan:
    budgets, mean = np.array(budgets, dtype=np.int64), np.array(mean, dtype=np.float64)
    return Plan(
        keys=[str(number) for number in range(len(budgets))],
        budgets=budgets,
        std=np.ones(len(budgets)),
        known=np.ones(len(budgets), dtype=bool),
        mean=mean,
        adaptive=adaptive,
        launch_order=launch_order(budgets, mean, adaptive, darts),
    )


plans = st.lists(st.tuples(st.integers(LOW, HIGH), st.integers(1, 99)), max_size=30)


@given(plans, st.booleans(), st.sampled_from(LAUNCH_ORDERS), st.integers(1, 6))
def test_parts_and_priorities_follow_the_order_of_launch(prompts, adaptive, launch, num_parts):
    plan = plan_of([b for b, _ in prompts], [m for _, m in prompts], adaptive, darts_of(launch))
    order = plan.launch_order.tolist()
    assert sorted(order) == list(range(len(prompts)))
    parts = plan.parts(num_parts)
    assert sorted(prompt for part in parts for prompt in part.tolist()) == sorted(order)
    for part in parts:
        assert [order.index(prompt) for prompt in part] == sorted(order.index(prompt) for prompt in part)
    first = plan.priorities.tolist()
    numbers = [first[prompt] + candidate for prompt in order for candidate in range(plan.budgets[prompt])]
    assert numbers == list(range(plan.budgets.sum())), "each candidate has its own"


@given(plans, st.integers(1, 6))
def test_heaviest_is_by_expected_tokens_and_where_budgets_are_uniform_by_the_batch(prompts, num_parts):
    budgets, mean = [b for b, _ in prompts], [m for _, m in prompts]
    plan = plan_of(budgets, mean, True, darts_of())
    work = [b * m for b, m in prompts]
    assert plan.launch_order.tolist() == sorted(range(len(prompts)), key=lambda prompt: (-work[prompt], prompt))
    assert [part.tolist() for part in plan.parts(num_parts)] == [
        part.tolist() for part in spread_parts(work, num_parts)
    ]
    plan = plan_of(budgets, mean, False, darts_of())
    assert plan.launch_order.tolist() == list(range(len(prompts)))
    assert plan.priorities.tolist() == (np.cumsum(plan.budgets) - plan.budgets).tolist()
    expected = contiguous_parts(plan.budgets, num_parts)
    assert [part.tolist() for part in plan.parts(num_parts)] == [part.tolist() for part in expected]


def test_dual_end_groups_first_and_within_each_kind_the_heaviest():
    budgets, mean = [8, 5, 8, 7, 4], [90, 10, 99, 20, 30]
    assert plan_of(budgets, mean, True, darts_of()).launch_order.tolist() == [2, 0, 3, 4, 1]
    plan = plan_of(budgets, mean, True, darts_of("dual_end_first"))
    assert plan.launch_order.tolist() == [3, 4, 1, 2, 0]
    assert plan.priorities.tolist() == [24, 11, 16, 0, 7]
    assert [part.tolist() for part in plan.parts(1)] == [[3, 4, 1, 2, 0]]
    assert plan_of(budgets, mean, False, darts_of("dual_end_first")).launch_order.tolist() == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("mode", ["dual_end", "shortest_only"])
def test_groups_of_one_kind_have_one_order(mode):
    budgets, mean = [8, 5, 8, 7, 4], [90, 10, 99, 20, 30]
    orders = [
        plan_of(budgets, mean, True, darts_of(launch, selection={"mode": mode})).launch_order.tolist()
        for launch in LAUNCH_ORDERS
    ]
    assert orders[0] == orders[1]


def test_the_forecast_follows_the_order():
    """One engine of 6 sequences; the prompts a and d vary so much that they get all the redundant candidates."""
    seconds = {}
    for launch in LAUNCH_ORDERS:
        planner = RolloutPlanner(ema_weight=0.3, response_length=10_000, max_running=6)
        darts = darts_of(launch, allocation={"mean_candidates": 6, "cost_weight": 0}, latency={"refine": False})
        cost = CostModel(LatencyCurve([1, 2], [1.0, 1.0]), "test").state_dict()
        prompts = {"a": [1000.0, 1e6], "b": [10.0, 1e-9], "c": [20.0, 1e-9], "d": [900.0, 1e6]}
        state = planner.state_dict() | {"steps": 5, "cost": cost, "history": {"version": 1, "prompts": prompts}}
        planner.load_state_dict(state)
        plan = planner.plan(list("abcd"), darts)
        assert plan.budgets.tolist() == [8, 4, 4, 8]
        seconds[launch] = plan.predicted_s
        drawn = draw_lengths(plan.mean, plan.std, HIGH, 10_000)
        decoded = stopped_lengths(drawn, plan.budgets, darts, 10_000)[:, plan.launch_order]
        assert plan.predicted_s == planner.cost.seconds(decoded, 1, 6)
        assert plan.launch_order.tolist() == ([0, 3, 2, 1] if launch == "heaviest" else [2, 1, 0, 3])
    assert seconds["heaviest"] != seconds["dual_end_first"]


# --- losers that are kept by chance -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(1, 12), min_size=LOW, max_size=HIGH), min_size=1, max_size=4), st.integers(0, 24))
def test_forecasts_run_a_spared_loser_to_its_end_as_the_state_machine_does(lengths, percent):
    p = percent / 100
    darts = darts_of(selection={"mode": "shortest_only", "keep_probability": p})
    padded = np.array([row + [7] * (HIGH - len(row)) for row in lengths], dtype=np.float64)
    got = stopped_lengths(padded[None], np.array([len(row) for row in lengths]), darts, limit=12)[0]
    draws = np.random.default_rng(1).random((1, len(lengths)))[0]
    for row, decoded, draw in zip(lengths, got, draws, strict=True):
        group = CandidateGroup(len(row), LOW, 0, "eager", keep_probability=p, draw=draw)
        want, aborted = list(row), set()
        for length, index in sorted((length, index) for index, length in enumerate(row)):
            if index in aborted:
                continue
            for loser in group.finish(index, length, truncated=length == 12):
                aborted.add(loser)
                want[loser] = length
        assert decoded[: len(row)].tolist() == want


def test_a_deadline_waits_for_the_spared():
    """A dual-end group's long response is cut when the shortest-only group is complete: later if it spares one."""
    lengths = np.array([[1, 2, 3, 4, 50, 60, 70, 80], [5, 5, 5, 5, 99, 0, 0, 0]], dtype=np.float64)
    budgets = np.array([8, 5])
    cut = {}
    for p in (0.0, 0.24):
        darts = darts_of(selection={"long_wait": "deadline", "keep_probability": p})
        drawn = np.repeat(lengths[None], 200, axis=0)
        decoded = stopped_lengths(drawn, budgets, darts, limit=1000)
        cut[p] = decoded[:, 1, 4]
        assert (decoded[:, 1, 4] == np.maximum(decoded[:, 0].max(axis=1), 5)).all()
    assert set(cut[0.0]) == {5}
    assert set(cut[0.24]) == {5, 50, 60, 70, 80}
    assert np.mean(cut[0.24] > 5) == pytest.approx(0.96, abs=0.05)
