"""What `darts.bench.rollouts` reports: its records in, Markdown tables and checks out.

Contract: pure NumPy. A record is one repetition of one arm: a flat dictionary of what was measured, as it stands in the
JSON file, with `arm` and the keys that pair it with the other arms' (`PAIRED_BY`). Ratios are of paired records, with
95 % bootstrap intervals over the pairs. Every table is the whole of its experiment: no repetition is left out.
"""

import math
from collections.abc import Sequence

import numpy as np

from darts.bench.harness import Record, arms_of, paired, speed_up
from darts.evidence import statistics
from darts.evidence.statistics import Array, Estimate
from darts.evidence.tables import Check, table

PAIRED_BY = {
    "streaming": ("requests", "repetition"),
    "early-stop": ("seed", "batch"),
    "routing": ("limit", "repetition"),
}
"""By experiment, the keys that records of different arms have in common."""
PLAIN = "plain"
PLAIN_M = "plain n=M"
OFF, EAGER, EXACT = "shortest off", "shortest eager", "shortest exact"
BALANCED, GROUP = "balanced", "group"
STREAMING_TARGET = 0.97


# --- streaming -------------------------------------------------------------------------------------------------------


def streaming_ratio(records: Sequence[Record], arm: str) -> Estimate:
    """Mean over repetitions of the arm's tokens per second over those of plain `generate`."""
    own, plain = (paired(records, name, "tokens_per_s", PAIRED_BY["streaming"]) for name in (arm, PLAIN))
    return statistics.mean((own / plain)[:, None], np.random.default_rng(0))


def streaming_table(records: Sequence[Record]) -> str:
    """Tokens per second by number of requests and arm."""
    rows = []
    for requests in sorted({record["requests"] for record in records}):
        some = [record for record in records if record["requests"] == requests]
        for arm in arms_of(some):
            speeds = paired(some, arm, "tokens_per_s", PAIRED_BY["streaming"])
            chunks = paired(some, arm, "chunks", PAIRED_BY["streaming"])
            ratio = "1" if arm == PLAIN else format(streaming_ratio(some, arm), ".3f")
            rows.append([requests, arm, len(speeds), f"{np.median(speeds):,.0f}", ratio, f"{np.mean(chunks):,.0f}"])
    return table(["requests", "arm", "repetitions", "tokens/s, median", "over plain", "chunks"], rows)


def streaming_checks(records: Sequence[Record], chunk: int = 256) -> list[Check]:
    """The aim: streaming in chunks of 256 costs at most 3 % of the throughput."""
    checks = []
    for requests in sorted({record["requests"] for record in records}):
        some = [record for record in records if record["requests"] == requests]
        value = streaming_ratio(some, f"chunk {chunk}").value
        name = f"tokens/s with chunks of {chunk} over plain, {requests} requests"
        checks.append(Check(name=name, value=value, low=STREAMING_TARGET, high=math.inf))
    return checks


# --- early stop ------------------------------------------------------------------------------------------------------


def early_stop_table(records: Sequence[Record]) -> str:
    """Time and tokens by arm."""
    by = PAIRED_BY["early-stop"]
    rows = []
    for arm in arms_of(records):

        def total(key: str, arm: str = arm) -> float:
            return float(paired(records, arm, key, by).sum())

        seconds = paired(records, arm, "seconds", by)
        rows.append(
            [
                arm,
                f"{np.median(seconds):.3f}",
                f"{seconds.sum():.1f}",
                "1" if arm == PLAIN_M else format(speed_up(records, arm, PLAIN_M, by), ".2f"),
                f"{total('tokens'):,.0f}",
                f"{total('tokens_kept'):,.0f}",
                f"{total('aborted'):,.0f} of {total('launched'):,.0f}",
                f"{total('tokens_after'):,.0f} ({total('tokens_after') / total('tokens'):.2%})",
                f"{np.mean(paired(records, arm, 'tail_s', by)):.3f}",
                f"{np.mean(paired(records, arm, 'kept_mean', by)):.1f}",
            ]
        )
    columns = [
        "arm", "seconds, median", "seconds, total", "speed-up over plain n=M", "tokens", "kept", "aborted",
        "tokens after the decision", "tail, s", "kept length",
    ]  # fmt: skip
    return table(columns, rows)


def repeated_groups(records: Sequence[Record], arm: str, other: str) -> Array:
    """Which groups had the same responses in two arms, as far as both ran; shape (pairs, prompts).

    Equal seeds should see to it. But the engine computes a sequence in a batch with others, and which ones changes the
    last bits of its log-probs: now and then another token is drawn. Such a group says nothing about the decision.
    """
    first, second = _columns(records, arm), _columns(records, other)
    same = np.zeros((len(first), len(first[0]["lengths"])), dtype=bool)
    for pair, prompt in np.ndindex(same.shape):
        a, b = (
            (np.array(record["lengths"][prompt]), np.array(record["aborted_by_candidate"][prompt], dtype=bool))
            for record in (first[pair], second[pair])
        )
        same[pair, prompt] = _agree(a, b)
    return same


