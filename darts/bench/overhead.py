"""Measures what DARTS itself costs besides generation: planning, learning, metrics, trace, state.

    python -m darts.bench overhead --runs outputs/training/*/steps* --out outputs/overhead.json

Contract.
1. At scale, synthetic: one process, no engine. Each part of a step's own work is timed alone, on log-normal lengths of
   which about a fifth were aborted, with a length history of `--history` prompts, all of the batch among them, and a
   cost model for 8 engines of 256 sequences. `plan` chooses its total by the utility; the other parts get a rollout of
   12 candidates per prompt in the mean, with adaptive budgets.
2. Of runs: per step, `darts/rollout/own_s` over `timing_s/step` from their traces. It has keys, plan, joining, learning
   and metrics, but neither the trace nor the state, which are written after the rollout.

The exit code is 1 if in the median step of a run DARTS's own work takes more than 1 %.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from darts.bench import harness
from darts.bench.harness import Bench, FlatRecords, Save
from darts.config import ConfigError, DartsConfig
from darts.evidence.checkpoint import save_state
from darts.evidence.tables import Check, table
from darts.evidence.trace import Trace, find_file, read_steps
from darts.forecast import CostModel
from darts.history import prompt_key
from darts.latency import LatencyCurve, StepTimes
from darts.metrics import rollout_metrics
from darts.planning import Plan, Rollout, RolloutPlanner
from darts.pool import CandidatePool, State

GROUP_SIZE, MEAN = 8, 12.0
ENGINES, MAX_RUNNING, LIMIT = 8, 256, 8192
MEDIAN_LENGTH, BETWEEN, WITHIN = 800.0, 0.4, 0.5
"""Tokens; standard deviations of log length, between prompts and within one."""
FINISHING = 0.75
"""Share of a prompt's candidates that end by themselves, but at least M."""
PROMPT_CHARACTERS = 1000
CURVE = LatencyCurve([1, 16, 64, 256], [0.010, 0.011, 0.014, 0.026])
TARGET = 0.01
OWN = ("keys", "plan", "observe", "metrics")
"""The parts that `darts/rollout/own_s` has."""
PARTS = (*OWN, "trace", "state")


def planner_of(prompt_keys: Sequence[str], rng: np.random.Generator) -> RolloutPlanner:
    """A planner that has observed all the keys, and has a cost model."""
    planner = RolloutPlanner(ema_weight=0.3, response_length=LIMIT, num_engines=ENGINES, max_running=MAX_RUNNING)
    log_medians = np.log(rng.lognormal(np.log(MEDIAN_LENGTH), BETWEEN, (len(prompt_keys), 1)))
    lengths = np.ceil(rng.lognormal(log_medians, WITHIN, (len(prompt_keys), GROUP_SIZE)))
    for key, response_lengths in zip(prompt_keys, lengths, strict=True):
        planner.history.update(key, response_lengths, np.zeros(GROUP_SIZE, dtype=bool))
    planner.cost, planner.steps = CostModel(CURVE, "benchmark"), 1
    return planner


