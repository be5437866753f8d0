"""What a testbed's responses look like, and the bounds that a usable testbed keeps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from darts.evidence import statistics, tables
from darts.evidence.statistics import Array, Estimate, Verdict
from darts.evidence.tables import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Sampled responses of one difficulty class; arrays are (groups, size)."""

    lengths: Array  # tokens, the end-of-sequence token included
    correct: Array  # 1 for a right answer, else 0
    truncated: Array  # 1 for a response that reached the limit without an end-of-sequence token, else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The statistics of one class, or of all of them; lengths in tokens.

    `correlation` is Pearson's of length and correctness within a group: the mean over the `correlated_groups`, which
    have both outcomes and lengths that vary.
    """

    groups: int
    size: int
    accuracy: Estimate
    length_mean: Estimate
    length_p50: Estimate
    length_p99: Estimate
    truncated: Estimate
    spread_p50: Estimate  # longest over median response of a group: the median over groups
    spread_p90: Estimate  # the same: the 90th percentile over groups
    correlation: Estimate
    correlated_groups: int
    verbose_groups: Estimate  # share of the groups with both outcomes whose wrong responses are on average no shorter
    gap: Estimate  # E[length | wrong] - E[length | correct]; NaN without both outcomes
    pattern: Verdict
    false_patterns: float  # control: share of shuffles of correctness that still show a pattern; 0.05 is expected


def summarize(samples: Samples, seed: int = 0, shuffles: int = 200) -> Summary:
    """Computes all statistics; `seed` decides the resamples and the control's `shuffles`."""
    rng = np.random.default_rng(seed)
    lengths, correct = samples.lengths.astype(float), samples.correct.astype(float)
    length_spreads = statistics.longest_over_median(lengths)
    correlations = statistics.group_correlations(lengths, correct)
    length_gap = statistics.length_gap(lengths, correct, rng)
    verbose_groups = statistics.wrong_is_longer(lengths, correct)
    no_estimate = Estimate(value=math.nan, low=math.nan, high=math.nan)
    return Summary(
        groups=lengths.shape[0],
        size=lengths.shape[1],
        accuracy=statistics.mean(correct, rng),
        length_mean=statistics.mean(lengths, rng),
        length_p50=statistics.quantile(lengths, 0.5, rng),
        length_p99=statistics.quantile(lengths, 0.99, rng),
        truncated=statistics.mean(samples.truncated.astype(float), rng),
        spread_p50=statistics.quantile(length_spreads, 0.5, rng),
        spread_p90=statistics.quantile(length_spreads, 0.9, rng),
        correlation=statistics.mean(correlations, rng) if len(correlations) else no_estimate,
        correlated_groups=len(correlations),
        verbose_groups=statistics.mean(verbose_groups, rng) if len(verbose_groups) else no_estimate,
        gap=length_gap,
        pattern=statistics.verdict(length_gap),
        false_patterns=statistics.false_verdicts(lengths, correct, rng, shuffles),
    )


def pool(classes: Mapping[int, Samples]) -> Samples:
    """All classes together; their groups must have one size."""
    array_names = ("lengths", "correct", "truncated")
    return Samples(**{name: np.concatenate([getattr(part, name) for part in classes.values()]) for name in array_names})


def checks(testbed: str, overall: Summary, classes: Mapping[int, Summary]) -> list[Check]:
    """The bounds of `testbed`, each with the measured value."""
    patterns = [summary.pattern for summary in classes.values()]
    mixed_patterns = [summary.pattern for summary in classes.values() if 0 < summary.accuracy.value < 1]
    truncated = [summary.truncated.value for summary in classes.values()]
    num_mixed, most_of_one = len(mixed_patterns), len(classes) - 1
    false_patterns = sum(summary.false_patterns for summary in classes.values()) / len(classes)
    bounds = {
        "overthink": (
            ("pass@1", overall.accuracy.value, 0.40, 0.75),
            ("longest/median, p50 of groups", overall.spread_p50.value, 3, math.inf),
            ("longest/median, p90 of groups", overall.spread_p90.value, 6, math.inf),
            ("share at the limit", overall.truncated.value, 0.01, 0.05),
            ("correlation length, correct", overall.correlation.value, -0.15, 0),
            ("classes of Pattern I", patterns.count("I"), 1, most_of_one),
            ("classes of Pattern II", patterns.count("II"), 1, most_of_one),
        ),
        "depth": (
            ("pass@1", overall.accuracy.value, 0.40, 0.75),
            ("longest/median, p50 of groups", overall.spread_p50.value, 1.05, math.inf),
            ("share at the limit", overall.truncated.value, 0, 0.01),
            ("correlation length, correct", overall.correlation.value, 0.1, 1),
            ("classes with both outcomes", num_mixed, 1, len(classes)),
            ("of those, of Pattern II", mixed_patterns.count("II"), num_mixed, num_mixed),
        ),
        "long": (
            ("pass@1", overall.accuracy.value, 0.40, 0.75),
            ("mean length", overall.length_mean.value, 150, math.inf),
            ("longest/median, p50 of groups", overall.spread_p50.value, 5, math.inf),
            ("share at the limit", overall.truncated.value, 0.01, 0.03),
            ("of those, in one class", max(truncated) / max(sum(truncated), 1e-9), 0.5, 1),
            ("classes of Pattern I", patterns.count("I"), 1, most_of_one),
            ("classes of Pattern II", patterns.count("II"), 1, most_of_one),
        ),
    }
    rows = (*bounds[testbed], ("control: shuffles with a pattern", false_patterns, 0, 0.1))
    return [Check(name=name, value=value, low=low, high=high) for name, value, low, high in rows]


def table(overall: Summary, classes: Mapping[int, Summary]) -> str:
    """A Markdown table with a column per class and one for all, intervals in brackets."""
    columns = {**{f"{difficulty} numbers": summary for difficulty, summary in classes.items()}, "all": overall}
    row_cells = {
        "responses (groups x size)": lambda s: f"{s.groups} x {s.size}",
        "pass@1": lambda s: format(s.accuracy, ".3f"),
        "mean length": lambda s: format(s.length_mean, ".1f"),
        "p50 length": lambda s: format(s.length_p50, ".0f"),
        "p99 length": lambda s: format(s.length_p99, ".0f"),
        "share at the limit": lambda s: format(s.truncated, ".4f"),
        "longest/median, p50 of groups": lambda s: format(s.spread_p50, ".2f"),
        "longest/median, p90 of groups": lambda s: format(s.spread_p90, ".2f"),
        "correlation length, correct": lambda s: f"{s.correlation:.3f} ({s.correlated_groups} groups)",
        "groups whose wrong responses are no shorter": lambda s: format(s.verbose_groups, ".2f"),
        "E[len, wrong] - E[len, correct]": lambda s: format(s.gap, ".1f"),
        "pattern": lambda s: s.pattern,
        "control: shuffles with a pattern": lambda s: f"{s.false_patterns:.3f}",
    }
    return tables.table(["", *columns], [[name, *map(cell, columns.values())] for name, cell in row_cells.items()])
