"""What `darts.bench.rollouts` reports: its records in, Markdown tables and checks out.

Contract: pure NumPy. Ratios are of totals over paired records (`PAIRED_BY`), with 95 % bootstrap intervals over the
pairs. Every table is the whole of its experiment: no repetition is left out.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from darts.bench import harness
from darts.bench.harness import FlatRecord
from darts.evidence.statistics import Array
from darts.evidence.tables import Check

STREAMING, EARLY_STOP, ROUTING = "streaming", "early-stop", "routing"
PAIRED_BY = {
    STREAMING: ("requests", "repetition"),
    EARLY_STOP: ("seed", "batch"),
    ROUTING: ("limit", "repetition"),
}
"""By experiment, the keys that records of different arms have in common."""
PLAIN = "plain"
PLAIN_M = "plain n=M"
OFF, EAGER, EXACT = "shortest off", "shortest eager", "shortest exact"
BALANCED, GROUP = "balanced", "group"
STREAMING_TARGET = 0.97
BASE = {STREAMING: PLAIN, EARLY_STOP: PLAIN_M, ROUTING: BALANCED}
"""By experiment, the arm that the others are compared with."""

STREAMING_COLUMNS: harness.Columns = (
    ("repetitions", lambda arm: len(arm.own)),
    ("tokens/s, median", lambda arm: f"{arm.median('tokens_per_s'):,.0f}"),
    ("over plain", lambda arm: arm.speed_up(form=".3f")),
    ("chunks", lambda arm: f"{arm.mean('chunks'):,.0f}"),
)
EARLY_STOP_COLUMNS: harness.Columns = (
    ("seconds, median", lambda arm: f"{arm.median('seconds'):.3f}"),
    ("seconds, total", lambda arm: f"{arm.total('seconds'):.1f}"),
    ("speed-up over plain n=M", lambda arm: arm.speed_up()),
    ("tokens", lambda arm: f"{arm.total('tokens'):,.0f}"),
    ("kept", lambda arm: f"{arm.total('tokens_kept'):,.0f}"),
    ("aborted", lambda arm: f"{arm.total('aborted'):,.0f} of {arm.total('launched'):,.0f}"),
    (
        "tokens after the decision",
        lambda arm: f"{arm.total('tokens_after'):,.0f} ({arm.total('tokens_after') / arm.total('tokens'):.2%})",
    ),
    ("tail, s", lambda arm: f"{arm.mean('tail_s'):.3f}"),
    ("kept length", lambda arm: f"{arm.mean('kept_mean'):.1f}"),
)
CPU = ("engine", "server", "worker", "driver")
OVERHEAD_COLUMNS: harness.Columns = (
    ("speed-up of the engine's CPU time", lambda arm: arm.speed_up("cpu_engine_s")),
    ("share outside of the engine", lambda arm: f"{1 - arm.total('cpu_engine_s') / arm.total('seconds'):.2f}"),
    ("after the last request", lambda arm: f"{arm.total('after_s') / arm.total('seconds'):.3f}"),
    *(
        (f"CPU of {name}", lambda arm, name=name: f"{arm.total(f'cpu_{name}_s') / arm.total('seconds'):.2f}")
        for name in CPU
    ),
)
"""Where an arm's seconds went. On a quiet machine an engine with one thread is idle while it uses no CPU."""
ROUTING_COLUMNS: harness.Columns = (
    ("prefix cached", lambda arm: f"{arm.mean('cached_share'):.3f}"),
    (
        "prompt tokens computed",
        lambda arm: f"{arm.mean('computed_tokens'):,.0f} of {arm.mean('prompt_tokens'):,.0f}",
    ),
    ("imbalance", lambda arm: f"{arm.mean('imbalance'):.2f}"),
    ("seconds, median", lambda arm: f"{arm.median('seconds'):.3f}"),
    ("speed-up over balanced", lambda arm: arm.speed_up()),
)
TABLES: dict[str, tuple[tuple[harness.Columns, str | None], ...]] = {
    STREAMING: ((STREAMING_COLUMNS, "requests"),),
    EARLY_STOP: ((EARLY_STOP_COLUMNS, None), (OVERHEAD_COLUMNS, None)),
    ROUTING: ((ROUTING_COLUMNS, "limit"),),
}
"""By experiment, its tables, and the key whose values have rows of their own."""


