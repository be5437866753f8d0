"""Plans: budgets follow the history, totals the utility; what is learnt survives a save; forecasts are made before."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pools import pool_of

from darts.config import DartsConfig
from darts.forecast import CostModel, MeasuredEngines
from darts.history import censored_std
from darts.latency import LatencyCurve, StepTimes
from darts.metrics import METRICS
from darts.planning import Plan, RolloutPlanner
from darts.pool import CandidatePool, State

LOW, HIGH = 4, 8
KEYS = [f"prompt {number}" for number in range(6)]
FLAT = LatencyCurve([1, 2], [0.01, 0.01])
STEEP = LatencyCurve([1, 2], [0.01, 0.02])


def darts_of(**allocation) -> DartsConfig:
    return DartsConfig.from_block({"allocation": {"mode": "adaptive", **allocation}}, group_size=LOW)


def new_planner(curve: LatencyCurve | None = None, **changes) -> RolloutPlanner:
    planner = RolloutPlanner(**{"ema_weight": 0.3, "response_length": 10_000, **changes})
    planner.cost = None if curve is None else CostModel(curve, "test")
    return planner


def rollout(planner, darts, rng, spreads=(1, 2, 4, 8, 16, 32), keys=KEYS, seconds=2.0, step_times=None):
    """One step with scripted lengths: prompt i varies by spreads[i]."""
    plan = planner.plan(keys, darts)
    lengths = [
        np.maximum(rng.normal(100, spread, size=budget), 1).astype(int).tolist()
        for budget, spread in zip(plan.budgets, spreads, strict=True)
    ]
    observed, metrics = planner.observe(plan, darts, pool_of(lengths), seconds, step_times or StepTimes())
    return plan, observed, metrics


def test_warm_up_is_uniform_then_budgets_follow_the_spread():
    planner, darts, rng = new_planner(), darts_of(mean_candidates=6, warmup_steps=2), np.random.default_rng(0)
    for _ in range(2):
        plan, *_ = rollout(planner, darts, rng)
        assert plan.budgets.tolist() == [6] * 6
        assert not plan.adaptive
    plan, *_ = rollout(planner, darts, rng)
    assert plan.adaptive
    assert plan.budgets.sum() == 36
    assert (np.diff(plan.budgets) >= 0).all()
    assert (plan.budgets[0], plan.budgets[-1]) == (LOW, HIGH)
    assert plan.std.tolist() == sorted(plan.std)


def test_without_warm_up_the_first_rollout_is_uniform_too():
    plan = new_planner().plan(KEYS, darts_of(warmup_steps=0))
    assert plan.budgets.sum() == round(6 * 1.3 * LOW)
    assert np.ptp(plan.budgets) <= 1
    assert not plan.known.any()
    assert not plan.std.any()


@pytest.mark.parametrize(("mode", "budgets"), [("uniform", [6] * 6), ("off", [LOW] * 6)])
def test_other_modes_learn_but_do_not_follow(mode, budgets):
    planner, darts, rng = new_planner(), darts_of(mode=mode), np.random.default_rng(0)
    for _ in range(3):
        plan, *_ = rollout(planner, darts, rng)
        assert plan.budgets.tolist() == budgets
        assert [part.tolist() for part in plan.parts(2)] == [[0, 1, 2], [3, 4, 5]], "in the order of the batch"
    assert len(planner.history) == 6


def test_unseen_prompts_take_the_datasets_mean():
    planner, darts, rng = new_planner(), darts_of(mean_candidates=6), np.random.default_rng(0)
    rollout(planner, darts, rng)
    plan = planner.plan([*KEYS[:3], "new", "newer"], darts)
    assert plan.known.tolist() == [True] * 3 + [False] * 2
    assert plan.std[3] == plan.std[4] == pytest.approx(np.mean([planner.history.std(key) for key in KEYS]))
    assert plan.budgets.sum() == 30


def test_duplicates_share_one_history_and_one_observation():
    planner, darts = new_planner(), darts_of(mean_candidates=6)
    plan = planner.plan(["same", "other", "same"], darts)
    lengths = [[10, 20, 30, 40, 50, 60], [5, 5, 5, 5, 5, 6], [100, 100, 100, 90, 80, 70]]
    observed, _ = planner.observe(plan, darts, pool_of(lengths), 1.0, StepTimes())
    assert len(planner.history) == 2
    assert observed[0] == observed[2] == pytest.approx(np.std(lengths[0] + lengths[2]))
    assert observed[1] == pytest.approx(np.std(lengths[1]))
    again = planner.plan(["same", "other", "same"], darts)
    assert again.budgets.tolist() == [7, 4, 7]


def test_aborted_truncated_and_lost_candidates_are_censored():
    planner, darts = new_planner(), darts_of(mean_candidates=6)
    plan = planner.plan(["one"], darts)
    lengths, censored = [10, 20, 30, 40, 40, 35], [False, False, False, True, True, True]
    observed, _ = planner.observe(plan, darts, pool_of([lengths], ["kkkatx"]), 1.0, StepTimes())
    assert observed[0] == planner.history.std("one") == censored_std(lengths, censored)
    assert observed[0] > np.std(lengths)


def test_a_prompt_whose_candidates_were_all_aborted_teaches_nothing():
    """A rollout that ends with others complete: their lengths say when that was."""
    planner, darts = new_planner(), darts_of(mean_candidates=6)
    planner.observe(planner.plan(["one"], darts), darts, pool_of([[100] * 3 + [300] * 3], ["kkkddd"]), 1.0, StepTimes())
    before = planner.history.state_dict(), planner.history.std("one")
    observed, _ = planner.observe(
        planner.plan(["one", "two"], darts), darts, pool_of([[3] * 6] * 2, ["aaaaaa"] * 2), 1.0, StepTimes()
    )
    assert (planner.history.state_dict(), planner.history.std("one")) == before
    assert observed.tolist() == [before[1], planner.history.std("two")]


def test_planning_changes_nothing():
    planner, darts, rng = new_planner(STEEP), darts_of(), np.random.default_rng(0)
    rollout(planner, darts, rng)
    before = json.dumps(planner.state_dict())
    first, second = planner.plan(KEYS, darts), planner.plan(KEYS, darts)
    assert json.dumps(planner.state_dict()) == before
    assert first.budgets.tolist() == second.budgets.tolist()
    assert (first.predicted_s, first.utility) == (second.predicted_s, second.utility)
    assert first.times == second.times


def test_the_utility_decides_the_total_by_the_cost_of_time():
    totals = {}
    for name, curve, weight in (("free", FLAT, 0.0), ("steep", STEEP, 1.0), ("careful", STEEP, 100.0)):
        planner, darts, rng = (
            new_planner(curve),
            darts_of(cost_weight=weight, mean_candidates="utility"),
            np.random.default_rng(0),
        )
        rollout(planner, darts, rng, spreads=[60] * 6)
        plan = planner.plan(KEYS, darts)
        assert plan.utility.total == plan.budgets.sum()
        assert plan.utility.utility == pytest.approx(plan.utility.gain - weight * plan.utility.cost)
        totals[name] = plan.utility.total
    assert 5 * (HIGH - 1) + 1 <= totals["free"] < 6 * HIGH, "a tenth of the prompts, rounded up, is saturated"
    assert totals["careful"] == 6 * LOW
    assert 6 * LOW <= totals["steep"] <= totals["free"]


def test_a_given_mean_wins_over_the_utility_which_is_told():
    planner, darts, rng = new_planner(STEEP), darts_of(mean_candidates=5.5), np.random.default_rng(0)
    rollout(planner, darts, rng)
    plan = planner.plan(KEYS, darts)
    assert plan.budgets.sum() == plan.utility.total == 33
    assert plan.utility.cost > 0


def test_no_prompt_is_expected_to_be_longer_than_the_limit():
    """A prompt whose candidates were all truncated is as long as the limit, and does not vary."""
    planner = RolloutPlanner(ema_weight=0.3, response_length=100)
    darts = darts_of(mode="off")
    plan = planner.plan(KEYS, darts)
    lengths = np.full(6 * LOW, 100)
    lengths[LOW:] = np.random.default_rng(0).integers(10, 90, 5 * LOW)
    state = np.where(lengths == 100, State.TRUNCATED.value, State.FINISHED.value)
    planner.observe(plan, darts, CandidatePool.of([LOW] * 6, length=lengths, state=state, kept=True), 9.0, StepTimes())
    assert (planner.history.mean(KEYS[0]), planner.history.std(KEYS[0])) == (100, 0)
    assert planner.history.std(KEYS[1]) > 0


def test_forecasts_are_made_before_and_compared_after():
    planner, darts = new_planner(STEEP, max_running=512), darts_of(mean_candidates=6)
    rng = np.random.default_rng(0)
    plan, _, metrics = rollout(planner, darts, rng)
    assert plan.predicted_s is None, "nothing is known about lengths"
    assert "darts/latency/predicted_s" not in metrics
    step_times = StepTimes()
    step_times.add(running=12, seconds=1.0, steps=100)
    plan, observed, metrics = rollout(planner, darts, rng, seconds=99.0, step_times=step_times)
    assert metrics["darts/latency/predicted_s"] == plan.predicted_s
    assert metrics["darts/latency/predicted_over_measured"] == pytest.approx(plan.predicted_s / 99)
    assert metrics["darts/allocation/time_cost_measured"] == pytest.approx(99 / plan.base_s - 1)
    assert metrics["darts/history/std_correlation"] == pytest.approx(np.corrcoef(plan.std, observed)[0, 1])
    assert metrics["darts/history/std_correlation"] > 0.5
    assert metrics["darts/latency/overhead_s"] > 0
    assert (metrics["darts/latency/slots"], metrics["darts/latency/running_most"]) == (512, 12)
    planned = ("darts/allocation/", "darts/history/", "darts/latency/")
    assert set(metrics) == {name for name in METRICS if name.startswith(planned)}
    budgets = [metrics[f"darts/allocation/{name}"] for name in ("total", "budget_min", "budget_median", "budget_max")]
    assert budgets == [36, plan.budgets.min(), np.median(plan.budgets), plan.budgets.max()]


def test_the_best_total_does_not_jump_from_batch_to_batch():
    """The same history, another order of the prompts, so other draws, in every step."""
    rng = np.random.default_rng(0)
    keys = [f"prompt {number}" for number in range(128)]
    planner = new_planner(LatencyCurve([1, 64, 256], [0.02, 0.022, 0.03]), num_engines=8, max_running=256)
    darts = DartsConfig.from_block({"allocation": {"mode": "adaptive"}, "latency": {"refine": False}}, 8)
    lengths = {key: np.maximum(rng.lognormal(6, rng.uniform(0.2, 0.7), size=16), 1).astype(int) for key in keys}
    costs, single = [], []
    for _ in range(40):
        plan = planner.plan([keys[n] for n in rng.permutation(len(keys))], darts)
        rows = [lengths[key][:budget].tolist() for key, budget in zip(plan.keys, plan.budgets, strict=True)]
        planner.observe(plan, darts, pool_of(rows), 30.0, StepTimes())
        if plan.utility is not None:
            costs.append(plan.times[-1])
            before, planner._times = planner._times, ()
            single.append(planner.plan(plan.keys, darts).times[-1])
            planner._times = before
    assert np.std(costs[20:]) < 0.4 * np.std(single[20:])
    assert np.mean(costs[20:]) == pytest.approx(np.mean(single), rel=0.05)


def test_other_bounds_start_the_moving_mean_anew():
    planner, rng = new_planner(STEEP), np.random.default_rng(0)
    for high in (8, 8, 6):
        darts = darts_of(high=high)
        plan = planner.plan(KEYS, darts)
        observed = [rng.integers(50, 150, size=budget).tolist() for budget in plan.budgets]
        planner.observe(plan, darts, pool_of(observed), 1.0, StepTimes())
    assert len(plan.times) == 6 - LOW + 1


def test_relative_times_are_those_of_their_bounds_also_where_there_are_as_many():
    planner, rng = new_planner(STEEP), np.random.default_rng(0)
    narrow, wide = darts_of(low=4, high=6), darts_of(low=6, high=8)
    for _ in range(2):
        rollout(planner, narrow, rng)
    resumed = new_planner(STEEP)
    resumed.load_state_dict(json.loads(json.dumps(planner.state_dict())))
    fresh = new_planner(STEEP)
    fresh.load_state_dict(planner.state_dict() | {"times": None})
    assert resumed.plan(KEYS, wide).times == fresh.plan(KEYS, wide).times
    assert resumed.plan(KEYS, narrow).times != fresh.plan(KEYS, narrow).times


def test_another_cost_model_starts_relative_times_anew_and_the_same_one_does_not():
    planner, darts, rng = new_planner(STEEP), darts_of(), np.random.default_rng(0)
    for _ in range(3):
        rollout(planner, darts, rng)
    moving = planner.plan(KEYS, darts).times
    planner.use_cost_model(planner.cost)
    assert planner.plan(KEYS, darts).times == moving
    engines = MeasuredEngines(model="", device="", tensor_parallel=1, engines=1, max_num_seqs=8, kv_tokens=700)
    planner.use_cost_model(CostModel(FLAT, "other", engines=engines))
    assert planner.plan(KEYS, darts).times != moving
    assert planner.state_dict()["times"] is None
    assert planner.slots(np.array([100.0, 100.0])) == 700 // 50


def test_a_candidate_adds_to_the_kv_cache_what_it_did_not_find_there():
    planner, darts = new_planner(STEEP), darts_of(mean_candidates=4)
    lengths, whole = [[10, 20, 30, 40]] * 2, np.array([100, 100, 100, 100, 300, 300, 300, 300])
    for cached, expected in ((0, 200.0), (whole // 2, 190.0)):
        plan = planner.plan(["a", "b"], darts)
        planner.observe(plan, darts, pool_of(lengths, prompt_tokens=whole, cached_tokens=cached), 1.0, StepTimes())
        assert planner.prompt_tokens == pytest.approx(expected)
    planner.observe(planner.plan(["a", "b"], darts), darts, pool_of(lengths), 1.0, StepTimes())
    assert planner.prompt_tokens == pytest.approx(190.0), "a pool without prompts says nothing"


@pytest.mark.parametrize(("mode", "order"), [("uniform", [0, 1, 2]), ("adaptive", [2, 1, 0])])
def test_a_forecast_has_engines_queues_limits_and_the_order_of_launch(mode, order):
    """Lengths that do not vary, so it can be reckoned: 2 engines of 2 sequences, responses of at most 35 tokens."""
    planner = new_planner(LatencyCurve([1, 2], [1.0, 1.5]), num_engines=2, max_running=2, response_length=35)
    darts = DartsConfig.from_block({"allocation": {"mode": mode, "mean_candidates": 2, "high": 2}, "selection":
        {"mode": "dual_end", "num_long": 1}, "latency": {"refine": False}}, 2)  # fmt: skip
    lengths = [10, 20, 50]
    state = planner.state_dict() | {"steps": 5}
    prompts = {key: [float(n), 1e-9] for key, n in zip("abc", lengths, strict=True)}
    planner.load_state_dict(state | {"history": {"version": 1, "prompts": prompts}, "cost": planner.cost.state_dict()})
    plan = planner.plan(["a", "b", "c"], darts)
    assert plan.adaptive == (mode == "adaptive")
    assert plan.launch_order.tolist() == order
    # Each engine gets one candidate of each prompt, two run, the third waits for the first slot.
    first, second, third = (min(lengths[prompt], 35) for prompt in order)
    free, other = min(first, second), max(first, second)
    ends = sorted([other, free + third])
    expected = ends[0] * 1.5 + (ends[1] - ends[0]) * 1.0
    assert plan.predicted_s == pytest.approx(expected, rel=0.05)
    assert plan.base_s == pytest.approx(expected, rel=0.05)


def test_the_gain_is_that_of_the_datasets_variation():
    planner, darts = new_planner(STEEP), darts_of(mean_candidates=6)
    plan = planner.plan(["one"], darts)
    planner.observe(plan, darts, pool_of([[50, 150, 50, 150, 50, 150]]), 1.0, StepTimes())
    assert planner.plan(["one"], darts).utility.gain == pytest.approx((50 / 100) * (1 - 4 / 6))


def test_a_forecast_knows_that_early_stop_saves_time():
    planner, rng = new_planner(STEEP), np.random.default_rng(0)
    darts = darts_of(mean_candidates=HIGH)
    rollout(planner, darts, rng, spreads=[60] * 6)
    waits = DartsConfig.from_block({"allocation": {"mean_candidates": HIGH}, "early_stop": "off"}, LOW)
    assert planner.plan(KEYS, darts).predicted_s < 0.9 * planner.plan(KEYS, waits).predicted_s


def test_more_engines_are_faster_and_a_limit_of_sequences_slower():
    predicted = {}
    for name, changes in (("one", {}), ("two", {"num_engines": 2}), ("limited", {"max_running": 2})):
        planner = new_planner(FLAT if name == "limited" else STEEP, **changes)
        darts, rng = darts_of(mean_candidates=6), np.random.default_rng(0)
        rollout(planner, darts, rng)
        predicted[name] = planner.plan(KEYS, darts).predicted_s
    unlimited = new_planner(FLAT)
    rollout(unlimited, darts_of(mean_candidates=6), np.random.default_rng(0))
    assert predicted["two"] < predicted["one"]
    assert predicted["limited"] > 3 * unlimited.plan(KEYS, darts_of(mean_candidates=6)).predicted_s


def test_refinement_can_be_switched_off():
    planner, rng = new_planner(STEEP), np.random.default_rng(0)
    darts = DartsConfig.from_block({"latency": {"refine": False}}, LOW)
    for _ in range(3):
        *_, metrics = rollout(planner, darts, rng, seconds=99.0)
    assert (planner.cost.curve, planner.cost.overhead_s(36)) == (STEEP, 0.0)
    assert "darts/latency/overhead_s" not in metrics


def test_a_planner_that_loads_the_state_goes_on_as_the_saved_one():
    darts, rng = darts_of(), np.random.default_rng(0)
    first = new_planner(STEEP)
    for _ in range(3):
        rollout(first, darts, rng)
    second = new_planner()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.cost.source == "test"
    for step in range(4):
        plans = [
            rollout(planner, darts, np.random.default_rng(step), seconds=1.5 + step)[0] for planner in (first, second)
        ]
        assert plans[0].budgets.tolist() == plans[1].budgets.tolist()
        assert (plans[0].utility, plans[0].predicted_s) == (plans[1].utility, plans[1].predicted_s)
    assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version=1: must be 2"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": "3"}, "steps='3'"),
        ({"history": None}, "state=None"),
        ({"history": {"version": 1, "prompts": {"a": [1.0]}}}, r"\['a'\]"),
        ({"cost": {"curve": None}}, "cost model="),
        ({"times": 3}, "times=3: must be null, or bounds"),
        ({"times": [1.0]}, "times="),
        ({"times": {"bounds": [4, 5], "means": [1.0, float("nan")]}}, "times="),
        ({"times": {"bounds": [4, 5], "means": [1.0]}}, "times="),
        ({"times": {"bounds": [4], "means": [1.0]}}, "times="),
        ({"prompt_tokens": None}, "prompt_tokens=None"),
        ({"prompt_tokens": -1}, "prompt_tokens=-1"),
        ({"correction": [1.0]}, "correction="),
        ({"correction": [1.0, float("nan")]}, "correction="),
        ({"lengths": None}, "length model=None"),
        ({"lengths": {"evidence": [[0.0]], "known": 0.0, "centers": None}}, "length model="),
    ],
)
def test_a_state_that_cannot_be_used_is_refused_and_changes_nothing(change, message):
    planner, rng = new_planner(STEEP), np.random.default_rng(0)
    rollout(planner, darts_of(), rng)
    before = planner.state_dict()
    with pytest.raises(ValueError, match=message):
        planner.load_state_dict(before | change)
    assert planner.state_dict() == before
    with pytest.raises(ValueError, match="must be a mapping"):
        planner.load_state_dict([1])


def test_heavy_prompts_start_first_and_on_different_workers():
    planner, darts = new_planner(), darts_of(mean_candidates=5)
    plan = planner.plan(KEYS, darts)
    lengths = [[60, 140, 60, 140, 100]] + [[100, 100, 100, 100, 101]] * 5
    lengths[2] = lengths[0]
    planner.observe(plan, darts, pool_of(lengths), 1.0, StepTimes())
    plan = planner.plan(KEYS, darts)
    assert plan.budgets.tolist() == [7, 4, 7, 4, 4, 4]
    assert sorted(part[0] for part in plan.parts(2)) == [0, 2]
    assert set(plan.launch_order[:2]) == {0, 2}


def test_an_empty_batch_gives_an_empty_plan():
    planner, darts, rng = new_planner(STEEP), darts_of(), np.random.default_rng(0)
    assert planner.plan([], darts).budgets.tolist() == []
    rollout(planner, darts, rng)
    plan = planner.plan([], darts)
    assert plan.budgets.tolist() == []
    assert plan.parts(3) == []


def test_prompts_that_never_vary_get_uniform_budgets():
    planner, darts = new_planner(STEEP), darts_of(mean_candidates=5)
    plan = planner.plan(KEYS, darts)
    planner.observe(plan, darts, pool_of([[7] * budget for budget in plan.budgets]), 1.0, StepTimes())
    assert planner.plan(KEYS, darts).budgets.tolist() == [5] * 6


plans = st.lists(st.tuples(st.integers(LOW, HIGH), st.integers(1, 99)), max_size=30)


def plan_of(prompts, adaptive) -> Plan:
    """A plan of these budgets and mean lengths."""
    budgets, mean = np.array(prompts, dtype=np.int64).reshape(-1, 2).T
    known, keys = np.ones(len(prompts), dtype=bool), [str(number) for number in range(len(prompts))]
    return Plan(keys=keys, budgets=budgets, std=np.ones(len(prompts)), known=known, mean=mean * 1.0, adaptive=adaptive)


@given(plans, st.booleans(), st.integers(1, 6))
def test_parts_and_priorities_follow_the_order_of_launch(prompts, adaptive, num_parts):
    plan = plan_of(prompts, adaptive)
    order = plan.launch_order.tolist()
    assert sorted(order) == list(range(len(prompts)))
    parts = plan.parts(num_parts)
    assert sorted(prompt for part in parts for prompt in part.tolist()) == sorted(order)
    for part in parts:
        assert [order.index(prompt) for prompt in part] == sorted(order.index(prompt) for prompt in part)
    first = plan.priorities.tolist()
    numbers = [first[prompt] + candidate for prompt in order for candidate in range(plan.budgets[prompt])]
    assert numbers == list(range(plan.budgets.sum())), "each candidate has its own"


@given(plans)
def test_the_order_is_by_expected_tokens_and_where_budgets_are_uniform_by_the_batch(prompts):
    work = [budget * length for budget, length in prompts]
    heaviest = sorted(range(len(prompts)), key=lambda prompt: (-work[prompt], prompt))
    assert plan_of(prompts, True).launch_order.tolist() == heaviest
    plan = plan_of(prompts, False)
    assert plan.launch_order.tolist() == list(range(len(prompts)))
    assert plan.priorities.tolist() == (np.cumsum(plan.budgets) - plan.budgets).tolist()


def test_an_order_by_hand():
    plan = plan_of([(8, 90), (5, 10), (8, 99), (7, 20), (4, 30)], True)
    assert plan.launch_order.tolist() == [2, 0, 3, 4, 1]
    assert plan.priorities.tolist() == [8, 27, 0, 16, 23]
    assert [part.tolist() for part in plan.parts(1)] == [[2, 0, 3, 4, 1]]
