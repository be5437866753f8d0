"""Measures rollouts with adaptive against uniform budgets on one real server, and how well their time is forecast.

    python -m darts.bench.budgets --testbed overthink --out outputs/rollouts_overthink.json

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
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from darts.bench import harness as common
from darts.bench.harness import ENVIRONMENT, rotated
from darts.bench.prompts import train_questions
from darts.config import DartsConfig
from darts.evidence.log import say
from darts.testbed import LIMITS

UNIFORM, HALF, ADAPTIVE = "uniform", "uniform, half saturated", "adaptive"
ALLOCATIONS = {
    UNIFORM: {"mode": "uniform", "high": 12},
    HALF: {"mode": "uniform", "high": 11},
    ADAPTIVE: {"mode": "adaptive", "high": 12},
}
GROUP_SIZE, MEAN = 8, 10.5
BY = ("seed", "step")
PREDICTORS = {"refined_s": "refined model", "unrefined_s": "model as measured", "last_s": "last step"}


def settings(arm: str, seed: int, wait: str, chunk_tokens: int) -> DartsConfig:
    """Those of an arm."""
    block = {
        "allocation": ALLOCATIONS[arm] | {"low": GROUP_SIZE, "mean_candidates": MEAN},
        "selection": {"long_wait": wait},
        "early_stop": "eager",
        "streaming": {"chunk_tokens": chunk_tokens},
        "seed": seed,
        "timeout_s": 300,
        "progress_s": 0,
    }
    return DartsConfig.from_block(block, group_size=GROUP_SIZE)


def batches(
    questions: Sequence[str], pool: int, prompts: int, steps: int, seed: int
) -> Iterator[tuple[int, list[str]]]:
    """Epoch and prompts of each step of a seed: its pool in a new order in every epoch."""
    rng = np.random.default_rng(seed)
    own, each = rng.choice(len(questions), pool, replace=False), pool // prompts
    for step in range(steps):
        if step % each == 0:
            own = rng.permutation(own)
        some = own[step % each * prompts :][:prompts]
        yield step // each, [questions[number] for number in some]


def with_last(records: Sequence[common.Record]) -> list[dict[str, Any]]:
    """The records with `last_s`, the seconds of the same arm's rollout before, in the same seed; None for its first."""
    before = {(record["arm"], record["seed"], record["step"] + 1): record["seconds"] for record in records}
    return [{**record, "last_s": before.get((record["arm"], record["seed"], record["step"]))} for record in records]


def error(records: Sequence[common.Record], predictor: str) -> float:
    """Median over the rollouts of |forecast / measured - 1|."""
    pairs = [(record[predictor], record["seconds"]) for record in records if record[predictor] is not None]
    return float(np.median([abs(forecast / seconds - 1) for forecast, seconds in pairs])) if pairs else float("nan")


def arms_table(records: Sequence[common.Record]) -> str:
    """Time, tokens and lengths by arm, of records with known prompts."""
    rows = []
    for arm in common.arms_of(records):

        def ratio(key: str, arm: str = arm) -> str:
            return "1" if arm == UNIFORM else format(common.over(records, arm, UNIFORM, BY, key), ".2f")

        own = [record for record in records if record["arm"] == arm]
        total = {
            key: sum(record[key] for record in own)
            for key in ("seconds", "tokens", "tokens_kept", "aborted", "launched")
        }
        average = {
            key: common.mean(common.found(own, key))
            for key in ("kept_mean", "pool_mean", "saturated_share", "std_correlation")
        }
        rows.append([
            arm, f"{total['seconds']:.1f}", ratio("seconds"), f"{total['tokens']:,}", ratio("tokens"),
            f"{total['tokens_kept']:,}", f"{average['kept_mean']:.1f}", f"{average['pool_mean']:.1f}",
            f"{total['aborted']:,} of {total['launched']:,}", f"{average['saturated_share']:.0%}",
            f"{min(common.found(own, 'budget_min')):.0f} to {max(common.found(own, 'budget_max')):.0f}",
            f"{average['std_correlation']:.2f}",
        ])  # fmt: skip
    columns = [
        "arm", "rollout s", "over uniform", "tokens", "over uniform", "kept tokens", "kept length", "pool length",
        "aborted", "saturated", "budgets", "std correlation",
    ]  # fmt: skip
    return common.table(columns, rows)