def kept_agree(records: Sequence[Record], arm: str, other: str) -> Array:
    """In which groups two arms kept the same candidates; shape (pairs, prompts)."""
    rows = zip(_columns(records, arm), _columns(records, other), strict=True)
    return np.array([[a == b for a, b in zip(x["kept"], y["kept"], strict=True)] for x, y in rows])


def early_stop_checks(records: Sequence[Record]) -> list[Check]:
    """`exact` keeps what a run without early stop keeps, wherever the responses were the same."""
    repeated = repeated_groups(records, OFF, EXACT)
    agree = kept_agree(records, OFF, EXACT)[repeated]
    return [
        Check(name="share of groups with the same responses, off and exact", value=repeated.mean(), low=0.95, high=1),
        Check(name="of them, share in which exact keeps what off keeps", value=agree.mean(), low=1, high=1),
    ]


def early_stop_note(records: Sequence[Record]) -> str:
    """How often eager decides otherwise than exact."""
    repeated, agree = repeated_groups(records, EAGER, EXACT), kept_agree(records, EAGER, EXACT)
    return (
        f"eager keeps what exact keeps in {agree.mean():.3f} of {agree.size} groups, in {agree[repeated].mean():.3f} "
        f"of the {repeated.sum()} with the same responses"
    )


def overhead_table(records: Sequence[Record]) -> str:
    """Where an arm's seconds went, and what the engine alone has saved.

    On a quiet machine an engine with one thread is idle while it uses no CPU.
    """
    by = PAIRED_BY["early-stop"]
    records = [{**record, "engine_s": record["cpu_s"]["engine"]} for record in records]
    rows = []
    for arm in arms_of(records):
        seconds = paired(records, arm, "seconds", by).sum()
        cpu = [record["cpu_s"] for record in records if record["arm"] == arm]
        shares = {name: sum(some[name] for some in cpu) / seconds for name in cpu[0]}
        rows.append(
            [
                arm,
                "1" if arm == PLAIN_M else format(speed_up(records, arm, PLAIN_M, by, "engine_s"), ".2f"),
                f"{1 - shares['engine']:.2f}",
                f"{paired(records, arm, 'after_s', by).sum() / seconds:.3f}",
                *(f"{share:.2f}" for share in shares.values()),
            ]
        )
    columns = ["arm", "speed-up of the engine's CPU time", "share outside of the engine", "after the last request"]
    return table([*columns, *(f"CPU of {name}" for name in records[0]["cpu_s"])], rows)


def _columns(records: Sequence[Record], arm: str) -> list[Record]:
    own = [record for record in records if record["arm"] == arm]
    return sorted(own, key=lambda record: tuple(record[name] for name in PAIRED_BY["early-stop"]))


def _agree(first: tuple[Array, Array], second: tuple[Array, Array]) -> bool:
    """Whether lengths can belong to the same responses; of an aborted one, its length is a lower bound."""
    (a, a_aborted), (b, b_aborted) = first, second
    fits = np.where(
        a_aborted,
        b_aborted | (a <= b),
        np.where(b_aborted, b <= a, a == b),
    )
    return bool(fits.all())


# --- routing ---------------------------------------------------------------------------------------------------------


def routing_table(records: Sequence[Record]) -> str:
    """Prefill and time by response limit and arm."""
    rows = []
    for limit in sorted({record["limit"] for record in records}):
        some = [record for record in records if record["limit"] == limit]
        for arm in arms_of(some):
            own = [record for record in some if record["arm"] == arm]
            speed = "1" if arm == BALANCED else format(speed_up(some, arm, BALANCED, PAIRED_BY["routing"]), ".2f")
            rows.append(
                [
                    limit,
                    arm,
                    f"{np.mean([record['cached_share'] for record in own]):.3f}",
                    f"{np.mean([record['computed_tokens'] for record in own]):,.0f} of "
                    f"{np.mean([record['prompt_tokens'] for record in own]):,.0f}",
                    f"{np.mean([imbalance(record['requests_by_server']) for record in own]):.2f}",
                    f"{np.median([record['seconds'] for record in own]):.3f}",
                    speed,
                ]
            )
    columns = ["response tokens", "routing", "prefix cached", "prompt tokens computed", "imbalance", "seconds, median"]
    return table([*columns, "speed-up over balanced"], rows)


def imbalance(requests: Sequence[int]) -> float:
    """Requests of the busiest server over the mean; 1 is even."""
    return max(requests) / (sum(requests) / len(requests))
