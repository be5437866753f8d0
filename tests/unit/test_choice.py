"""The choice of candidates and spare prompts: the grid, its costs against the simulator's, and what must not happen."""

import json

import numpy as np
import pytest

from darts.choice import choose, options_of
from darts.config import DartsConfig
from darts.forecast import CostModel, MeasuredEngines
from darts.latency import LatencyCurve
from darts.planning import RolloutPlanner
from darts.simulation.costs import Cluster, StepCosts
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Setting, replay
from darts.simulation.trace import LengthTrace, PromptLengths

FAST = DartsConfig.from_block({"preset": "fast"}, group_size=8)
LATENCY_BOUND = LatencyCurve([1, 1024], [0.02, 0.0201])
COMPUTE_BOUND = LatencyCurve([1, 1024], [0.001, 1.0])


def seconds_by(curve, engines=1):
    model = CostModel(curve, "test")
    return lambda decoded: model.seconds(decoded, engines, None)


def prompts(rng, count=400, tail=0.6):
    mean = np.exp(rng.normal(6, 0.4, count))
    return mean, tail * mean


def test_the_grid_is_what_the_settings_leave_open():
    assert options_of(FAST) == [(count, spare) for count in (8, 9, 10, 12) for spare in (0.0, 0.05, 0.1, 0.2)]
    block = {"preset": "fast", "spare_prompts": 0.3}
    assert options_of(DartsConfig.from_block(block, 8)) == [(count, 0.3) for count in (8, 9, 10, 12)]
    block = {"preset": "fast", "allocation": {"mean_candidates": 9}}
    assert {count for count, _ in options_of(DartsConfig.from_block(block, 8))} == {9}
    block = {"preset": "fast", "allocation": {"high": 9}}
    assert {count for count, _ in options_of(DartsConfig.from_block(block, 8))} == {8, 9}
    assert {count for count, _ in options_of(DartsConfig.from_block({"preset": "fast"}, 4))} == {4, 5, 6}


def test_where_tokens_are_all_that_counts_nothing_is_launched_beyond_the_batch():
    mean, std = prompts(np.random.default_rng(0))
    assert choose(seconds_by(COMPUTE_BOUND), mean, std, FAST, 64, 8192).option == (8, 0.0)


def test_where_the_slowest_is_all_that_counts_spare_prompts_pay():
    mean, std = prompts(np.random.default_rng(0))
    choice = choose(seconds_by(LATENCY_BOUND), mean, std, FAST, 64, 8192)
    assert choice.spare_prompts > 0
    assert choice.seconds[choice.option] < 0.9 * choice.seconds[8, 0.0]
    assert choice.tokens[choice.option] <= 1.25
    assert str(choice).count("%") == 16
    assert str(choice).index(f"{choice.candidates} + {choice.spare_prompts:.0%}") < str(choice).index("not")


def test_no_choice_generates_more_than_a_quarter_more_even_where_it_would_be_faster():
    mean, std = prompts(np.random.default_rng(0), tail=0.2)
    choice = choose(seconds_by(LATENCY_BOUND), mean, std, FAST, 64, 100_000)
    too_many = [option for option, tokens in choice.tokens.items() if tokens > 1.25]
    assert too_many
    assert choice.option not in too_many


@pytest.mark.parametrize("curve", [LATENCY_BOUND, LatencyCurve([1, 32, 128, 512], [0.010, 0.011, 0.02, 0.06])])
def test_its_seconds_are_those_of_the_simulator(curve):
    """Log-normal lengths whose moments are known, 32 prompts a step, 4 engines."""
    rng = np.random.default_rng(1)
    mean, std = prompts(rng, 320, tail=0.5)
    log_variance = np.log1p((std / mean) ** 2)[:, None]
    draws = rng.standard_normal((320, 64))
    lengths = np.exp(np.log(mean)[:, None] - log_variance / 2 + np.sqrt(log_variance) * draws)
    lengths = np.clip(np.ceil(lengths), 1, 2000).astype(np.int64)
    trace = LengthTrace(
        name="known",
        prompts=[
            PromptLengths(step=1, key=str(n), lengths=row, truncated=row == 2000, reward=np.full(64, np.nan))
            for n, row in enumerate(lengths)
        ],
    )
    nothing = StepCosts(**dict.fromkeys(("rollout_s", "log_prob_s", "update_s", "sync_s", "other_s"), 0.0))
    setting = Setting(
        num_prompts=32, group_size=8, response_length=2000, curve=curve, cluster=Cluster(gpus=4), costs=nothing
    )
    choice = choose(seconds_by(curve, engines=4), mean, std, FAST, 32, 2000)
    for count, spare in ((8, 0.0), (9, 0.05), (8, 0.2)):
        block = {"preset": "fast", "spare_prompts": spare, "allocation": {"mean_candidates": count}}
        steps = list(replay(ReplayArm(name="one", block=block), setting, Dataset(trace, 16), 96))
        measured = np.mean([step.time.rollout for step in steps])
        assert choice.seconds[count, spare] == pytest.approx(measured, rel=0.06), (count, spare)


def test_without_redundancy_a_lower_bound_above_m_does_not_matter():
    mean, std = prompts(np.random.default_rng(0))
    darts = DartsConfig.from_block({"preset": "fast", "allocation": {"mode": "off", "low": 10}}, group_size=8)
    assert choose(seconds_by(LATENCY_BOUND), mean, std, darts, 64, 8192).candidates == 8


def test_a_resumed_planner_chooses_what_the_saved_one_did_also_where_the_kv_cache_bounds_what_runs():
    planner = RolloutPlanner(ema_weight=0.3, response_length=4096, num_engines=2, max_running=512)
    engines = MeasuredEngines(model="m", device="d", tensor_parallel=1, engines=2, max_num_seqs=512, kv_tokens=30_000)
    planner.use_cost_model(CostModel(LatencyCurve([1, 64, 512], [0.02, 0.03, 0.1]), "test", engines=engines))
    for number in range(40):
        planner.history.update(str(number), [300 + number, 500, 900, 400], [False] * 4)
    resumed = RolloutPlanner(ema_weight=0.3, response_length=4096, num_engines=2, max_running=512)
    resumed.load_state_dict(json.loads(json.dumps(planner.state_dict())))
    assert resumed.kv_tokens == 30_000
    assert resumed.choose(64, FAST) == planner.choose(64, FAST)


def test_the_planner_chooses_once_it_knows_lengths_and_engines():
    planner = RolloutPlanner(ema_weight=0.3, response_length=4096, num_engines=2)
    assert planner.choose(16, FAST) is None
    planner.use_cost_model(CostModel(LATENCY_BOUND, "test"))
    assert planner.choose(16, FAST) is None
    for number in range(40):
        planner.history.update(str(number), [300 + number, 500, 900, 400], [False] * 4)
    first = planner.choose(16, FAST)
    assert first.option == planner.choose(16, FAST).option, "not by chance"
    assert set(first.seconds) == set(options_of(FAST))
