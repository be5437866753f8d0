"""What `darts.bench.overlap` reports: its records in, Markdown tables and checks out.

Contract: pure NumPy. A record is one step of one arm: the `StepRecord`, and what `darts.bench.overlap_trainer` adds.
Ratios are of totals, paired by batch, with 95 % bootstrap intervals over the batches. Exposed seconds are what the
trainer waited for log-probs after generation, by the trainer's clock and alike in all arms: verl's phases
`old_log_prob` and `ref`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from darts.bench import harness
from darts.bench.harness import ArmFigures, FlatRecord
from darts.evidence.statistics import Estimate
from darts.evidence.tables import Check

OFF, SEQUENCE, TOKEN, BYPASS = "off", "sequence", "token", "bypass"
ARMS = (OFF, SEQUENCE, TOKEN, BYPASS)
OVERLAPPED = (SEQUENCE, TOKEN)
TAIL, EQUAL = "heavy tail", "equal lengths"
PAIR_BY = ("step",)
FIGURES = "figures.jsonl"
HIDDEN_GOAL = 0.9
BEFORE_END_GOAL = 0.5
SAME_LENGTHS = "share of batches with equal kept lengths in all arms"

PHASES = {
    "step, s": "step_s", "generation, s": "rollout_s", "old log-probs, s": "old_log_prob_s", "reference, s": "ref_s",
    "update, s": "update_s", "weights, s": "weights_s",
}  # fmt: skip
STEP_COLUMNS: harness.Columns = (
    ("batches", lambda arm: len(arm.own)),
    *((title, lambda arm, key=key: f"{arm.mean(key):.2f}") for title, key in PHASES.items()),
    ("step over off", lambda arm: arm.over("step_s", ".3f")),
    ("generation over off", lambda arm: arm.over("rollout_s", ".3f")),
    ("log-probs' share of the step", lambda arm: format(arm.share("waited_s", "step_s"), ".1%")),
)
HIDDEN_COLUMNS: harness.Columns = (
    ("hidden / (hidden + exposed)", lambda arm: format(arm.share("hidden_s", "computed_s"), ".3f")),
    ("1 - exposed / exposed of off", lambda arm: format(not_exposed(arm.records, arm.arm), ".3f")),
    ("tokens before their end", lambda arm: f"{arm.mean('before_end_share'):.3f}"),
    ("tokens in the rollout", lambda arm: f"{arm.mean('in_rollout_share'):.3f}"),
    ("forwarded per kept", lambda arm: f"{arm.mean('forwarded_per_kept'):.2f}"),
    ("wasted tokens", lambda arm: f"{arm.mean('tokens_wasted'):,.0f}"),
    ("calls", lambda arm: f"{arm.mean('calls'):.0f}"),
    ("cache peak, GiB", lambda arm: f"{arm.known('cache_peak_gib').max():.3f}"),
)


def with_sums(records: Sequence[FlatRecord]) -> list[dict[str, Any]]:
    """The records, with the seconds that the tables are made of."""
    sums = []
    for record in records:
        waited, hidden = record["old_log_prob_s"] + record["ref_s"], record.get("hidden_s", 0.0)
        sums.append({**record, "waited_s": waited, "hidden_s": hidden, "computed_s": hidden + waited})
    return sums


def by_workload(records: Sequence[FlatRecord]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The workloads, each with its records."""
    for workload in dict.fromkeys(record["workload"] for record in records):
        yield workload, with_sums([record for record in records if record["workload"] == workload])


def hidden_share(records: Sequence[FlatRecord], arm: str) -> Estimate:
    """The arm's hidden seconds over all that were computed."""
    return ArmFigures(arm=arm, base=OFF, pair_by=PAIR_BY, records=records).share("hidden_s", "computed_s")


def not_exposed(records: Sequence[FlatRecord], arm: str) -> Estimate:
    """1 minus the arm's exposed seconds over those of `off`."""
    exposed = harness.ratio(records, arm, OFF, PAIR_BY, "waited_s")
    return Estimate(value=1 - exposed.value, low=1 - exposed.high, high=1 - exposed.low)


def note(records: Sequence[FlatRecord]) -> str:
    """What a batch is, and whether the arms agree."""
    own = [record for record in records if record["arm"] == OFF]
    generated, kept = (np.mean([record[key] for record in own]) for key in ("tokens_generated", "tokens_kept"))
    lengths = np.concatenate([np.array(record["kept_lengths"])[:, 2] for record in own])
    compared = [record for record in records if record.get("rows")]
    same, rows = (sum(record[key] for record in compared) for key in ("same_rows", "rows"))
    worst = max((record["log_prob_diff_max"] for record in compared), default=float("nan"))
    return (
        f"A batch: {generated:,.0f} tokens generated, {kept:,.0f} kept in {len(lengths) // len(own)} responses; kept "
        f"lengths: median {np.median(lengths):.0f}, longest {lengths.max()}.\nOld log-probs of an arm and of the first "
        f"of its batch: {same:,} of {rows:,} rows have the same tokens, their largest difference is {worst:.1e} nats."
    )


def tables(records: Sequence[FlatRecord]) -> str:
    """All, for each workload."""
    parts = []
    for workload, some in by_workload(records):
        steps = harness.arms_table(some, STEP_COLUMNS, PAIR_BY, OFF)
        hidden = harness.arms_table(some, HIDDEN_COLUMNS, PAIR_BY, OFF, arms=OVERLAPPED)
        parts += [workload, steps, hidden, note(some)]
    return "\n\n".join(parts)


def equal_lengths(records: Sequence[FlatRecord]) -> float:
    """The share of batches whose arms kept the same candidates with the same lengths."""
    batches: dict[int, list[Any]] = {}
    for record in records:
        batches.setdefault(record["step"], []).append(record["kept_lengths"])
    return float(np.mean([all(lengths == of_arms[0] for lengths in of_arms) for of_arms in batches.values()]))


def checks(records: Sequence[FlatRecord]) -> list[Check]:
    """The bounds, each with what was measured."""
    made = [Check(name=SAME_LENGTHS, value=equal_lengths(records), low=1, high=1)]
    late = sum(record["late_rows"] for record in records if record["arm"] in OVERLAPPED)
    made.append(Check(name="late rows", value=late, low=0, high=0))
    for workload, some in by_workload(records):
        value = hidden_share(some, TOKEN).value
        made.append(Check(name=f"{workload}, token: hidden share", value=value, low=HIDDEN_GOAL, high=1))
        if workload == EQUAL:
            value = float(np.mean([record["before_end_share"] for record in some if record["arm"] == TOKEN]))
            name = f"{workload}, token: share of kept tokens computed before their response has finished"
            made.append(Check(name=name, value=value, low=BEFORE_END_GOAL, high=1))
    return made
