"""Plans of engines whose KV cache, not `max_num_seqs`, bounds what runs: a total costs what they say."""

from dataclasses import dataclass

import numpy as np
import pytest
from pools import pool_of

from darts.allocation import allocate
from darts.config import DartsConfig
from darts.forecast import CostModel
from darts.latency import LatencyCurve, StepTimes, decode_seconds
from darts.planning import RolloutPlanner, launch_order

GROUP, HIGH, MAX_NUM_SEQS, ROOM, LIMIT = 8, 16, 512, 64, 8192
CURVE = LatencyCurve([1, 16, 64, 256, 512], [0.010, 0.011, 0.014, 0.02, 0.03])
RULES = DartsConfig.from_block({"early_stop": "off", "allocation": {"mode": "adaptive", "high": HIGH}}, GROUP)


@dataclass
class KvBound:
    """Engines with room for 64 sequences and prompts of which each engine gets 256 candidates, or 512 at M_up."""

    engines: int
    draws: int  # of what a total takes

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.prompts = 32 * self.engines
        self.mean = rng.uniform(500, 1000, self.prompts)
        self.spread = rng.uniform(0.1, 0.4, self.prompts)
        tokens = np.concatenate(self.lengths(rng, [50] * self.prompts))
        self.kv_tokens = int(ROOM * (tokens**2).sum() / (2 * tokens.sum()))

    def lengths(self, rng, budgets):
        """Lengths of each prompt's candidates."""
        sigma = np.sqrt(np.log1p(self.spread**2))
        drawn = [
            mean * np.exp(rng.normal(-(shape**2) / 2, shape, budget))
            for mean, shape, budget in zip(self.mean, sigma, budgets, strict=True)
        ]
        return [np.clip(np.ceil(row), 1, LIMIT) for row in drawn]

    def run(self, rng, budgets, order):
        """A rollout: its pool, its seconds, and what the engines show of it."""
        lengths = self.lengths(rng, budgets)
        launched = np.concatenate([lengths[prompt] for prompt in order])
        step_times = StepTimes()
        seconds = max(self.engine(launched[number :: self.engines], step_times) for number in range(self.engines))
        return pool_of([row.astype(int).tolist() for row in lengths]), seconds, step_times

    def engine(self, lengths, step_times):
        """Seconds of an engine with 64 slots."""
        step_times.add(ROOM, CURVE(ROOM) * 1000, 1000)
        return float(decode_seconds(lengths, CURVE, ROOM))


class KvBlocks(KvBound):
    """The same as vLLM's scheduler does it: who finds a block goes on, who finds none is preempted, the last first.

    Blocks are of one token, prompts of none, and what was preempted is not computed again.
    """

    def engine(self, lengths, step_times):
        waiting, running, seconds = [(0, int(length)) for length in lengths[::-1]], [], 0.0  # (tokens, length)
        while running or waiting:
            # 1. Each running one gets a block, or the last ones make room.
            held = sum(tokens + 1 for tokens, _ in running)
            is_full = held > self.kv_tokens
            while held > self.kv_tokens:
                waiting.append(running.pop())
                held -= waiting[-1][0] + 1
            # 2. Those that wait start, if nobody was preempted.
            while waiting and not is_full and len(running) < MAX_NUM_SEQS:
                if held + waiting[-1][0] + 1 > self.kv_tokens:
                    break
                running.append(waiting.pop())
                held += running[-1][0] + 1
            # 3. As many steps as none ends in, none starts in and there is room for.
            count, steps = len(running), min(length - tokens for tokens, length in running)
            steps = min(steps, (self.kv_tokens - held) // count + 1)
            step_times.add(count, CURVE(count) * steps, steps)
            seconds += CURVE(count) * steps
            running = [(tokens + steps, length) for tokens, length in running if tokens + steps < length]
        return seconds


def planned(world, kv_tokens):
    """A plan after some rollouts."""
    planner = RolloutPlanner(ema_weight=0.3, response_length=LIMIT, num_engines=world.engines, max_running=MAX_NUM_SEQS)
    planner.cost, planner.kv_tokens = CostModel(CURVE, "test"), kv_tokens
    keys, rng = [f"prompt {number}" for number in range(world.prompts)], np.random.default_rng(1)
    for _ in range(5):
        plan = planner.plan(keys, RULES)
        pool, seconds, step_times = world.run(rng, plan.budgets, plan.launch_order)
        _, metrics = planner.observe(plan, RULES, pool, seconds, step_times)
    return planner.plan(keys, RULES), metrics


def true_cost(world, plan, mean):
    """T: seconds with so many candidates in the mean over those with M, minus 1."""

    def seconds_of(mean_budget):
        budgets = allocate(plan.std / plan.std.mean(), mean_budget * world.prompts, GROUP, HIGH)
        order, rng = launch_order(budgets, plan.mean, adaptive=True), np.random.default_rng(2)
        return np.mean([world.run(rng, budgets, order)[1] for _ in range(world.draws)])

    return seconds_of(mean) / seconds_of(GROUP) - 1


@pytest.mark.parametrize(
    ("world", "means"), [(KvBound(engines=8, draws=16), (12, HIGH)), (KvBlocks(engines=2, draws=6), (HIGH,))]
)
def test_what_a_plan_says_of_candidates_is_what_they_cost(world, means):
    plan, metrics = planned(world, world.kv_tokens)
    for mean in means:
        assert plan.times[mean - GROUP] - 1 == pytest.approx(true_cost(world, plan, mean), rel=0.2)
    assert 0.6 < true_cost(world, plan, HIGH) < 1.0, "what is simulated is bound by KV cache"
    assert plan.budgets.mean() < HIGH
    assert metrics["darts/latency/slots"] == pytest.approx(ROOM, rel=0.1)
    assert metrics["darts/latency/predicted_over_measured"] == pytest.approx(1, abs=0.2)


def test_a_plan_that_does_not_know_of_the_kv_cache_takes_candidates_for_cheaper():
    world = KvBound(engines=8, draws=16)
    plan, _ = planned(world, None)
    assert plan.times[-1] - 1 < 0.8 * true_cost(world, plan, HIGH)
