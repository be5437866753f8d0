"""A strategy over many steps: the trace's lengths through the method's own code.

Contract: pure, but for a line of `progress`. `Strategy` says which prompts a round launches, by which rules, and when
it ends; `RolloutPlanner` plans and learns; `darts.simulation.rollout` runs the groups.

1. New prompts come in the trace's order, those of the strategy's queue with fresh draws of their candidates. All
   strategies get the same draws for the same prompt, epoch and launch.
2. Exactly `num_prompts` prompts with M rows each are trained on at every step.
3. What is not asked of the planner in a run (`darts.training.trainer`) is not asked here: plain rounds have no plan,
   and there is no cost model where `darts.latency.profile` or the allocation does without.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.config import DartsConfig
from darts.forecast import CostModel
from darts.latency import LatencyCurve, StepTimes
from darts.planning import RolloutPlanner
from darts.simulation import progress
from darts.simulation.bound import Throughput, shortest
from darts.simulation.costs import Cluster, StepCosts, StepTime
from darts.simulation.draws import Dataset
from darts.simulation.rollout import SimulatedRollout
from darts.strategy import BYPASS_MODE, Strategy, make_strategy

Reshape = Callable[[NDArray[np.int64], int], NDArray[np.int64]]
"""Lengths and the number of steps that were trained before -> lengths; see `darts.simulation.shaping`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayArm:
    """What is compared. Example: `ReplayArm(name="L=2", block={"strategy": "darts", "selection": {"num_long": 2}})`."""

    name: str
    block: Mapping[str, Any] = field(default_factory=dict)  # `darts:`
    bypass: bool = False  # with verl's `BYPASS_MODE`, whatever the strategy

    def bypasses(self, strategy: Strategy) -> bool:
        """Whether the servers' log-probs are taken for the old ones."""
        return self.bypass or bool(strategy.settings.get(BYPASS_MODE, False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all strategies have in common."""

    num_prompts: int  # `data.train_batch_size`
    group_size: int  # M
    response_length: int
    curve: LatencyCurve
    cluster: Cluster
    costs: StepCosts = field(default_factory=StepCosts)

    def strategy(self, arm: ReplayArm) -> Strategy:
        """An arm's strategy.

        Raises:
            ConfigError: settings that cannot work.
        """
        block = {"placement": self.cluster.placement, **arm.block}
        return make_strategy(DartsConfig.from_block(block, self.group_size), self.num_prompts)

    def width(self, *arms: ReplayArm) -> int:
        """Most candidates that one of the arms may launch for a prompt."""
        all_rules = [self.strategy(arm).next_round().rules for arm in arms]
        allocations = [rules.allocation for rules in all_rules if rules.enable and rules.allocation.mode != "off"]
        return max([self.group_size, *(allocation.high for allocation in allocations)])

    def throughput(self) -> Throughput:
        """What the engines can give at most."""
        return Throughput(self.curve, self.cluster.engines, self.cluster.max_num_seqs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulatedStep:
    """One simulated step."""

    time: StepTime
    prompts: int  # launched
    launched: int  # candidates
    generated: int  # tokens
    kept: int  # tokens that are trained on
    longest_kept: int  # tokens
    reward_kept: float  # mean; NaN where the trace has none
    reward_pool: float  # mean of the candidates that ended by themselves
    slot_s: float  # in which slots ran a sequence
    slot_capacity_s: float  # of the slots that the rollout could fill
    bound: StepTime  # of an oracle that trains on the same prompts
    oracle: NDArray[np.int64]  # lengths that it keeps, shape [num_prompts, M]
    queue: int  # prompts that are to come again
    saturated: float  # share of the prompts with M_up candidates

    def of_oracle(self) -> "SimulatedStep":
        """The step of the oracle; what is not known of it is NaN."""
        unknown = dict.fromkeys(("slot_s", "slot_capacity_s", "saturated", "reward_kept", "reward_pool"), math.nan)
        tokens = {"generated": self.oracle.sum(), "kept": self.oracle.sum(), "longest_kept": self.oracle.max()}
        return replace(self, time=self.bound, launched=self.oracle.size, **tokens, **unknown)


def replay(
    arm: ReplayArm, setting: Setting, dataset: Dataset, num_steps: int, reshape: Reshape | None = None
) -> Iterator[SimulatedStep]:
    """The steps of a strategy, one after the other.

    Args:
        dataset: candidates; at least as wide as the most that the arm launches (`Setting.width`).
        reshape: moves the lengths of later steps; None: lengths as they were recorded.

    Raises:
        ConfigError: settings that cannot work.
    """
    # The strategy, the planner with its cost model, and the bound.
    cluster, costs, strategy, throughput = setting.cluster, setting.costs, setting.strategy(arm), setting.throughput()
    darts = strategy.darts
    planner = RolloutPlanner(
        ema_weight=darts.allocation.ema_weight,
        response_length=setting.response_length,
        num_engines=cluster.engines,
        max_running=cluster.max_num_seqs,
    )
    latency = darts.latency.profile
    if latency != "off" and (latency != "auto" or strategy.needs_cost_model):
        planner.cost = CostModel(setting.curve, "simulated")
    next_row, row_launches = 0, {}  # launches of rows that are queued
    for steps_done in range(num_steps):
        # 1. The prompts, and lengths of their candidates.
        round_ = strategy.next_round()
        rules = round_.rules
        dataset_rows = [*round_.queued, *range(next_row, next_row + round_.new)]
        next_row += round_.new
        drawn_candidates = dataset.draw(dataset_rows, [row_launches.get(row, 0) for row in dataset_rows])
        lengths = drawn_candidates.lengths if reshape is None else reshape(drawn_candidates.lengths, steps_done)
        # 2. How many candidates each launches, and in which order.
        plan, budgets, launch_order = None, np.full(len(dataset_rows), setting.group_size), None
        if rules.enable:
            keys = [dataset.keys[row % len(dataset)] for row in dataset_rows]
            plan = planner.plan(keys, rules, round_.harvest)
            budgets, launch_order = plan.budgets, plan.launch_order.tolist()
        # 3. The rollout.
        is_launched = np.arange(dataset.width) < budgets[:, None]
        outcome = SimulatedRollout(
            lengths[is_launched],
            drawn_candidates.truncated[is_launched],
            budgets,
            rules,
            cluster,
            setting.curve,
            order=launch_order,
            harvest=round_.harvest,
        ).run()
        pool, count, num_rows = outcome.pool, len(outcome.complete), int(outcome.pool.kept.sum())
        if count != setting.num_prompts or num_rows != setting.group_size * count:
            raise RuntimeError(
                f"{count} prompts with {num_rows} rows were to be trained on, not {setting.num_prompts} with "
                f"{setting.group_size} each: the strategy {darts.strategy} breaks the contract of darts.strategy."
            )
        kept_lengths = pool.length[pool.kept]
        seconds_of = partial(costs.time, cluster, overlap=rules.enable and rules.overlap.mode != "off")
        num_tokens, is_bypassed = int(kept_lengths.sum()), arm.bypasses(strategy)
        step_time = seconds_of(outcome.seconds, len(pool), num_tokens, bypass=is_bypassed)
        # 4. What is learnt of it, and who comes again.
        if plan is not None:
            planner.observe(plan, rules, pool, max(step_time.rollout, 1e-9), StepTimes())
        strategy.ended(dataset_rows, outcome.complete)
        if strategy.plans:
            strategy.choice = planner.choose(setting.num_prompts, strategy.rules)
        launched_rows = set(dataset_rows)
        row_launches = {row: row_launches.get(row, 0) + (row in launched_rows) for row in strategy.queue}
        # 5. What is told of it, beside the oracle's step.
        progress(f"{cluster.gpus} GPUs, {arm.name}, seed {dataset.seed}: step {steps_done + 1}/{num_steps}")
        oracle = shortest(lengths[outcome.complete], setting.group_size)
        num_slots = min(cluster.max_num_seqs, -(-len(pool) // cluster.engines)) * cluster.engines
        reward = np.where(pool.cut, np.nan, drawn_candidates.reward[is_launched])  # nobody knows that of a part
        yield SimulatedStep(
            time=step_time,
            prompts=len(budgets),
            launched=len(pool),
            generated=int(pool.length.sum()),
            kept=num_tokens,
            longest_kept=int(kept_lengths.max()),
            reward_kept=float(reward[pool.kept].mean()),
            reward_pool=float(reward[~pool.aborted & ~pool.cut].mean()),
            slot_s=outcome.slot_seconds,
            slot_capacity_s=num_slots * outcome.seconds,
            bound=seconds_of(throughput.least_seconds(oracle), oracle.size, int(oracle.sum()), bypass=True),
            oracle=oracle,
            queue=len(strategy.queue),
            saturated=float((budgets >= rules.allocation.high).mean()) if rules.enable else 0.0,
        )
