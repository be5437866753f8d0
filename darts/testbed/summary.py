"""What a testbed's responses look like, and the bounds that a usable testbed keeps."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from darts.evidence import statistics, tables
from darts.evidence.statistics import Array, Estimate, Verdict
from darts.evidence.tables import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Sampled responses of one difficulty class; arrays are (groups, size)."""

    lengths: Array
    """Tokens, the end-of-sequence token included."""
    correct: Array
    """1 for a right answer, else 0."""
    truncated: Array
    """1 for a response that reached the limit without an end-of-sequence token, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The statistics of one class, or of all of them; lengths in tokens."""

    groups: int
    size: int
    accuracy: Estimate
    length_mean: Estimate
    length_p50: Estimate
    length_p99: Estimate
    truncated: Estimate
    spread_p50: Estimate
    """Longest over median response of a group: the median over groups."""
    spread_p90: Estimate
    """The same: the 90th percentile over groups."""
    correlation: Estimate
    """Pearson correlation of length and correctness within a group: the mean over the groups that
    have both outcomes and lengths that vary."""
    correlated_groups: int
    """How many groups that is."""
    verbose_groups: Estimate
    """Share of the groups with both outcomes whose wrong responses are on average no shorter."""
    gap: Estimate
    """E[length | wrong] - E[length | correct]; NaN without both outcomes."""
    pattern: Verdict
    false_patterns: float
    """Control: share of shuffles of correctness that still show a pattern; 0.05 is expected."""


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
    return list({"overthink": _overthink, "depth": _depth}[testbed](overall, classes))


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


def _overthink(overall: Summary, classes: Mapping[int, Summary]) -> Iterator[Check]:
    patterns = [summary.pattern for summary in classes.values()]
    yield Check(name="pass@1", value=overall.accuracy.value, low=0.40, high=0.75)
    yield Check(name="longest/median, p50 of groups", value=overall.spread_p50.value, low=3, high=math.inf)
    yield Check(name="longest/median, p90 of groups", value=overall.spread_p90.value, low=6, high=math.inf)
    yield Check(name="share at the limit", value=overall.truncated.value, low=0.01, high=0.05)
    yield Check(name="correlation length, correct", value=overall.correlation.value, low=-0.15, high=0)
    yield Check(name="classes of Pattern I", value=patterns.count("I"), low=1, high=len(classes) - 1)
    yield Check(name="classes of Pattern II", value=patterns.count("II"), low=1, high=len(classes) - 1)
    yield _control(classes)


def _depth(overall: Summary, classes: Mapping[int, Summary]) -> Iterator[Check]:
    mixed_classes = [summary for summary in classes.values() if 0 < summary.accuracy.value < 1]
    num_deep = sum(summary.pattern == "II" for summary in mixed_classes)
    yield Check(name="pass@1", value=overall.accuracy.value, low=0.40, high=0.75)
    yield Check(name="longest/median, p50 of groups", value=overall.spread_p50.value, low=1.05, high=math.inf)
    yield Check(name="share at the limit", value=overall.truncated.value, low=0, high=0.01)
    yield Check(name="correlation length, correct", value=overall.correlation.value, low=0.1, high=1)
    yield Check(name="classes with both outcomes", value=len(mixed_classes), low=1, high=len(classes))
    yield Check(name="of those, of Pattern II", value=num_deep, low=len(mixed_classes), high=len(mixed_classes))
    yield _control(classes)


def _control(classes: Mapping[int, Summary]) -> Check:
    shares = [summary.false_patterns for summary in classes.values()]
    return Check(name="control: shuffles with a pattern", value=sum(shares) / len(shares), low=0, high=0.1)
