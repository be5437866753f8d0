"""Statistics of response lengths and correctness, in groups of responses to one prompt.

Arrays have shape (groups, size): lengths in tokens with the end-of-sequence token, correctness 0 or 1. Intervals are
95 % percentile bootstraps over groups, so that responses to one prompt are never treated as independent.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Array = np.ndarray
Verdict = Literal["I", "II", "undecided"]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with the ends of its 95 % interval, e.g. ``Estimate(value=0.5, low=0.48, high=0.52)``."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean(values: Array, rng: np.random.Generator) -> Estimate:
    """The mean over all responses; `values` is (groups, size)."""
    per_group = values.mean(axis=1)
    return interval(float(values.mean()), _weights(len(values), rng) @ per_group / len(values))


def quantile(values: Array, q: float, rng: np.random.Generator, resamples: int = 300) -> Estimate:
    """The q-quantile over all responses (or over groups, if `values` is (groups, 1))."""
    group_picks = rng.integers(len(values), size=(resamples, len(values)))
    drawn_values = [np.quantile(values[group_pick], q) for group_pick in group_picks]
    return interval(float(np.quantile(values, q)), np.array(drawn_values))


def ratio(above: Array, below: Array, rng: np.random.Generator) -> Estimate:
    """The sum of `above` over the sum of `below`; both are (groups,), and their entries belong together in pairs."""
    group_weights = _weights(len(above), rng)
    return interval(float(above.sum() / below.sum()), (group_weights @ above) / (group_weights @ below))


def longest_over_median(lengths: Array) -> Array:
    """Per group, the longest response over the median one; shape (groups, 1)."""
    return (lengths.max(axis=1) / np.median(lengths, axis=1))[:, None]


def group_correlations(lengths: Array, correct: Array) -> Array:
    """Pearson correlation of length and correctness, shape (n, 1), per group with both outcomes and varying lengths."""
    centred_lengths = lengths - lengths.mean(axis=1, keepdims=True)
    centred_correct = correct - correct.mean(axis=1, keepdims=True)
    norm_product = np.sqrt((centred_lengths**2).sum(axis=1) * (centred_correct**2).sum(axis=1))
    is_defined = norm_product > 0
    return ((centred_lengths * centred_correct).sum(axis=1)[is_defined] / norm_product[is_defined])[:, None]


def wrong_is_longer(lengths: Array, correct: Array) -> Array:
    """Per group with both outcomes, 1 if its wrong responses are on average no shorter; (n, 1)."""
    num_right = correct.sum(axis=1)
    has_both = (num_right > 0) & (num_right < correct.shape[1])
    lengths, correct, num_right = lengths[has_both], correct[has_both], num_right[has_both]
    mean_right = (lengths * correct).sum(axis=1) / num_right
    mean_wrong = (lengths * (1 - correct)).sum(axis=1) / (correct.shape[1] - num_right)
    return (mean_wrong >= mean_right).astype(float)[:, None]


def length_gap(lengths: Array, correct: Array, rng: np.random.Generator) -> Estimate:
    """E[length | wrong] - E[length | correct] in tokens; NaN where one outcome never occurs."""
    return _gap(lengths, correct, _weights(len(lengths), rng))


def verdict(gap: Estimate) -> Verdict:
    """Pattern I (verbosity) if the interval of `length_gap` is above 0, II (depth) if below."""
    if gap.low > 0:
        return "I"
    return "II" if gap.high < 0 else "undecided"


def false_verdicts(lengths: Array, correct: Array, rng: np.random.Generator, shuffles: int) -> float:
    """The control: share of shuffles of correctness over responses that still show a pattern. Shuffled outcomes carry
    none, so an honest 95 % interval gives about 0.05."""
    group_weights, num_found = _weights(len(lengths), rng), 0
    for _ in range(shuffles):
        shuffled_correct = rng.permutation(correct.ravel()).reshape(correct.shape)
        num_found += verdict(_gap(lengths, shuffled_correct, group_weights)) != "undecided"
    return num_found / shuffles


def _gap(lengths: Array, correct: Array, weights: Array) -> Estimate:
    """`length_gap` with resamples given as how often each group is drawn, (resamples, groups)."""
    is_wrong = 1 - correct
    sum_columns = (lengths * is_wrong, is_wrong, lengths * correct, correct)
    sums = np.stack([column.sum(axis=1) for column in sum_columns], axis=1).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        overall_gap, drawn_gaps = (
            rows[0] / rows[1] - rows[2] / rows[3] for rows in (sums.sum(axis=0), np.einsum("rg,gc->cr", weights, sums))
        )
    finite_gaps = drawn_gaps[np.isfinite(drawn_gaps)]
    if not np.isfinite(overall_gap) or not len(finite_gaps):
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
    return interval(float(overall_gap), finite_gaps)


def _weights(groups: int, rng: np.random.Generator) -> Array:
    """How often each group is drawn in each resample; shape (resamples, groups)."""
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=_RESAMPLES).astype(float)


def interval(value: float, drawn: Array) -> Estimate:
    """A value with the 95 % percentile interval of what was drawn."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))
