"""What `benchmarks.training` reports: traces in, Markdown tables out.

Contract: pure. A record is one run: where it stands (`testbed`, `seed`, `arm`) and the figures of `record_of`; of what
changes over a run, the pair of its first and last value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import common

UNIFORM, ADAPTIVE = "uniform", "adaptive"
TOTALS = {"seconds": "darts/rollout/seconds", "tokens": "darts/tokens/generated"}
CHANGES = {
    "pool_mean": "darts/length/pool_mean",
    "pool_p99": "darts/length/pool_p99",
    "kept_mean": "darts/length/kept_mean",
    "accuracy": "darts/reward/pool_mean",
}
MEANS = {"std_correlation": "darts/history/std_correlation", "saturated_share": "darts/group/saturated_share"}

Steps = Mapping[int, Mapping[str, float]]


def record_of(steps: Steps, validation: Sequence[float]) -> dict[str, Any]:
    """A run's figures; see the module's contract. `known` steps have prompts that were all seen before."""
    ordered = [steps[number] for number in sorted(steps)]
    epochs = [step["training/epoch"] for step in ordered]
    known = [step for step in ordered if step["darts/history/known_share"] == 1]
    ends = [
        [step for step, epoch in zip(ordered, epochs, strict=True) if epoch == end] for end in (epochs[0], epochs[-1])
    ]
    return {
        "steps": len(ordered),
        "known": len(known),
        **{name: sum(step[key] for step in known) for name, key in TOTALS.items()},
        **{name: [common.mean(common.found(end, key)) for end in ends] for name, key in CHANGES.items()},
        **{name: common.mean(common.found(known, key)) for name, key in MEANS.items()},
        "validation": [validation[0], validation[-1]],
    }


def runs_table(records: Sequence[common.Record]) -> str:
    """A row per run."""
    rows = []
    for record in records:

        def change(key: str, form: str, record: common.Record = record) -> str:
            return f"{record[key][0]:{form}} -> {record[key][1]:{form}}"

        per_step = record["seconds"] / record["known"] if record["known"] else float("nan")
        rows.append([
            record["testbed"], record["seed"], record["arm"], f"{record['seconds']:.1f}", f"{per_step:.2f}",
            f"{record['tokens']:,.0f}", change("pool_mean", ".1f"), change("pool_p99", ".0f"),
            change("kept_mean", ".1f"), change("accuracy", ".3f"), change("validation", ".3f"),
            f"{record['std_correlation']:.2f}", f"{record['saturated_share']:.0%}",
        ])  # fmt: skip
    columns = [
        "testbed", "seed", "arm", "rollout s", "a step", "tokens", "pool length", "pool p99", "kept length", "accuracy",
        "validation", "std correlation", "saturated",
    ]  # fmt: skip
    return common.table(columns, rows)


def ratios_table(records: Sequence[common.Record]) -> str:
    """Adaptive over uniform, by seed and for all seeds together; of validation, the difference at the end."""
    rows = []
    runs = {(record["testbed"], record["seed"], record["arm"]): record for record in records}
    for testbed in dict.fromkeys(record["testbed"] for record in records):
        seeds = sorted({seed for where, seed, _ in runs if where == testbed})
        pairs = [(runs.get((testbed, seed, ADAPTIVE)), runs.get((testbed, seed, UNIFORM))) for seed in seeds]
        whole = [(seed, pair) for seed, pair in zip(seeds, pairs, strict=True) if None not in pair]
        for name, some in [*((seed, [pair]) for seed, pair in whole), ("all", [pair for _, pair in whole])]:

            def over(key: str, some: Sequence[Any] = some) -> str:
                above, below = (sum(np.atleast_1d(pair[arm][key])[-1] for pair in some) for arm in (0, 1))
                return f"{above / below:.2f}" if below else "nan"

            better = common.mean([pair[0]["validation"][1] - pair[1]["validation"][1] for pair in some])
            keys = ("seconds", "tokens", "pool_mean", "pool_p99", "kept_mean", "accuracy")
            rows.append([testbed, name, *map(over, keys), f"{better:+.3f}"])
    columns = ["rollout s", "tokens", "pool length, end", "pool p99, end", "kept length, end", "accuracy, end"]
    return common.table(["adaptive / uniform", "seed", *columns, "validation, difference"], rows)
