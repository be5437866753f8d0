"""What a bench computes from its records: by hand, where little was measured, and how honest its intervals are."""

import math

import numpy as np
import pytest
from bench_records import bench, step, validation

from darts.bench import statistics
from darts.bench.statistics import BenchResults, Reached, compared

# --- one arm ---------------------------------------------------------------------------------------------------------


def test_figures_of_an_arm():
    results = BenchResults(bench({"none": [[4.0, 2.0, 1.0, 1.0, 3.0, 1.0]]}))
    assert (results.seeds, results.num_steps, results.last_from) == ([0], 6, 5)
    seconds = results.values("none", "step_s")
    assert (seconds.mean(), seconds.median()) == (2.0, 1.5)
    assert results.values("none", "step_s", last=True).mean() == 2.0
    assert results.values("none", "tokens_dropped").sum() == 6 * 20
    assert results.over("none", "idle_slot_steps", "slot_steps") == 60 / 160
    assert results.over("none", "tokens_kept", "rollout_s") == 6 * 80 / 6.0
    seconds = results.by_seed("none", "step_s")
    assert (seconds.columns.tolist(), seconds.to_numpy().tolist()) == ([1, 2, 3, 4, 5, 6], [[4, 2, 1, 1, 3, 1]])


@pytest.mark.parametrize(("steps", "first"), [(1, 1), (2, 2), (3, 3), (5, 5), (6, 5), (30, 21), (100, 68)])
def test_the_last_third(steps, first):
    assert BenchResults([], steps=steps).last_from == first


def test_bubbles_weigh_as_their_slot_steps():
    records = [step(slot_steps=100, idle_slot_steps=50), step(number=2, slot_steps=300, idle_slot_steps=30)]
    assert BenchResults(records).over("none", "idle_slot_steps", "slot_steps") == 80 / 400


def test_an_arm_that_was_not_measured():
    results = BenchResults(bench({"none": [[1.0]]}), arms=["none", "darts"])
    assert math.isnan(results.values("darts", "step_s").mean())
    assert math.isnan(results.values("darts", "step_s").median())
    assert math.isnan(results.over("darts", "idle_slot_steps", "slot_steps"))
    assert math.isnan(results.accuracy("darts"))
    assert math.isnan(results.speed_up("darts", "none").overall.value)
    assert format(results.speed_up("darts", "none"), ".2f") == "-"
    assert results.accuracy_gain("darts", "none").by_seed == {}
    assert str(results.time_to("darts", 0.5)) == "-"


def test_nothing_at_all():
    results = BenchResults([])
    assert (results.arms, results.seeds, results.num_steps) == ([], [], 0)
    assert math.isnan(results.target("none"))


def test_a_step_that_is_there_twice_counts_as_it_was_last():
    assert BenchResults([step(seconds=9.0), step(seconds=1.0)]).values("none", "step_s").tolist() == [1.0]


# --- speed-up --------------------------------------------------------------------------------------------------------


def test_a_speed_up_is_the_ratio_of_totals():
    results = BenchResults(bench({"none": [[4.0, 2.0], [6.0, 6.0]], "darts": [[1.0, 2.0], [4.0, 5.0]]}))
    found = results.speed_up("darts", "none")
    assert found.overall.value == 18 / 12
    assert found.by_seed == {0: 2.0, 1: 12 / 9}
    assert found.overall.low <= 1.5 <= found.overall.high
    assert results.speed_up("darts", "none", last=True).by_seed == {0: 1.0, 1: 6 / 5}


def test_what_hits_both_arms_alike_does_not_widen_the_interval():
    seconds = [[1.0, 5.0, 2.0, 40.0], [3.0, 1.0, 1.0, 9.0]]
    results = BenchResults(bench({"none": [[2 * x for x in seed] for seed in seconds], "darts": seconds}))
    found = results.speed_up("darts", "none").overall
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_only_steps_that_both_have_are_compared():
    """A bench that was interrupted, and an arm that was added later."""
    results = BenchResults(bench({"none": [[4.0, 2.0, 100.0], [8.0]], "darts": [[2.0, 1.0]]}))
    assert results.speed_up("darts", "none").by_seed == {0: 2.0}


