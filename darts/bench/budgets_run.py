"""Rollouts of one server, planned by a planner of the arm's own; with a forecast that does not learn about time.

Contract: `Arm.rollout` is one rollout of `darts.bench.rollouts_run.Bench`, with the arm's settings and planner. The
arm's shadow plans the same prompts before it and observes the same candidates after it, with the measured curve as it
was and without overhead. So both have the same length history and budgets, which is asserted, and their forecasts
differ by the refinement of the cost model alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig

from darts.bench.rollouts_run import Bench, Measured, batch_of
from darts.config import DartsConfig
from darts.forecast import CostModel
from darts.history import prompt_key
from darts.latency import LatencyCurve, StepTimes
from darts.planning import RolloutPlanner

METRICS = {
    "pool_mean": "darts/length/pool_mean",
    "saturated_share": "darts/group/saturated_share",
    "budget_min": "darts/allocation/budget_min",
    "budget_max": "darts/allocation/budget_max",
    "known_share": "darts/history/known_share",
    "std_correlation": "darts/history/std_correlation",
    "refined_s": "darts/latency/predicted_s",
    "overhead_s": "darts/latency/overhead_s",
}
"""What a record has besides that of `Measured`, by the metric; None where there is none."""


class PlannedBench(Bench):
    """A bench whose rollouts are planned by the planner that is given."""

    def planned(self, planner: RolloutPlanner, darts: DartsConfig, questions: Sequence[str], step: int) -> Measured:
        """As `rollout`; `planner` replaces the manager's, as `rollout` replaces its settings."""
        self._manager.planner = planner
        return self.rollout(darts, questions, step)


class Arm:
    """Settings, and what their rollouts have taught.

    Args:
        darts: The settings, with a mean number of candidates: the shadow's budgets must not depend on its cost model.
        curve: Of the engine, as measured.
        config: The servers'.
    """

    def __init__(self, darts: DartsConfig, curve: LatencyCurve, config: DictConfig) -> None:
        self._darts = darts
        self._unrefined = dataclasses.replace(darts, latency=dataclasses.replace(darts.latency, refine=False))
        self._planner, self._shadow = (_planner(darts, curve, config) for _ in range(2))

    def rollout(self, bench: PlannedBench, questions: Sequence[str], step: int) -> dict[str, Any]:
        """One rollout, as a record."""
        rows = batch_of(questions, 1, step, {}).non_tensor_batch["raw_prompt"]
        shadow = self._shadow.plan([prompt_key(row) for row in rows], self._unrefined)
        measured = bench.planned(self._planner, self._darts, questions, step)
        if not np.array_equal(np.bincount(measured.pool.prompt, minlength=len(rows)), shadow.budgets):
            raise RuntimeError(f"step {step}: the shadow's budgets {shadow.budgets.tolist()} are not the rollout's.")
        seconds = measured.metrics["darts/rollout/seconds"]
        self._shadow.observe(shadow, self._unrefined, measured.pool, seconds, StepTimes())
        metrics = {name: measured.metrics.get(key) for name, key in METRICS.items()}
        return measured.record() | metrics | {"unrefined_s": shadow.predicted_s}


def _planner(darts: DartsConfig, curve: LatencyCurve, config: DictConfig) -> RolloutPlanner:
    """As the manager makes it."""
    rollout = config.actor_rollout_ref.rollout
    planner = RolloutPlanner(
        ema_weight=darts.allocation.ema_weight,
        response_length=rollout.response_length,
        max_running=rollout.max_num_seqs,
    )
    planner.cost = CostModel(curve, "measured by the benchmark")
    return planner
