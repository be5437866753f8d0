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
    summed_records = []
    for record in records:
        waited_s, hidden_s = record["old_log_prob_s"] + record["ref_s"], record.get("hidden_s", 0.0)
        summed_records.append({**record, "waited_s": waited_s, "hidden_s": hidden_s, "computed_s": hidden_s + waited_s})
    return summed_records


def by_workload(flat_records: Sequence[FlatRecord]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The workloads, each with its records."""
    for workload in dict.fromkeys(flat_record["workload"] for flat_record in flat_records):
        yield workload, with_sums([flat_record for flat_record in flat_records if flat_record["workload"] == workload])


def hidden_share(flat_records: Sequence[FlatRecord], arm_name: str) -> Estimate:
    """The arm's hidden seconds over all that were computed."""
    return ArmFigures(arm=arm_name, base=OFF, pair_by=PAIR_BY, records=flat_records).share("hidden_s", "computed_s")


def not_exposed(flat_records: Sequence[FlatRecord], arm_name: str) -> Estimate:
    """1 minus the arm's exposed seconds over those of `off`."""
    exposed_ratio = harness.ratio(flat_records, arm_name, OFF, PAIR_BY, "waited_s")
    return Estimate(value=1 - exposed_ratio.value, low=1 - exposed_ratio.high, high=1 - exposed_ratio.low)


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


def tables(flat_records: Sequence[FlatRecord]) -> str:
    """All, for each workload."""
    made_parts = []
    for workload, workload_records in by_workload(flat_records):
        steps_table = harness.arms_table(workload_records, STEP_COLUMNS, PAIR_BY, OFF)
        hidden_s = harness.arms_table(workload_records, HIDDEN_COLUMNS, PAIR_BY, OFF, arms=OVERLAPPED)
        made_parts += [workload, steps_table, hidden_s, note(workload_records)]
    return "\n\n".join(made_parts)


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