def test_one_pair_has_a_value_and_no_interval():
    found = BenchResults(bench({"none": [[3.0]], "darts": [[2.0]]})).speed_up("darts", "none")
    assert found.overall.value == 1.5
    assert math.isnan(found.overall.low)
    assert format(found, ".2f") == "1.50"


def test_one_seed_has_the_interval_of_its_steps():
    found = BenchResults(bench({"none": [[3.0, 4.0, 5.0, 3.0]], "darts": [[2.0, 2.0, 2.0, 2.0]]})).speed_up(
        "darts", "none"
    )
    assert found.overall.low < 15 / 8 < found.overall.high


def coverage(seeds, between, within, steps=30, correlation=0.0, benches=150):
    """How often the interval holds the true 1.5 if seeds and steps differ by so much (standard deviations of logs)."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(benches):
        rows = {}
        for seed in range(seeds):
            base, factor = rng.uniform(1, 3, steps), 1.5 * np.exp(between * rng.standard_normal())
            noise = rng.standard_normal(steps)
            for at in range(1, steps):
                noise[at] = correlation * noise[at - 1] + math.sqrt(1 - correlation**2) * noise[at]
            rows[seed] = list(zip(base * factor * np.exp(within * noise), base, strict=True))
        found = compared(rows).overall
        hits += found.low <= 1.5 <= found.high
    return hits / benches


def test_how_often_intervals_cover_the_truth(monkeypatch):
    """As the module says: honest about the noise of steps, and too narrow for how three seeds differ."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    assert 0.87 <= coverage(seeds=3, between=0.0, within=0.1) <= 0.99
    assert 0.60 <= coverage(seeds=3, between=0.2, within=0.1) <= 0.85


def test_neighbouring_steps_that_are_alike_are_covered_with_three_seeds_and_less_with_one(monkeypatch):
    """Steps drawn one by one would cover 0.90 and 0.68 of the first two: the bounds see whether there are blocks."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    assert 0.92 <= coverage(seeds=3, between=0.0, within=0.1, correlation=0.5) <= 0.97
    assert 0.72 <= coverage(seeds=1, between=0.0, within=0.1, correlation=0.5) <= 0.85
    assert 0.50 <= coverage(seeds=1, between=0.0, within=0.1, correlation=0.5, steps=10) <= 0.75


# --- accuracy --------------------------------------------------------------------------------------------------------

STEPS = {"none": [[1.0] * 6, [1.0] * 6], "darts": [[0.5] * 6, [0.25] * 6]}


def test_accuracy_at_the_end_and_over_the_last_third():
    """Validations after 0, 2, 4 and 6 steps; the last third begins at 5."""
    results = BenchResults(bench(STEPS, {"none": [[0.1, 0.3, 0.2, 0.4], [0.1, 0.3, 0.2, 0.6]]}, every=2))
    assert results.accuracy("none") == pytest.approx(0.5)
    assert results.accuracy("none", last=True) == pytest.approx(0.5)
    results = BenchResults(bench({"none": [[1.0] * 3]}, {"none": [[0.1, 0.3, 0.2, 0.4]]}))
    assert (results.accuracy("none"), results.accuracy("none", last=True)) == (0.4, 0.4)


def test_gain_is_paired_by_seed():
    accuracies = {"none": [[0.1, 0.4], [0.1, 0.8]], "darts": [[0.1, 0.5], [0.1, 0.9]]}
    found = BenchResults(bench(STEPS, accuracies, every=6)).accuracy_gain("darts", "none")
    assert found.overall.value == pytest.approx(0.1)
    assert (found.overall.low, found.overall.high) == pytest.approx((0.1, 0.1))
    assert found.by_seed == pytest.approx({0: 0.1, 1: 0.1})


def test_gain_by_prompts_has_the_interval_of_prompts():
    """The two arms differ on one prompt of four."""
    arms = {"none": (1.0, 0.0, 0.0, 1.0), "darts": (1.0, 0.0, 1.0, 1.0)}
    records = [validation(arm, 0, 6, float(np.mean(by)), prompt_accuracy=by) for arm, by in arms.items()]
    found = BenchResults([*bench(STEPS), *records]).accuracy_gain("darts", "none").overall
    assert found.value == 0.25
    assert 0 == found.low < 0.25 < found.high


def test_gain_where_prompts_are_not_the_same_is_that_of_the_means():
    arms = {"none": (1.0, 0.0), "darts": (1.0, 0.0, 1.0, 1.0)}
    records = [validation(arm, 0, 6, float(np.mean(by)), prompt_accuracy=by) for arm, by in arms.items()]
    found = BenchResults([*bench(STEPS), *records]).accuracy_gain("darts", "none").overall
    assert found.value == 0.25
    assert math.isnan(found.low)


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_an_accuracy_that_is_not_known_is_left_out(unknown):
    accuracies = {"none": [[0.1, 0.4]], "darts": [[0.1, unknown]]}
    results = BenchResults(bench(STEPS, accuracies, every=6))
    assert results.accuracy("darts") == 0.1
    assert math.isnan(results.accuracy_gain("darts", "none").overall.value), "both are the initial actor at step 0"
    assert math.isnan(results.accuracy_gain("darts", "none", last=True).overall.value)


def test_a_seed_that_has_only_begun_is_not_of_the_end():
    """Its only validation is that of the initial actor, which all arms share."""
    steps = {arm: [*some, [1.0]] for arm, some in STEPS.items()}
    accuracies = {"none": [[0.1, 0.4], [0.1, 0.8], [0.1]], "darts": [[0.1, 0.5], [0.1, 0.9], [0.1]]}
    results = BenchResults(bench(steps, accuracies, every=6))
    assert results.accuracy("none") == pytest.approx(0.6)
    assert results.accuracy_gain("darts", "none").by_seed == pytest.approx({0: 0.1, 1: 0.1})


@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_gain_by_prompts_covers_the_truth_with_any_number_of_seeds(monkeypatch, seeds):
    """All seeds have the same prompts, of which some gain and others lose: more seeds do not tell more of prompts."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng, hits, benches = np.random.default_rng(0), 0, 100
    for _ in range(benches):
        by_prompt = 0.1 + 0.3 * rng.standard_normal(60)
        records = []
        for seed in range(seeds):
            accuracies = {"darts": tuple(by_prompt + 0.3 * rng.standard_normal(60)), "none": (0.0,) * 60}
            records += [validation(arm, seed, 6, 0.0, prompt_accuracy=by) for arm, by in accuracies.items()]
        overall = BenchResults(records).accuracy_gain("darts", "none").overall
        hits += overall.low <= 0.1 <= overall.high
    assert 0.88 <= hits / benches <= 1.0