def tables(results: Mapping[str, Sequence[FlatRecord]]) -> str:
    """All that there are, with their notes."""
    parts = []
    for name, records in results.items():
        pair_by = PAIRED_BY[name]
        parts += [harness.arms_table(records, columns, pair_by, BASE[name], split) for columns, split in TABLES[name]]
        if name == EARLY_STOP:
            parts.append(early_stop_note(records))
    return "\n\n".join(parts)


def checks(experiment_records: Mapping[str, Sequence[FlatRecord]]) -> list[Check]:
    """The bounds of the experiments that were run."""
    made_checks = streaming_checks(experiment_records[STREAMING]) if STREAMING in experiment_records else []
    return made_checks + (early_stop_checks(experiment_records[EARLY_STOP]) if EARLY_STOP in experiment_records else [])


def streaming_checks(flat_records: Sequence[FlatRecord], chunk_tokens: int = 256) -> list[Check]:
    """The aim: streaming in chunks of 256 costs at most 3 % of the throughput."""
    made_checks = []
    for requests in sorted({flat_record["requests"] for flat_record in flat_records}):
        chosen_records = [flat_record for flat_record in flat_records if flat_record["requests"] == requests]
        speed_ratio = harness.ratio(chosen_records, PLAIN, f"chunk {chunk_tokens}", PAIRED_BY[STREAMING]).value
        check_name = f"tokens/s with chunks of {chunk_tokens} over plain, {requests} requests"
        made_checks.append(Check(name=check_name, value=speed_ratio, low=STREAMING_TARGET, high=math.inf))
    return made_checks


def repeated_groups(records: Sequence[FlatRecord], arm: str, other_arm: str) -> Array:
    """Which groups had the same responses in two arms, as far as both ran; shape (pairs, prompts).

    Equal seeds should see to it. But the engine computes a sequence in a batch with others, and which ones changes the
    last bits of its log-probs: now and then another token is drawn. Such a group says nothing about the decision.
    """
    first_records, second = _of_arm(records, arm), _of_arm(records, other_arm)
    same_responses = np.zeros((len(first_records), len(first_records[0]["lengths"])), dtype=bool)
    for pair, prompt in np.ndindex(same_responses.shape):
        a, b = (
            (np.array(record["lengths"][prompt]), np.array(record["aborted_by_candidate"][prompt], dtype=bool))
            for record in (first_records[pair], second[pair])
        )
        same_responses[pair, prompt] = _agree(a, b)
    return same_responses


def kept_agree(flat_records: Sequence[FlatRecord], arm_name: str, other_arm: str) -> Array:
    """In which groups two arms kept the same candidates; shape (pairs, prompts)."""
    record_pairs = zip(_of_arm(flat_records, arm_name), _of_arm(flat_records, other_arm), strict=True)
    return np.array([[a == b for a, b in zip(x["kept"], y["kept"], strict=True)] for x, y in record_pairs])


def early_stop_checks(records: Sequence[FlatRecord]) -> list[Check]:
    """`exact` keeps what a run without early stop keeps, wherever the responses were the same."""
    repeated = repeated_groups(records, OFF, EXACT)
    agree = kept_agree(records, OFF, EXACT)[repeated]
    return [
        Check(name="share of groups with the same responses, off and exact", value=repeated.mean(), low=0.95, high=1),
        Check(name="of them, share in which exact keeps what off keeps", value=agree.mean(), low=1, high=1),
    ]


def early_stop_note(records: Sequence[FlatRecord]) -> str:
    """How often eager decides otherwise than exact."""
    same, agree = repeated_groups(records, EAGER, EXACT), kept_agree(records, EAGER, EXACT)
    return (
        f"eager keeps what exact keeps in {agree.mean():.3f} of {agree.size} groups, in {agree[same].mean():.3f} "
        f"of the {same.sum()} with the same responses"
    )


def _of_arm(records: Sequence[FlatRecord], arm: str) -> list[FlatRecord]:
    arm_records = [record for record in records if record["arm"] == arm]
    return sorted(arm_records, key=lambda record: tuple(record[name] for name in PAIRED_BY["early-stop"]))


def _agree(first_group: tuple[Array, Array], second_group: tuple[Array, Array]) -> bool:
    """Whether lengths can belong to the same responses; of an aborted one, its length is a lower bound."""
    (a, a_aborted), (b, b_aborted) = first_group, second_group
    lengths_fit = np.where(
        a_aborted,
        b_aborted | (a <= b),
        np.where(b_aborted, b <= a, a == b),
    )
    return bool(lengths_fit.all())
