"""A strategy over many steps: the trace's lengths through the method's own code.

Contract: pure. `Strategy` says which prompts a round launches, by which rules, and when it ends; `RolloutPlanner` plans
and learns; `darts.simulation.rollout` runs the groups.

1. New prompts come in the trace's order, those of the strategy's queue with fresh draws of their candidates. All
   strategies get the same draws for the same prompt, epoch and launch.
2. Exactly `num_prompts` prompts with M rows each are trained on at every step.
3. What is not asked of the planner in a run (`darts.training.trainer`) is not asked here: plain rounds have no plan,
   and there is no cost model where `darts.latency.profile` or the allocation does without.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.config import DartsConfig
from darts.forecast import CostModel
from darts.latency import LatencyCurve, StepTimes
from darts.planning import RolloutPlanner
from darts.simulation.bound import Throughput, shortest
from darts.simulation.cluster import Cluster
from darts.simulation.costs import StepCosts, StepTime
from darts.simulation.draws import Dataset
from darts.simulation.rollout import Outcome, run_rollout
from darts.strategy import BYPASS_MODE, Strategy, make_strategy

Reshape = Callable[[NDArray[np.int64], int], NDArray[np.int64]]
"""Lengths and the number of steps that were trained before -> lengths; see `darts.simulation.shaping`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayArm:
    """What is compared. Example: `ReplayArm(name="L=2", block={"strategy": "darts", "selection": {"num_long": 2}})`."""

    name: str
    block: Mapping[str, Any] = field(default_factory=dict)  # `darts:`
    bypass: bool = False  # with verl's `BYPASS_MODE`, whatever the strategy

    def config(self, group_size: int, placement: str) -> DartsConfig:
        """The settings.

        Raises:
            ConfigError: what `DartsConfig.from_block` refuses.
        """
        return DartsConfig.from_block({"placement": placement, **self.block}, group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all strategies have in common."""

    num_prompts: int  # `data.train_batch_size`
    group_size: int  # M
    response_length: int
    curve: LatencyCurve
    cluster: Cluster
    costs: StepCosts = field(default_factory=StepCosts)


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


def replay(
    arm: ReplayArm, setting: Setting, dataset: Dataset, num_steps: int, reshape: Reshape | None = None
) -> Iterator[SimulatedStep]:
    """The steps of a strategy, one after the other.

    Args:
        dataset: candidates; at least as wide as the most that the arm launches (`width`).
        reshape: moves the lengths of later steps; None: lengths as they were recorded.

    Raises:
        ConfigError: settings that cannot work.
    """
    replay_state = _Replay(arm, setting, dataset, reshape)
    for steps_done in range(num_steps):
        yield replay_state.step(steps_done)


def width(arm: ReplayArm, setting: Setting) -> int:
    """Most candidates that an arm may launch for a prompt."""
    strategy = make_strategy(arm.config(setting.group_size, setting.cluster.placement), setting.num_prompts)
    rules = strategy.next_round().rules
    most_candidates = rules.allocation.high if rules.enable and rules.allocation.mode != "off" else setting.group_size
    return max(most_candidates, setting.group_size)


def bypasses(arm: ReplayArm, strategy: Strategy) -> bool:
    """Whether the servers' log-probs are taken for the old ones."""
    return arm.bypass or bool(strategy.overrides.get(BYPASS_MODE, False))


class _Replay:
    """The state of `replay`."""

    def __init__(self, arm: ReplayArm, setting: Setting, dataset: Dataset, reshape: Reshape | None) -> None:
        self.setting, self.dataset, self.reshape = setting, dataset, reshape
        cluster = setting.cluster
        self.darts = arm.config(setting.group_size, cluster.placement)
        self.strategy: Strategy = make_strategy(self.darts, setting.num_prompts)
        self.bypass = bypasses(arm, self.strategy)
        self.planner = RolloutPlanner(
            ema_weight=self.darts.allocation.ema_weight,
            response_length=setting.response_length,
            num_engines=cluster.engines,
            max_running=cluster.max_num_seqs,
        )
        latency = self.darts.latency.profile
        if latency != "off" and (latency != "auto" or self.strategy.rules.allocation.mode == "adaptive"):
            self.planner.cost = CostModel(setting.curve, "simulated")
        self.throughput = Throughput(setting.curve, cluster.engines, cluster.max_num_seqs)
        self.next_row = 0
        self.launches: dict[int, int] = {}  # of rows that are queued

    def step(self, done: int) -> SimulatedStep:
        """The next step; so many are done."""
        # 1. The prompts, and lengths of their candidates.
        setting, round_ = self.setting, self.strategy.next_round()
        rules = round_.rules
        dataset_rows = [*round_.queued, *range(self.next_row, self.next_row + round_.new)]
        self.next_row += round_.new
        drawn_candidates = self.dataset.draw(dataset_rows, [self.launches.get(row, 0) for row in dataset_rows])
        lengths = drawn_candidates.lengths if self.reshape is None else self.reshape(drawn_candidates.lengths, done)
        # 2. How many candidates each launches, and in which order.
        plan, budgets, launch_order = None, np.full(len(dataset_rows), setting.group_size), None
        if rules.enable:
            plan = self.planner.plan([self.dataset.key(row) for row in dataset_rows], rules)
            budgets, launch_order = plan.budgets, plan.launch_order.tolist()
        # 3. The rollout.
        is_launched = np.arange(self.dataset.width) < budgets[:, None]
        outcome = run_rollout(
            lengths[is_launched],
            drawn_candidates.truncated[is_launched],
            budgets,
            rules,
            setting.cluster.fleet(setting.curve, int(budgets.sum())),
            order=launch_order,
            harvest=round_.harvest,
        )
        self._check(outcome)
        step_time = self._seconds(outcome.seconds, len(outcome.length), outcome.length[outcome.kept], rules)
        # 4. What is learnt of it, and who comes again.
        if plan is not None:
            self.planner.observe(plan, rules, outcome.pool(rules), max(step_time.rollout, 1e-9), StepTimes())
        self.strategy.ended(dataset_rows, outcome.complete)
        launched_rows = set(dataset_rows)
        self.launches = {row: self.launches.get(row, 0) + (row in launched_rows) for row in self.strategy.queue}
        return self._measured(outcome, step_time, rules, lengths, drawn_candidates.reward[is_launched])

    def _check(self, outcome: Outcome) -> None:
        count, wanted, size = len(outcome.complete), self.setting.num_prompts, self.setting.group_size
        if count != wanted or outcome.kept.sum() != size * count:
            raise RuntimeError(
                f"{count} prompts with {outcome.kept.sum()} rows were to be trained on, not {wanted} with {size} each: "
                f"the strategy {self.darts.strategy} breaks the contract of darts.strategy."
            )

    def _seconds(
        self, decode_s: float, launched: int, trained: NDArray[np.int64], rules: DartsConfig, bypass: bool | None = None
    ) -> StepTime:
        """A step that trains on responses of these lengths."""
        return self.setting.costs.time(
            decode_s=decode_s,
            launched=launched,
            tokens=int(trained.sum()),
            cluster=self.setting.cluster,
            bypass=self.bypass if bypass is None else bypass,
            overlap=rules.enable and rules.overlap.mode != "off",
        )

    def _measured(
        self,
        outcome: Outcome,
        step_time: StepTime,
        rules: DartsConfig,
        lengths: NDArray[np.int64],
        reward: NDArray[np.float64],
    ) -> SimulatedStep:
        cluster, kept_lengths = self.setting.cluster, outcome.length[outcome.kept]
        oracle = shortest(lengths[outcome.complete], self.setting.group_size)
        num_slots = min(cluster.max_num_seqs, -(-len(outcome.length) // cluster.engines)) * cluster.engines
        return SimulatedStep(
            time=step_time,
            prompts=len(outcome.budgets),
            launched=len(outcome.length),
            generated=int(outcome.length.sum()),
            kept=int(kept_lengths.sum()),
            longest_kept=int(kept_lengths.max()),
            reward_kept=float(reward[outcome.kept].mean()),
            reward_pool=float(reward[~outcome.aborted].mean()),
            slot_s=outcome.slot_seconds,
            slot_capacity_s=num_slots * outcome.seconds,
            bound=self._seconds(self.throughput.least_seconds(oracle), oracle.size, oracle, rules, bypass=True),
            oracle=oracle,
            queue=len(self.strategy.queue),
            saturated=float((outcome.budgets >= rules.allocation.high).mean()) if rules.enable else 0.0,
        )