# --- time to an accuracy ---------------------------------------------------------------------------------------------


def test_time_to_an_accuracy_is_the_steps_own_until_the_first_that_has_it():
    accuracies = {"darts": [[0.1, 0.5, 0.3, 0.6], [0.1, 0.2, 0.5, 0.5]]}
    results = BenchResults(bench(STEPS, accuracies, every=2))
    assert results.time_to("darts", 0.5).seconds == {0: 1.0, 1: 1.0}  # 2 x 0.5, 4 x 0.25
    assert results.time_to("darts", 0.6).seconds == {0: 3.0, 1: math.inf}
    assert results.time_to("darts", 0.1).seconds == {0: 0.0, 1: 0.0}


def test_time_of_an_arm_that_never_gets_there():
    results = BenchResults(bench(STEPS, {"darts": [[0.1, 0.2], [0.1, 0.3]]}, every=6))
    assert str(results.time_to("darts", 0.9)) == "-"


def test_time_is_unknown_where_a_step_is_missing():
    records = [record for record in bench(STEPS) if record.step != 3]
    results = BenchResults([*records, validation("darts", 0, 2, 0.5), validation("darts", 1, 4, 0.5)])
    assert results.time_to("darts", 0.5).seconds == {0: 1.0, 1: math.inf}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({}, "-"),
        ({0: 10.0}, "10 s"),
        ({0: 10.0, 1: 20.0, 2: 60.0}, "20 s"),
        ({0: 10.0, 1: 20.0, 2: math.inf}, "20 s (2 of 3 seeds)"),
        ({0: 10.0, 1: math.inf, 2: math.inf}, "- (1 of 3 seeds)"),
        ({0: math.inf}, "-"),
    ],
)
def test_reached(seconds, said):
    assert str(Reached(seconds=seconds)) == said


def test_the_target_is_the_bases_accuracy_over_the_last_third():
    results = BenchResults(bench(STEPS, {"none": [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.6]]}, every=2))
    assert results.target("none") == pytest.approx(0.5)