def forecast_table(records: Sequence[common.Record]) -> str:
    """Errors of the forecasts by arm, of records with `last_s`."""
    by_arm = {arm: [record for record in records if record["arm"] == arm] for arm in common.arms_of(records)}
    rows = [
        [arm, len(own), *(f"{error(own, predictor):.1%}" for predictor in PREDICTORS)]
        for arm, own in (by_arm | {"all": records}).items()
    ]
    return common.table(["median error of the forecast", "rollouts", *PREDICTORS.values()], rows)


def tables(records: Sequence[common.Record]) -> str:
    """Both, of the steps from the second epoch on."""
    known = [record for record in with_last(records) if record["epoch"] > 0]
    if not known:
        return "no step of a second epoch: no prompt was known"
    return f"{arms_table(known)}\n\n{forecast_table(known)}"


def run(options: argparse.Namespace, opening: dict[str, Any]) -> list[dict[str, Any]]:
    """Starts a server, measures its curve and runs all rollouts; what is there is saved after each seed."""
    from darts.bench.budgets_run import Arm, PlannedBench
    from darts.engines.measure import profile_servers
    from darts.engines.start import engine_config, local_ray, start_servers
    from verl_patches.device import is_cpu_only
    from verl_patches.vllm_stream_server import StreamingReplica

    where = [f"testbed={options.testbed}", *([] if is_cpu_only() else ["platform=gpu"]), *options.override]
    config = engine_config(*where, response_length=None, max_model_len=None)
    model, questions, records = config.actor_rollout_ref.model.path, train_questions(options.testbed), []
    say("starting one server ...")
    with local_ray(num_gpus=1), start_servers(config, StreamingReplica) as servers:
        measured = profile_servers(servers.server_handles, model, seeded=True, say=say)
        profile = asyncio.run(measured)
        bench = PlannedBench(servers, config)

        def arms(seed: int) -> dict[str, Arm]:
            chosen = {name: settings(name, seed, options.wait, options.chunk_tokens) for name in ALLOCATIONS}
            return {name: Arm(darts, profile.curve(), config) for name, darts in chosen.items()}

        for arm in arms(0).values():
            arm.rollout(bench, questions[-options.prompts :], step=0)  # warms up
        for seed in range(options.seeds):
            own, plan = arms(seed), batches(questions, options.pool, options.prompts, options.steps, seed)
            for step, (epoch, some) in enumerate(plan):
                for arm in rotated(list(own), seed * options.steps + step):
                    place = {"arm": arm, "seed": seed, "step": step, "epoch": epoch}
                    records.append(place | own[arm].rollout(bench, some, step))
                seconds = ", ".join(f"{record['arm']} {record['seconds']:.2f}" for record in records[-len(own) :])
                say(f"seed {seed}, step {step + 1}/{options.steps}, seconds: {seconds}")
            common.save(options, opening, profile=dataclasses.asdict(profile), records=records)
        bench.close()
    # as the arms are listed, for the tables
    return sorted(records, key=lambda record: list(ALLOCATIONS).index(record["arm"]))


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument("--testbed", choices=sorted(LIMITS), default="overthink", help="(default: %(default)s)")
    parser.add_argument("--wait", choices=["all", "deadline"], default="all", help="of dual-end (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="pools of prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="rollouts of an arm and seed (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="of a rollout (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=32, help="prompts of an epoch (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=16, help="(default: %(default)s, the quickstart's)")
    parser.add_argument("--override", action="append", default=[], help="of the server's Hydra configuration")
    options = parser.parse_args(given)
    if options.pool % options.prompts:
        parser.error(f"--pool {options.pool}: must be a multiple of --prompts {options.prompts}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    records = run(options, common.document(options))
    print(f"\n{tables(records)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