def pool_of(plan: Plan, rng: np.random.Generator) -> CandidatePool:
    """What could become of a plan: of each prompt the longest are aborted where the longest of the others ends."""
    prompt = np.repeat(np.arange(len(plan.budgets)), plan.budgets)
    drawn = np.clip(np.ceil(rng.lognormal(np.log(plan.mean)[prompt], WITHIN)), 1, LIMIT).astype(np.int64)
    rank = pd.Series(drawn).groupby(prompt).rank(method="first").to_numpy(np.int64) - 1
    finishing = np.maximum(GROUP_SIZE, np.ceil(FINISHING * plan.budgets))[prompt]
    length, aborted = np.minimum(drawn, drawn[rank == finishing - 1][prompt]), rank >= finishing
    return CandidatePool.of(
        plan.budgets,
        length=length,
        state=np.select([aborted, length == LIMIT], [State.STOPPED.value, State.TRUNCATED.value], State.FINISHED.value),
        kept=rank < GROUP_SIZE,
        arrival=np.where(aborted, -1, rank),
        saturated=np.repeat(plan.budgets == plan.budgets.max(), plan.budgets),
        reward=np.where(aborted, np.nan, rng.integers(0, 2, len(length))),
        prompt_tokens=200,
        chunks=length // 256,
        chunk_seconds=0.01 * (length // 256),
        ended_at=1.7e9 + 0.02 * length,
        stop_seconds=np.where(aborted, 0.05, np.nan),
        tokens_after=aborted,
        weights_min=0,
        weights_max=0,
    )


def parts_of_a_step(prompts: int, history: int, folder: Path) -> tuple[CandidatePool, dict[str, Callable[[], Any]]]:
    """The candidates of a synthetic rollout, and what is timed, by name."""
    rng = np.random.default_rng(prompts)
    texts = [[{"role": "user", "content": f"{number}".zfill(PROMPT_CHARACTERS)}] for number in range(prompts)]
    keys = [prompt_key(text) for text in texts]
    planner = planner_of([*keys, *(f"{number:016x}" for number in range(history - prompts))], rng)
    allocations = ({"mode": "adaptive", "mean_candidates": mean} for mean in (None, MEAN))
    by_utility, by_mean = (DartsConfig.from_block({"allocation": block}, GROUP_SIZE) for block in allocations)
    plan = planner.plan(keys, by_mean)
    pool, seconds, step_times = pool_of(plan, rng), 60.0, StepTimes()
    for running in (1, 8, 64, 256):
        step_times.add(running, CURVE(running) * 1000, 1000)
    observed_std, metrics = planner.observe(plan, by_mean, pool, seconds, step_times)
    metrics = rollout_metrics(pool, GROUP_SIZE, seconds) | metrics
    rollout = Rollout(plan=plan, pool=pool, observed_std=observed_std, metrics=metrics)
    trace = Trace(str(folder / "darts.jsonl"))
    return pool, {
        "keys": lambda: [prompt_key(text) for text in texts],
        "plan": lambda: planner.plan(keys, by_utility),
        "observe": lambda: planner.observe(plan, by_mean, pool, seconds, step_times),
        "metrics": lambda: rollout_metrics(pool, GROUP_SIZE, seconds),
        "trace": lambda: trace.write(1, rollout.metrics, rollout),
        "state": lambda: save_state(folder, 1, planner.state_dict()),
    }


def at_scale(options: argparse.Namespace) -> FlatRecords:
    """A record for each number of prompts, repetition and part."""
    records = []
    for prompts in options.prompts:
        with tempfile.TemporaryDirectory() as folder:
            pool, parts = parts_of_a_step(prompts, options.history, Path(folder))
            size = {"candidates": len(pool), "aborted": float(pool.aborted.mean())}

            def once(arm: str, parts: dict = parts, size: dict = size, **place: int) -> dict[str, Any]:
                return size | {"seconds": harness.seconds_of(parts[arm])[0]}

            records += harness.take_turns(harness.repetitions(options.repetitions, prompts=[prompts]), PARTS, once)
    return records


def scale_table(records: pd.DataFrame) -> str:
    """Milliseconds of each part, medians over the repetitions; own is keys to metrics, what `own_s` has."""
    rows = []
    for prompts, part in records.groupby("prompts"):
        part_s = part.pivot(index="repetition", columns="arm", values="seconds")[list(PARTS)]
        part_s["own"] = part_s[list(OWN)].sum(axis=1)
        size = part.iloc[0]
        medians = (1000 * part_s.median()).map("{:.1f}".format)
        rows.append([f"{prompts:,}", f"{size['candidates']:,}", f"{size['aborted']:.0%}", *medians])
    return table(["prompts", "candidates", "aborted", *(f"{part}, ms" for part in (*PARTS, "own"))], rows)


def of_run(run: Path) -> dict[str, Any]:
    """A run's record: DARTS's own seconds of each step, the whole step's, and the share of the former.

    Raises:
        ConfigError: a run that was made without DARTS.
    """
    names = ("darts/rollout/own_s", "timing_s/step")
    metrics, _ = read_steps(find_file(run), lambda step: step.metrics)
    steps = [[step[name] for name in names] for step in metrics if set(names) <= set(step)]
    if not steps:
        raise ConfigError("--runs", str(run), f"no step of the trace has both {' and '.join(names)}.", "leave it out.")
    own, step = np.array(steps).T
    return {"run": str(run), "own_s": own.tolist(), "step_s": step.tolist(), "share": (own / step).tolist()}


def runs_table(records: pd.DataFrame) -> str:
    """A row per run."""
    rows = []
    for run in records.itertuples():
        own_s, step_s, share = (np.median(values) for values in (run.own_s, run.step_s, run.share))
        rows.append([run.run, len(run.share), f"{own_s:.3f}", f"{step_s:.2f}", f"{share:.2%}", f"{max(run.share):.2%}"])
    return table(["run", "steps", "own s, median", "step s, median", "share, median", "share, worst"], rows)


def measure(bench_options: argparse.Namespace, save_parts: Save) -> dict[str, FlatRecords]:
    """The runs' records, and those at scale."""
    run_records = [of_run(run_folder) for run_folder in bench_options.runs]
    return {"scale": at_scale(bench_options), "runs": run_records}


def tables(records: Mapping[str, pd.DataFrame]) -> str:
    """Both tables, as far as there is something."""
    makers = {"scale": scale_table, "runs": runs_table}
    return "\n\n".join(make(records[name]) for name, make in makers.items() if len(records[name]))


def checks(records: Mapping[str, pd.DataFrame]) -> list[Check]:
    """The bound for each run."""
    return [
        Check(name=f"% of a step, {run.run}", value=100 * float(np.median(run.share)), low=0, high=100 * TARGET)
        for run in records["runs"].itertuples()
    ]


BENCH = Bench(
    name="overhead",
    about=__doc__,
    options={
        "--prompts": ([8, 128, 256, 1024], "numbers of prompts; none: runs alone", {"nargs": "*"}),
        "--history": (20_000, "prompts in the history"),
        "--repetitions": (15, "of each size"),
        "--runs": ([], "runs with a trace", {"type": Path, "nargs": "+", "metavar": "DIR"}),
    },
    measure=measure,
    tables=tables,
    checks=checks,
)
