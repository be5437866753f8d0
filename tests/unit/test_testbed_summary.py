"""Statistics and bounds of the testbeds, on made-up samples with known answers."""

import math

import numpy as np
import pytest

from darts.evidence import statistics
from darts.testbed.summary import Samples, Summary, checks, pool, summarize, table

RNG = np.random.default_rng


def make(gap: float, groups: int = 60, size: int = 16, seed: int = 0) -> Samples:
    """Half right; wrong answers are longer by `gap` tokens on average, noise 20."""
    rng = RNG(seed)
    correct = rng.integers(0, 2, size=(groups, size))
    lengths = np.maximum(1, rng.normal(100, 20, size=(groups, size)) + gap * (1 - correct)).round()
    return Samples(lengths=lengths, correct=correct, truncated=np.zeros((groups, size), dtype=int))


def brief(samples: Samples) -> Summary:
    """The summary with a small control."""
    return summarize(samples, shuffles=20)


@pytest.mark.parametrize(("gap", "pattern"), [(30, "I"), (-30, "II")])
def test_pattern_follows_the_sign_of_the_gap(gap: float, pattern: str):
    summary = brief(make(gap))
    assert summary.pattern == pattern
    assert summary.gap.low < gap < summary.gap.high
    assert summary.correlation.value == pytest.approx(-gap / math.hypot(40, 30), abs=0.05)


def test_shuffled_outcomes_show_a_pattern_about_one_time_in_twenty():
    assert summarize(make(30)).false_patterns == pytest.approx(0.05, abs=0.04)


def test_interval_of_a_mean_treats_groups_as_the_unit():
    """Responses of a group that all agree carry one observation, not sixteen."""
    same = np.repeat(RNG(0).integers(0, 2, size=(100, 1)), 16, axis=1)
    estimate = statistics.mean(same, RNG(0))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_longest_over_median_by_hand():
    lengths = np.array([[1, 2, 3, 12], [5, 5, 5, 5]])
    assert statistics.longest_over_median(lengths).tolist() == [[12 / 2.5], [1.0]]


def test_correlation_skips_groups_where_it_is_undefined():
    lengths = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 7]])
    correct = np.array([[0.0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]])
    result = statistics.group_correlations(lengths, correct)
    assert result.shape == (1, 1)
    assert result[0, 0] == pytest.approx(np.corrcoef(lengths[0], correct[0])[0, 1])


def test_groups_whose_wrong_responses_are_no_shorter_by_hand():
    lengths = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1]])
    correct = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert statistics.wrong_is_longer(lengths, correct).tolist() == [[1.0], [0.0]]


def test_gap_without_both_outcomes_is_undecided_and_not_a_number():
    samples = make(30)
    gap = statistics.length_gap(samples.lengths, np.ones_like(samples.correct), RNG(0))
    assert math.isnan(gap.value)
    assert statistics.verdict(gap) == "undecided"


def test_same_seed_same_summary_and_table_names_every_class():
    classes = {2: make(30), 5: make(-30)}
    summaries = {difficulty: brief(samples) for difficulty, samples in classes.items()}
    assert summaries[2] == brief(make(30))
    text = table(brief(pool(classes)), summaries)
    assert "2 numbers" in text
    assert "5 numbers" in text
    assert "| pattern | I | II |" in text


def failed(testbed: str, classes: dict[int, Samples]) -> set[str]:
    summaries = {difficulty: brief(samples) for difficulty, samples in classes.items()}
    return {check.name for check in checks(testbed, brief(pool(classes)), summaries) if not check.passed}


def test_bounds_of_overthink_want_both_patterns_and_a_long_tail():
    assert failed("overthink", {2: make(30), 5: make(30)}) == {
        "longest/median, p50 of groups",
        "longest/median, p90 of groups",
        "share at the limit",
        "correlation length, correct",
        "classes of Pattern I",
        "classes of Pattern II",
    }


def test_bounds_of_long_want_a_heavy_tail_and_truncations_by_prompt():
    def class_of(gap: float, truncated: float, length: float = 200.0) -> Samples:
        """Groups whose longest response is six times the median."""
        samples = make(gap)
        lengths = samples.lengths * length / 100
        lengths[:, 0] = 6 * np.median(lengths, axis=1)
        cut = RNG(1).random(lengths.shape) < truncated
        return Samples(lengths=lengths, correct=samples.correct, truncated=cut.astype(int))

    good = {3: class_of(60, 0.0), 7: class_of(-60, 0.04)}
    assert failed("long", good) == set()
    assert failed("long", good | {7: class_of(-60, 0.1)}) == {"share at the limit"}
    by_chance = {3: class_of(60, 0.02), 5: class_of(-60, 0.02), 7: class_of(-60, 0.02)}
    assert failed("long", by_chance) == {"of those, in one class"}
    short = {
        difficulty: Samples(lengths=s.lengths / 3, correct=s.correct, truncated=s.truncated)
        for difficulty, s in good.items()
    }
    assert failed("long", short) == {"mean length"}
    assert "classes of Pattern II" in failed("long", {3: class_of(60, 0.0), 7: class_of(60, 0.04)})


def test_bounds_of_depth_want_pattern_two_everywhere():
    assert failed("depth", {3: make(-30), 5: make(-30)}) == set()
    assert "of those, of Pattern II" in failed("depth", {3: make(-30), 5: make(0)})
