"""The order of launch: what starts first, in the plan, its parts, the engines' queues and the forecast."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts.allocation import contiguous_parts, spread_parts
from darts.config import LAUNCH_ORDERS, DartsConfig
from darts.forecast import CostModel, draw_lengths, stopped_lengths
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
