"""Measures rollouts with adaptive against uniform budgets on one real server, and how well their time is forecast.

    python -m darts.bench budgets --testbed overthink --out outputs/rollouts_overthink.json

Contract. A fixed policy (the testbed's model), no training: what budgets do at once, not what they teach. Each seed has
a pool of prompts that comes again in every epoch, in another order, and planners that start with nothing but the curve
of the server's decoding steps, measured before.

1. The arms launch equally many candidates: `uniform` (10 or 11 each, all dual-end), `uniform, half saturated` (the
   same with M_up = 11: half are shortest-only), `adaptive` (8 to 12). Early stop is eager. They take turns on one
   server within each step, in an order that rotates, over empty prefix caches. Every candidate is seeded, so candidate
   n of a prompt has the same response in all arms, as far as it gets.
2. The tables are of the steps from the second epoch on, when every prompt was seen before. Ratios are of totals, paired
   by seed and step, with 95 % bootstrap intervals over the pairs.
3. Three forecasts of a rollout's seconds, made before it: by the arm's own planner, whose cost model follows the
   engine; by one that observes the same lengths but keeps the curve as measured; and the seconds of the arm's last
   rollout.
"""

import argparse
import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from darts.bench import harness
from darts.bench.harness import Bench, FlatRecords, Save
from darts.config import ConfigError, DartsConfig
from darts.evidence.log import say
from darts.evidence.tables import table
from darts.forecast import CostModel
from darts.history import prompt_key
from darts.latency import LatencyCurve, StepTimes
from darts.planning import RolloutPlanner
from darts.testbed import LIMITS

UNIFORM, HALF, ADAPTIVE = "uniform", "uniform, half saturated", "adaptive"
ALLOCATIONS = {UNIFORM: ("uniform", 12), HALF: ("uniform", 11), ADAPTIVE: ("adaptive", 12)}
"""The arms' `allocation.mode` and M_up."""
GROUP_SIZE, MEAN = 8, 10.5
PREDICTORS = {"latency/predicted_s": "refined model", "unrefined_s": "model as measured", "last_s": "last step"}


def settings(arm: str, seed: int, wait: str, chunk_tokens: int) -> DartsConfig:
    """The settings of an arm."""
    mode, high = ALLOCATIONS[arm]
    settings_block = {
        "allocation": {"mode": mode, "low": GROUP_SIZE, "high": high, "mean_candidates": MEAN},
        "selection": {"long_wait": wait},
        "early_stop": "eager",
        "streaming": {"chunk_tokens": chunk_tokens},
        "seed": seed,
        "timeout_s": 300,
        "progress_s": 0,
    }
    return DartsConfig.from_block(settings_block, group_size=GROUP_SIZE)


def batches(
    questions: Sequence[str], pool: int, prompts: int, steps: int, seed: int
) -> Iterator[tuple[int, list[str]]]:
    """Epoch and prompts of each step of a seed: its pool in a new order in every epoch."""
    random_source = np.random.default_rng(seed)
    pool_order, epoch_steps = random_source.choice(len(questions), pool, replace=False), pool // prompts
    for step_number in range(steps):
        if step_number % epoch_steps == 0:
            pool_order = random_source.permutation(pool_order)
        chosen_numbers = pool_order[step_number % epoch_steps * prompts :][:prompts]
        yield step_number // epoch_steps, [questions[question_number] for question_number in chosen_numbers]


class ShadowedPlanner:
    """The planner of an arm, and its shadow, whose forecast does not learn about time.

    The shadow plans the same prompts before a rollout and observes the same candidates after it, with the measured
    curve as it was and without overhead. So both have the same length history and budgets, which is asserted, and their
    forecasts differ by the refinement of the cost model alone.

    The arm's settings have a mean number of candidates: the shadow's budgets must not depend on its cost model.
    """

    def __init__(self, darts: DartsConfig, latency_curve: LatencyCurve, config: DictConfig) -> None:
        self._darts = darts
        self._unrefined = dataclasses.replace(darts, latency=dataclasses.replace(darts.latency, refine=False))
        rollout = config.actor_rollout_ref.rollout
        self._planner, self._shadow = planners = [
            RolloutPlanner(
                ema_weight=darts.allocation.ema_weight,
                response_length=rollout.response_length,
                max_running=rollout.max_num_seqs,
            )
            for _ in range(2)
        ]
        for planner in planners:
            planner.cost = CostModel(latency_curve, "measured by the benchmark")

    def rollout(self, bench: Any, questions: Sequence[str], step: int) -> dict[str, Any]:
        """One rollout of a `RolloutBench`, as a record."""
        prompt_keys = [prompt_key([{"role": "user", "content": question}]) for question in questions]
        seed_plan = self._shadow.plan(prompt_keys, self._unrefined)
        rollout, flat_record = bench.rollout(self._darts, questions, step, planner=self._planner)
        if not np.array_equal(np.bincount(rollout.pool.prompt, minlength=len(prompt_keys)), seed_plan.budgets):
            raise RuntimeError(f"step {step}: the shadow's budgets {seed_plan.budgets.tolist()} are not the rollout's.")
        self._shadow.observe(seed_plan, self._unrefined, rollout.pool, flat_record["seconds"], StepTimes())
        return flat_record | {"unrefined_s": seed_plan.predicted_s}


