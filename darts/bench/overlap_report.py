"""What `darts.bench.overlap` reports: its records in, Markdown tables and checks out.

Contract: pure NumPy. A record is one step of one arm, as `darts.bench.overlap_run` writes it. Ratios are of totals,
paired by batch, with 95 % bootstrap intervals over the batches. Exposed seconds are what the trainer waited for
log-probs after generation, by the trainer's clock and alike in all arms: verl's phases `old_log_prob` and `ref`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from darts.bench import harness as common
from darts.evidence import statistics
from darts.evidence.statistics import Estimate
from darts.evidence.tables import Check

OFF, SEQUENCE, TOKEN, BYPASS = "off", "sequence", "token", "bypass"
ARMS = (OFF, SEQUENCE, TOKEN, BYPASS)
OVERLAPPED = (SEQUENCE, TOKEN)
TAIL, EQUAL = "heavy tail", "equal lengths"
BY = ("batch",)
HIDDEN_GOAL = 0.9
BEFORE_END_GOAL = 0.5
SAME_LENGTHS = "share of batches with equal kept lengths in all arms"


def with_sums(records: Sequence[common.Record]) -> list[dict[str, Any]]:
    """The records, with the seconds that the tables are made of."""
    sums = []
    for record in records:
        waited = record["old_log_prob_s"] + record["ref_s"]
        hidden = record.get("hidden_s", 0.0)
        sums.append({**record, "waited_s": waited, "hidden_s": hidden, "computed_s": hidden + waited})
    return sums


def share(records: Sequence[common.Record], arm: str, part: str, whole: str) -> Estimate:
    """The total of `part` over that of `whole`, of one arm."""
    above, below = (common.paired(records, arm, key, BY) for key in (part, whole))
    return statistics.ratio(above, below, np.random.default_rng(0))


def not_exposed(records: Sequence[common.Record], arm: str) -> Estimate:
    """1 minus the arm's exposed seconds over those of `off`."""
    left = common.over(records, arm, OFF, BY, "waited_s")
    return Estimate(value=1 - left.value, low=1 - left.high, high=1 - left.low)


def steps_table(records: Sequence[common.Record]) -> str:
    """Seconds of a step and its parts, means over the batches of a workload; ratios to `off`."""
    rows = []
    for arm in common.arms_of(records):
        own = [record for record in records if record["arm"] == arm]
        parts = ("step_s", "gen_s", "old_log_prob_s", "ref_s", "update_actor_s", "update_weights_s")
        means = [f"{common.mean([record[part] for record in own]):.2f}" for part in parts]
        ratios = ["1" if arm == OFF else format(common.over(records, arm, OFF, BY, key), ".3f") for key in parts[:2]]
        rows.append([arm, len(own), *means, *ratios, format(share(records, arm, "waited_s", "step_s"), ".1%")])
    columns = [
        "arm", "batches", "step, s", "generation, s", "old log-probs, s", "reference, s", "update, s", "weights, s",
        "step over off", "generation over off", "log-probs' share of the step",
    ]  # fmt: skip
    return common.table(columns, rows)


def hidden_table(records: Sequence[common.Record]) -> str:
    """What was hidden and what it took, of the arms that overlap."""
    rows = []
    for arm in (arm for arm in common.arms_of(records) if arm in OVERLAPPED):
        own = [record for record in records if record["arm"] == arm]
        average = {key: common.mean(common.found(own, key)) for key in own[0] if isinstance(own[0][key], float)}
        rows.append([
            arm, format(share(records, arm, "hidden_s", "computed_s"), ".3f"), format(not_exposed(records, arm), ".3f"),
            f"{average['before_end_share']:.3f}", f"{average['in_rollout_share']:.3f}",
            f"{average['forwarded_per_kept']:.2f}", f"{average['tokens_wasted']:,.0f}", f"{average['calls']:.0f}",
            f"{max(common.found(own, 'cache_peak_gib')):.3f}",
        ])  # fmt: skip
    columns = [
        "arm", "hidden / (hidden + exposed)", "1 - exposed / exposed of off", "tokens before their end",
        "tokens in the rollout", "forwarded per kept", "wasted tokens", "calls", "cache peak, GiB",
    ]  # fmt: skip
    return common.table(columns, rows)


def note(records: Sequence[common.Record]) -> str:
    """What a batch is, and whether the arms agree."""
    own = [record for record in records if record["arm"] == OFF]
    generated, kept = (common.mean([record[key] for record in own]) for key in ("tokens", "kept_tokens"))
    lengths = np.concatenate([np.array(record["kept_lengths"])[:, 2] for record in own])
    compared = [record for record in records if record.get("rows")]
    same, rows = (sum(record[key] for record in compared) for key in ("same_rows", "rows"))
    worst = max((record["log_prob_diff_max"] for record in compared), default=float("nan"))
    return (
        f"A batch: {generated:,.0f} tokens generated, {kept:,.0f} kept in {len(lengths) // len(own)} responses; kept "
        f"lengths: median {np.median(lengths):.0f}, longest {lengths.max()}.\nOld log-probs of an arm and of the first "
        f"of its batch: {same:,} of {rows:,} rows have the same tokens, their largest difference is {worst:.1e} nats."
    )


def tables(records: Sequence[common.Record]) -> str:
    """All, for each workload."""
    parts = []
    for workload in dict.fromkeys(record["workload"] for record in records):
        some = with_sums(record for record in records if record["workload"] == workload)
        parts.append(f"{workload}\n\n{steps_table(some)}\n\n{hidden_table(some)}\n\n{note(some)}")
    return "\n\n".join(parts)


def equal_lengths(records: Sequence[common.Record]) -> float:
    """The share of batches whose arms kept the same candidates with the same lengths."""
    batches: dict[int, list[Any]] = {}
    for record in records:
        batches.setdefault(record["batch"], []).append(record["kept_lengths"])
    return float(np.mean([all(lengths == of_arms[0] for lengths in of_arms) for of_arms in batches.values()]))


def checks(records: Sequence[common.Record]) -> list[Check]:
    """The bounds, each with what was measured."""
    made = [Check(name=SAME_LENGTHS, value=equal_lengths(records), low=1, high=1)]
    late = sum(record["late_rows"] for record in records if record["arm"] in OVERLAPPED)
    made.append(Check(name="late rows", value=late, low=0, high=0))
    for workload in dict.fromkeys(record["workload"] for record in records):
        some = with_sums(record for record in records if record["workload"] == workload)
        if TOKEN not in common.arms_of(some):
            continue
        value = share(some, TOKEN, "hidden_s", "computed_s").value
        made.append(Check(name=f"{workload}, token: hidden share", value=value, low=HIDDEN_GOAL, high=1))
        if workload == EQUAL:
            value = common.mean([record["before_end_share"] for record in some if record["arm"] == TOKEN])
            name = f"{workload}, token: share of kept tokens computed before their response has finished"
            made.append(Check(name=name, value=value, low=BEFORE_END_GOAL, high=1))
    return made
