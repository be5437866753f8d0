"""Measures how long it takes to decide who gets how many candidates.

    python -m darts.bench allocate --out outputs/allocate.json

Contract: `darts.allocation.allocate` against the plain greedy loop, which gives one candidate at a time to the prompt
whose term falls most, from a heap; and `optimal_total` against a NumPy scan of every total. Both sides of a pair get
the same log-normal weights, or curve of seconds, new in each repetition; they take turns, in an order that rotates.
Equal answers are asserted in every repetition.

The exit code is 1 if `allocate` takes 50 ms or more, in the median, for 100,000 prompts (or the most that are tried, if
they are more).
"""

import argparse
import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from darts.allocation import allocate, optimal_total, rounded_total
from darts.bench import harness
from darts.bench.harness import ArmFigures, Bench, FlatRecords, Save
from darts.evidence.tables import Check, table

ALLOCATE, GREEDY = "allocate", "greedy loop"
OPTIMAL, SCAN = "optimal_total", "scan of all totals"
PAIRS = ((ALLOCATE, GREEDY), (OPTIMAL, SCAN))
GROUP_SIZE = 8
SIGMA = 0.6
"""Standard deviation of the weights' logarithms."""
TARGET_PROMPTS, TARGET_MS = 100_000, 50.0


def greedy(weights: NDArray[np.float64], total_budget: int, low: int, high: int) -> NDArray[np.int64]:
    """What `allocate` gives, one candidate at a time."""
    budgets = [low] * len(weights)
    marginal_falls = [(-weight / (low * (low + 1)), prompt) for prompt, weight in enumerate(weights.tolist())]
    heapq.heapify(marginal_falls)
    for _ in range(total_budget - low * len(weights)):
        prompt = marginal_falls[0][1]
        budgets[prompt] += 1
        prompt_budget = budgets[prompt]
        if prompt_budget < high:
            heapq.heapreplace(marginal_falls, (-float(weights[prompt]) / (prompt_budget * (prompt_budget + 1)), prompt))
        else:
            heapq.heappop(marginal_falls)
    return np.array(budgets, dtype=np.int64)


def scan(num_prompts: int, low: int, high: int, terms: dict[str, Any]) -> int:
    """The total that `optimal_total` gives, by trying all."""
    all_totals = np.arange(low * num_prompts, high * num_prompts + 1)
    means = all_totals / num_prompts
    gains = terms["variation"] * (1 - terms["group_size"] / means)
    costs = np.interp(means, np.arange(low, high + 1), terms["seconds"]) / terms["base_seconds"] - 1
    return int(all_totals[np.argmax(gains - costs)])


def problem(options: argparse.Namespace, prompts: int, repetition: int) -> dict[str, Callable[[], Any]]:
    """The four calls of a repetition."""
    rng = np.random.default_rng([prompts, repetition])
    low, high = options.low, options.high
    weights = rng.lognormal(sigma=SIGMA, size=prompts)
    total = rounded_total(prompts, options.mean)
    # A rollout that takes longer with every candidate, by shares that differ, so that the best total lies inside.
    seconds = (10 * np.cumprod([1.0, *rng.uniform(1.0, 1.03, high - low)])).tolist()
    terms = {"seconds": seconds, "base_seconds": 10.0, "group_size": GROUP_SIZE, "variation": rng.uniform(0.3, 0.7)}
    return {
        ALLOCATE: lambda: allocate(weights, total, low, high),
        GREEDY: lambda: greedy(weights, total, low, high),
        OPTIMAL: lambda: optimal_total(prompts, low, high, **terms).total,
        SCAN: lambda: scan(prompts, low, high, terms),
    }


def measure(options: argparse.Namespace, save: Save) -> FlatRecords:
    """A record for each size, repetition and arm; equal answers are asserted."""

    def once(arm_name: str, prompts: int, repetition: int) -> dict[str, Any]:
        part_seconds, call_answer = harness.seconds_of(problem(options, prompts, repetition + 1)[arm_name])
        return {"seconds": part_seconds, "answer": call_answer}

    def settle(found_records: dict[str, dict[str, Any]]) -> None:
        arm_answers = {arm: record.pop("answer") for arm, record in found_records.items()}
        for arm, plain in PAIRS:
            if not np.array_equal(arm_answers[arm], arm_answers[plain]):
                raise harness.BenchError(f"{found_records[arm]['prompts']} prompts: {arm} and {plain} differ.")

    places = harness.repetitions(options.repetitions, prompts=options.prompts)
    return harness.take_turns(places, [name for pair in PAIRS for name in pair], once, settle)


def tables(records: pd.DataFrame) -> str:
    """Milliseconds by number of prompts, and over the plain way."""
    rows = []
    for arm, plain in PAIRS:
        for prompts, part in records.groupby("prompts"):
            figures = ArmFigures(arm=arm, base=plain, pair_by=("repetition",), records=part)
            median_ms = (1000 * part.groupby("arm")["seconds"].median()).map("{:,.2f}".format)
            over_plain = figures.over("seconds", ".2g")
            rows.append([arm, f"{prompts:,}", median_ms[arm], plain, median_ms[plain], over_plain])
    return table(["function", "prompts", "ms, median", "plain", "ms, median", "over plain"], rows)


def checks(records: pd.DataFrame) -> list[Check]:
    """The target, where it was tried."""
    most_prompts = records["prompts"].max()
    if most_prompts < TARGET_PROMPTS:
        return []
    measured = records[(records["prompts"] == most_prompts) & (records["arm"] == ALLOCATE)]["seconds"]
    check_name = f"ms of {ALLOCATE} for {most_prompts:,} prompts"
    return [Check(name=check_name, value=1000 * measured.median(), low=0, high=TARGET_MS)]


BENCH = Bench(
    name="allocate",
    about=__doc__,
    options={
        "--prompts": ([256, 4096, 100_000], "numbers of prompts"),
        "--repetitions": (15, "of each size"),
        "--low": (8, "M_low"),
        "--high": (16, "M_up"),
        "--mean": (12.0, "candidates per prompt"),
    },
    measure=measure,
    tables=tables,
    checks=checks,
)
