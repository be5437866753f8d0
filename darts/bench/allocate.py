"""Measures how long it takes to decide who gets how many candidates.

    python -m darts.bench.allocate --out outputs/allocate.json

Contract: `darts.allocation.allocate` against the plain greedy loop, which gives one candidate at a time to the prompt
whose term falls most, from a heap; and `optimal_total` against a NumPy scan of every total. Both sides of a pair get
the same log-normal weights, or curve of seconds, new in each repetition; they take turns, in an order that rotates.
Equal answers are asserted in every repetition.

The exit code is 1 if `allocate` takes 50 ms or more, in the median, for 100,000 prompts (or the most that are tried, if
they are more).
"""

import argparse
import heapq
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.allocation import allocate, expected, optimal_total, rounded_total
from darts.bench import harness as common
from darts.bench.harness import rotated
from darts.evidence.log import say
from darts.evidence.tables import Check

ALLOCATE, GREEDY = "allocate", "greedy loop"
OPTIMAL, SCAN = "optimal_total", "scan of all totals"
PAIRS = ((ALLOCATE, GREEDY), (OPTIMAL, SCAN))
BY = ("prompts", "repetition")
GROUP_SIZE = 8
SIGMA = 0.6
"""Of the log-normal weights."""
TARGET_PROMPTS, TARGET_MS = 100_000, 50.0


def greedy(weights: NDArray[np.float64], total: int, low: int, high: int) -> NDArray[np.int64]:
    """What `allocate` gives, one candidate at a time."""
    budgets = [low] * len(weights)
    falls = [(-weight / (low * (low + 1)), prompt) for prompt, weight in enumerate(weights.tolist())]
    heapq.heapify(falls)
    for _ in range(total - low * len(weights)):
        prompt = falls[0][1]
        budgets[prompt] += 1
        count = budgets[prompt]
        if count < high:
            heapq.heapreplace(falls, (-float(weights[prompt]) / (count * (count + 1)), prompt))
        else:
            heapq.heappop(falls)
    return np.array(budgets, dtype=np.int64)


def scan(num_prompts: int, low: int, high: int, cost_weight: float = 1.0, **terms: Any) -> int:
    """The total that `optimal_total` gives, by trying all."""
    totals = np.arange(low * num_prompts, high * num_prompts + 1)
    gain, cost = expected(totals / num_prompts, low, high, **terms)
    return int(totals[np.argmax(gain - cost_weight * cost)])


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
        SCAN: lambda: scan(prompts, low, high, **terms),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each repetition and arm; asserts equal answers."""
    records = []
    for prompts in options.prompts:
        for repetition in range(-1, options.repetitions):  # the first warms up
            calls, answers, seconds = problem(options, prompts, repetition + 1), {}, {}
            for arm in rotated(list(calls), repetition + 1):
                start = time.perf_counter()
                answers[arm] = calls[arm]()
                seconds[arm] = time.perf_counter() - start
            for arm, plain in PAIRS:
                if not np.array_equal(answers[arm], answers[plain]):
                    raise RuntimeError(f"{prompts} prompts, repetition {repetition}: {arm} and {plain} differ.")
            if repetition >= 0:
                records += [
                    {"prompts": prompts, "repetition": repetition, "arm": arm, "seconds": seconds[arm]} for arm in calls
                ]
        say(
            f"{prompts:,} prompts: "
            + ", ".join(f"{arm} {milliseconds(records, prompts, arm):,.2f} ms" for arm in calls)
        )
    return records


def milliseconds(records: Sequence[common.Record], prompts: int, arm: str) -> float:
    """The median."""
    some = [record["seconds"] for record in records if (record["prompts"], record["arm"]) == (prompts, arm)]
    return float(np.median(some)) * 1000


def tables(records: Sequence[common.Record]) -> str:
    """Milliseconds by number of prompts, and over the plain way."""
    rows = []
    for arm, plain in PAIRS:
        for prompts in dict.fromkeys(record["prompts"] for record in records):
            some = [record for record in records if record["prompts"] == prompts]
            own, other = (f"{milliseconds(some, prompts, name):,.2f}" for name in (arm, plain))
            rows.append([arm, f"{prompts:,}", own, plain, other, format(common.over(some, arm, plain, BY), ".2g")])
    return common.table(["function", "prompts", "ms, median", "plain", "ms, median", "over plain"], rows)


def checks(records: Sequence[common.Record]) -> list[Check]:
    """The target, where it was tried."""
    most = max(record["prompts"] for record in records)
    if most < TARGET_PROMPTS:
        return []
    value = milliseconds(records, most, ALLOCATE)
    return [Check(name=f"ms of {ALLOCATE} for {most:,} prompts", value=value, low=0, high=TARGET_MS)]


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 4096, 100_000], help="(default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=15, help="of each size (default: %(default)s)")
    parser.add_argument("--low", type=int, default=8, help="M_low (default: %(default)s)")
    parser.add_argument("--high", type=int, default=16, help="M_up (default: %(default)s)")
    parser.add_argument("--mean", type=float, default=12.0, help="candidates per prompt (default: %(default)s)")
    options = parser.parse_args(given)
    opening = common.document(options)
    records = measure(options)
    common.save(options, opening, records=records)
    print(f"\n{tables(records)}\n")
    found = checks(records)
    print("\n".join(map(str, found)))
    return 0 if all(check.passed for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