def measure(options: argparse.Namespace, save: Save) -> FlatRecords:
    """Starts a server, measures its curve and runs all rollouts; what is there is saved after each seed."""
    if options.pool % options.prompts:
        rule = f"must be a multiple of --prompts {options.prompts}."
        raise ConfigError("--pool", options.pool, rule, "correct one of the two.")
    harness.set_environment()
    from darts.bench.serving import serving, train_questions
    from darts.engines.measure import profile_servers
    from darts.engines.start import local_ray
    from verl_patches.device import is_cpu_only

    overrides = [f"testbed={options.testbed}", *([] if is_cpu_only() else ["platform=gpu"]), *options.override]
    questions, records = train_questions(options.testbed), []
    say("starting one server ...")
    with local_ray(num_gpus=1), serving(*overrides, response_length=None, max_model_len=None) as (servers, bench):
        model_path = servers.config.actor_rollout_ref.model.path
        profile = asyncio.run(profile_servers(servers.server_handles, model_path, seeded=True, say=say))
        save(profile=dataclasses.asdict(profile))

        def planner_of(arm: str, seed: int) -> ShadowedPlanner:
            arm_settings = settings(arm, seed, options.wait, options.chunk_tokens)
            return ShadowedPlanner(arm_settings, profile.curve(), servers.config)

        for arm in ALLOCATIONS:
            planner_of(arm, 0).rollout(bench, questions[-options.prompts :], step=0)  # warms up
        for seed in range(options.seeds):
            planners = {arm: planner_of(arm, seed) for arm in ALLOCATIONS}
            plan = list(batches(questions, options.pool, options.prompts, options.steps, seed))

            def once(arm: str, seed: int, step: int, planners: Any = planners, plan: Any = plan) -> dict[str, Any]:
                return {"epoch": plan[step][0]} | planners[arm].rollout(bench, plan[step][1], step)

            places = ({"seed": seed, "step": step} for step in range(options.steps))
            records += harness.take_turns(places, list(ALLOCATIONS), once)
            save(records=records)
    return records


def with_last(records: pd.DataFrame) -> pd.DataFrame:
    """The records with `last_s`, the seconds of the same arm's rollout before, in the same seed; NaN for its first."""
    return records.assign(last_s=records.sort_values("step").groupby(["arm", "seed"])["seconds"].shift())


def errors(records: pd.DataFrame) -> pd.Series:
    """Median over the rollouts of |forecast / measured - 1|, by predictor; NaN where nothing was forecast."""
    forecasts = records[list(PREDICTORS)].astype(float)
    return (forecasts.div(records["seconds"], axis=0) - 1).abs().median()


def _budgets(arm: harness.ArmFigures) -> str:
    return f"{arm.known('allocation/budget_min').min():.0f} to {arm.known('allocation/budget_max').max():.0f}"


COLUMNS: harness.Columns = (
    ("rollout s", lambda arm: f"{arm.total('seconds'):.1f}"),
    ("over uniform", lambda arm: arm.over("seconds")),
    ("tokens", lambda arm: f"{arm.total('tokens/generated'):,.0f}"),
    ("over uniform", lambda arm: arm.over("tokens/generated")),
    ("kept tokens", lambda arm: f"{arm.total('tokens/kept'):,.0f}"),
    ("kept length", lambda arm: f"{arm.mean('length/kept_mean'):.1f}"),
    ("pool length", lambda arm: f"{arm.mean('length/pool_mean'):.1f}"),
    ("aborted", lambda arm: f"{arm.total('candidates/aborted'):,.0f} of {arm.total('candidates/launched'):,.0f}"),
    ("saturated", lambda arm: f"{arm.mean('group/saturated_share'):.0%}"),
    ("budgets", _budgets),
    ("std correlation", lambda arm: f"{arm.mean('history/std_correlation'):.2f}"),
)


def forecast_table(records: pd.DataFrame) -> str:
    """Errors of the forecasts by arm, of records with `last_s`."""
    parts = [*records.groupby("arm", sort=False), ("all", records)]
    rows = [[arm, len(part), *errors(part).map("{:.1%}".format)] for arm, part in parts]
    return table(["median error of the forecast", "rollouts", *PREDICTORS.values()], rows)


def tables(records: pd.DataFrame) -> str:
    """Both, of the steps from the second epoch on."""
    known_records = with_last(records)[records["epoch"] > 0]
    if known_records.empty:
        return "no step of a second epoch: no prompt was known"
    return f"{harness.arms_table(known_records, COLUMNS, ('seed', 'step'), UNIFORM)}\n\n{forecast_table(known_records)}"


BENCH = Bench(
    name="budgets",
    about=__doc__,
    options={
        "--testbed": ("overthink", "its model and prompts", {"choices": sorted(LIMITS)}),
        "--wait": ("all", "of dual-end", {"choices": ["all", "deadline"]}),
        "--seeds": (3, "pools of prompts"),
        "--steps": (12, "rollouts of an arm and seed"),
        "--prompts": (8, "of a rollout"),
        "--pool": (32, "prompts of an epoch"),
        "--chunk-tokens": (16, "as in the quickstart"),
        **harness.OVERRIDE,
    },
    measure=measure,
    tables=tables,
)
