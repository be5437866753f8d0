"""The harness of the benches, and what that of rollouts makes of its records: which groups may be compared."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from darts.bench import harness
from darts.bench import rollouts as report
from darts.bench.harness import paired
from darts.bench.rollouts import BENCH
from darts.config import ConfigError
from darts.evidence import statistics
from darts.evidence.tables import Check


def frames(records):
    return {name: pd.DataFrame(some) for name, some in records.items()}


def checks_of(records):
    return report.checks(frames(records))


def stream(arm, repetition, speed, requests=32):
    return {
        "arm": arm, "requests": requests, "repetition": repetition, "seconds": 1000 / speed, "tokens": 1000,
        "tokens_per_s": speed, "chunks": 0 if arm == report.PLAIN else 4,
    }  # fmt: skip


def rollout(arm, batch, seconds=1.0, lengths=((10, 20, 30),), aborted=((False,) * 3,), kept=((0, 1),), seed=0):
    return {
        "arm": arm, "seed": seed, "batch": batch, "seconds": seconds, "rollout/tail_s": 0.1, "after_s": 0.05,
        "candidates/launched": 3, "candidates/aborted": sum(map(sum, aborted)), "tokens/generated": 60,
        "tokens/kept": 30, "early_stop/tokens_after": 3, "length/kept_mean": 15.0, "cpu_engine_s": seconds / 2,
        "cpu_server_s": 0.0, "cpu_worker_s": 0.0, "cpu_driver_s": seconds / 10, "lengths": lengths,
        "aborted_by_candidate": aborted, "kept": kept,
    }  # fmt: skip


def routed(arm, repetition, seconds, computed, requests):
    return {
        "arm": arm, "limit": 32, "repetition": repetition, "seconds": seconds,
        "rollout/prefix_cached_share": 1 - computed / 1000, "computed_tokens": computed, "prompt_tokens": 1000,
        "imbalance": max(requests) / 48,
    }  # fmt: skip


# --- pairing and ratios ----------------------------------------------------------------------------------------------


def test_values_come_in_the_order_of_their_pairs_however_the_arms_took_turns():
    records = [rollout("a", 1, 3.0), rollout("b", 0, 1.0), rollout("b", 1, 4.0), rollout("a", 0, 2.0)]
    found = paired(pd.DataFrame(records), "seconds", report.PAIRED_BY["early-stop"])
    assert found["a"].tolist() == [2.0, 3.0]
    assert found["b"].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("left_over", [[], [rollout("a", 0), rollout("a", 0)]])
def test_a_repetition_that_is_missing_or_there_twice_is_refused(left_over):
    records = [rollout("b", 0), rollout("b", 1), rollout("a", 1), *left_over]
    with pytest.raises(ValueError, match="arm 'a'"):
        paired(pd.DataFrame(records), "seconds", report.PAIRED_BY["early-stop"])


def test_a_speed_up_is_the_ratio_of_totals_and_its_interval_that_of_the_pairs():
    """Both arms are slow where the machine was: the ratio is 2 in every pair, so its interval has no width."""
    speeds = [1.0, 5.0, 2.0, 40.0]
    records = [
        rollout(arm, batch, factor * seconds)
        for batch, seconds in enumerate(speeds)
        for arm, factor in (("slow", 2.0), ("fast", 1.0))
    ]
    found = harness.ratio(pd.DataFrame(records), "slow", "fast", report.PAIRED_BY["early-stop"])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        below = rng.lognormal(size=40)
        found = statistics.ratio(below * rng.uniform(1, 2, size=40), below, rng)
        hits += found.low <= 1.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


# --- streaming -------------------------------------------------------------------------------------------------------


def test_streaming_is_compared_within_each_repetition():
    records = [stream(report.PLAIN, n, 1000.0 * (n + 1)) for n in range(5)]
    records += [stream("chunk 256", n, 980.0 * (n + 1)) for n in range(5)]
    found = harness.ratio(pd.DataFrame(records), report.PLAIN, "chunk 256", report.PAIRED_BY["streaming"])
    assert (found.value, found.low, found.high) == pytest.approx((0.98, 0.98, 0.98))
    assert [check.passed for check in checks_of({"streaming": records})] == [True]
    slow = [record | {"seconds": record["seconds"] / 0.9} for record in records[5:]]
    assert [check.passed for check in checks_of({"streaming": records[:5] + slow})] == [False]
    table = report.tables(frames({"streaming": records})).splitlines()
    assert table[2] == "| 32 | plain | 5 | 3,000 | 1 | 0 |"
    assert table[3] == "| 32 | chunk 256 | 5 | 2,940 | 0.980 [0.980, 0.980] | 4 |"


# --- early stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "aborted", "same"),
    [
        ((10, 20, 30), (False, False, False), True),
        ((10, 20, 25), (False, False, True), True),
        ((10, 20, 31), (False, False, True), False),  # grew longer than the whole response
        ((10, 21, 30), (False, False, False), False),
        ((10, 21, 25), (False, False, True), False),
    ],
)
def test_an_aborted_response_is_the_same_as_far_as_it_ran(lengths, aborted, same):
    records = [rollout(report.OFF, 0), rollout(report.EXACT, 0, lengths=(lengths,), aborted=(aborted,))]
    assert report.compared_groups(pd.DataFrame(records), report.OFF, report.EXACT)[0].tolist() == [same]
    assert report.compared_groups(pd.DataFrame(records), report.EXACT, report.OFF)[0].tolist() == [same]


def test_two_aborted_responses_say_nothing_about_each_other():
    records = [
        rollout(report.EAGER, 0, lengths=((10, 20, 5),), aborted=((False, False, True),)),
        rollout(report.EXACT, 0, lengths=((10, 20, 9),), aborted=((False, False, True),)),
    ]
    assert report.compared_groups(pd.DataFrame(records), report.EAGER, report.EXACT)[0].tolist() == [True]


def early_stop_records(exact_kept, exact_lengths=((10, 20, 30),)):
    arms = (report.PLAIN_M, report.OFF, report.EAGER)
    records = [rollout(arm, batch, 1.5) for batch in range(40) for arm in arms]
    records += [rollout(report.EXACT, batch, 1.0) for batch in range(39)]
    return [*records, rollout(report.EXACT, 39, 1.0, lengths=exact_lengths, kept=exact_kept)]


def test_exact_must_keep_what_off_keeps():
    checks = checks_of({"early-stop": early_stop_records(exact_kept=((0, 1),))})
    assert [check.value for check in checks] == [1.0, 1.0]
    checks = checks_of({"early-stop": early_stop_records(exact_kept=((0, 2),))})
    assert [check.passed for check in checks] == [True, False]


def test_a_group_whose_responses_differ_says_nothing_about_the_decision():
    records = early_stop_records(exact_kept=((0, 2),), exact_lengths=((10, 20, 15),))
    assert [check.passed for check in checks_of({"early-stop": records})] == [True, True]
    assert checks_of({"early-stop": records})[0].value == pytest.approx(39 / 40)


def test_the_tables_of_early_stop():
    records = early_stop_records(exact_kept=((0, 1),))
    table, overhead, note = (part.splitlines() for part in report.tables(frames({"early-stop": records})).split("\n\n"))
    assert table[2].startswith("| plain n=M | 1.500 | 60.0 | 1 | 2,400 | 1,200 | 0 of 120 | 120 (5.00%) | 0.100 | 15.0")
    assert table[-1].startswith("| shortest exact | 1.000 | 40.0 | 1.50 [1.50, 1.50] |")
    assert "1.000 of 40 groups" in note[0]
    assert overhead[2] == "| plain n=M | 1 | 0.50 | 0.033 | 0.50 | 0.00 | 0.00 | 0.10 |"
    assert overhead[-1].startswith("| shortest exact | 1.50 [1.50, 1.50] | 0.50 |")


# --- routing and the command -----------------------------------------------------------------------------------------


def test_routing_reports_prefill_balance_and_time():
    records = [routed(report.BALANCED, n, 2.0, 400, [48, 48]) for n in range(3)]
    records += [routed(report.GROUP, n, 1.6, 250, [72, 24]) for n in range(3)]
    table = report.tables(frames({"routing": records})).splitlines()
    assert table[2] == "| 32 | balanced | 0.600 | 400 of 1,000 | 1.00 | 2.000 | 1 |"
    assert table[3] == "| 32 | group | 0.750 | 250 of 1,000 | 1.50 | 1.600 | 1.25 [1.25, 1.25] |"


def test_tables_and_checks_are_of_what_was_run():
    results = {"routing": [routed(report.BALANCED, 0, 2.0, 400, [48, 48])]}
    assert "prefix cached" in report.tables(frames(results))
    assert "tokens/s" not in report.tables(frames(results))
    assert report.checks(frames(results)) == []
    checks = checks_of({"early-stop": early_stop_records(exact_kept=((0, 1),))})
    assert len(checks) == 2
    assert not any(math.isnan(check.value) for check in checks)


def test_quick_is_small_unless_told_otherwise():
    assert BENCH.parse(["--quick"]).batches < BENCH.parse([]).batches
    assert BENCH.parse(["--quick", "--batches", "7"]).batches == 7


# --- turns -----------------------------------------------------------------------------------------------------------


def test_every_arm_stands_at_every_place_once_in_a_round():
    measured = []

    def measure(arm, turn):
        measured.append(arm)
        return {"seconds": 1.0}

    harness.take_turns(({"turn": turn} for turn in range(3)), ["a", "b", "c"], measure)
    assert [sorted(measured[place::3]) for place in range(3)] == [["a", "b", "c"]] * 3


def test_arms_take_turns_and_the_first_of_each_size_only_warms_up():
    measured = []

    def measure(arm, size, repetition):
        measured.append((arm, size, repetition))
        return {"seconds": float(len(measured))}

    records = harness.take_turns(harness.repetitions(1, size=[3, 5]), ["b", "a"], measure)
    assert measured == [
        ("b", 3, -1), ("a", 3, -1), ("a", 3, 0), ("b", 3, 0), ("b", 5, -1), ("a", 5, -1), ("a", 5, 0), ("b", 5, 0)
    ]  # fmt: skip
    assert [(record["arm"], record["size"], record["seconds"]) for record in records] == [
        ("b", 3, 4.0), ("b", 5, 8.0), ("a", 3, 3.0), ("a", 5, 7.0)
    ]  # fmt: skip


# --- the command -----------------------------------------------------------------------------------------------------


def bench_of(measure, passed=True):
    check = Check(name="enough", value=1.0, low=1.0 if passed else 2.0, high=3.0)
    options = {"--size": (3, "of it")}
    return harness.Bench(
        name="some",
        about="Contract.",
        options=options,
        measure=measure,
        tables=lambda records: "table",
        checks=lambda records: [check],
    )


@pytest.mark.parametrize("passed", [True, False])
def test_a_bench_leaves_a_document_and_its_checks_decide(tmp_path, capsys, passed):
    def measure(options, save):
        save(records=[1])
        return [options.size]

    assert bench_of(measure, passed).main(["--size", "4", "--out", str(tmp_path / "a.json")]) == (0 if passed else 1)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["command"][:5] == ["python", "-m", "darts.bench", "some", "--size"]
    assert (written["settings"]["size"], written["records"]) == (4, [4])
    assert written["checks"][0].startswith("pass" if passed else "FAIL")
    assert {"date", "commit", "cores"} <= written["machine"].keys()
    assert "table" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("--size", 3, "must be 4.", "say 4."), 2), (harness.BenchError("the engine is gone"), 1)],
)
def test_a_bench_that_is_refused_or_fails_says_so_in_one_line(capsys, error, code):
    def measure(options, save):
        raise error

    assert bench_of(measure).main([]) == code
    assert capsys.readouterr().err == f"[darts] {error}\n"
