"""The pure parts of the overlap's benchmarks: workloads, tables and checks, and the projection on a virtual clock."""

import argparse
import json

import numpy as np
import pytest
from attic import overlap_projection
from attic.overlap_projection import Actor, Hardware, Shape

from darts.bench import overlap, overlap_report
from darts.bench.overlap_report import ARMS, BYPASS, EQUAL, OFF, SEQUENCE, TAIL, TOKEN
from darts.evidence.statistics import Estimate
from darts.latency import LatencyCurve, rollout_time
from darts.messages import RankCall, Row, SequenceKey

SMALL = Shape(name="small", parameters=1e6, layers=2, hidden=64, kv_heads=2, head_dim=32, tensor_parallel=1)


# --- the run's workloads ---------------------------------------------------------------------------------------------


def given(**changes):
    settings = {
        "prompts": 3, "candidates": 12, "median": 300.0, "limit": 1024, "chunk_tokens": 64, "kv_cache_gib": 2,
        "seed": 0, "batches": 2, "equal_batches": 1, "override": ["a.b=1"],
    }  # fmt: skip
    return argparse.Namespace(**settings | changes)


def test_every_batch_has_a_length_for_each_candidate_and_the_first_only_warms_up():
    batches = overlap.batches_of(given())
    assert [workload for workload, _ in batches] == [TAIL, TAIL, TAIL, EQUAL]
    for workload, prompts in batches:
        assert np.shape(prompts) == (3, 12)
        assert (np.array(prompts) == 1024).all() == (workload == EQUAL)
        assert np.min(prompts) >= 2
        assert np.max(prompts) <= 1024
    assert batches == overlap.batches_of(given())
    assert batches != overlap.batches_of(given(seed=1))


def test_the_drawn_lengths_have_a_heavy_tail():
    lengths = np.array(overlap.lengths_of(TAIL, given(prompts=2000), np.random.default_rng(0)))
    assert np.median(lengths) == pytest.approx(300, rel=0.05)
    assert np.mean(lengths.max(axis=1) / lengths.mean(axis=1)) == pytest.approx(2.1, abs=0.2)
    assert 0.01 < (lengths == 1024).mean() < 0.1


def test_the_run_changes_no_weights_and_has_one_response_in_a_micro_batch():
    overrides = overlap.overrides(given(), steps=4, platform="cpu")
    assert {
        "actor_rollout_ref.actor.optim.lr=0",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "darts.placement=disaggregated",
        "trainer.total_training_steps=4",
    } <= set(overrides)
    assert overrides[-1] == "a.b=1"


def test_a_line_that_is_being_written_is_read_later(tmp_path):
    path = tmp_path / "records.jsonl"
    assert list(overlap.new_records(path, 0)) == []
    path.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    assert list(overlap.new_records(path, 1)) == [{"n": 2}]


# --- its report ------------------------------------------------------------------------------------------------------


def step(arm, batch, workload=TAIL, **changes):
    overlapped = {
        "hidden_s": 1.9, "before_end_share": 0.6, "in_rollout_share": 0.97, "forwarded_per_kept": 1.5,
        "tokens_wasted": 100.0, "calls": 12.0, "late_rows": 0.0, "cache_peak_gib": 0.25,
    }  # fmt: skip
    computed = {"same_rows": 8, "rows": 8, "log_prob_diff_max": 1e-6}
    record = {
        "workload": workload, "batch": batch, "arm": arm, "step_s": 10.0, "gen_s": 6.0, "old_log_prob_s": 0.0,
        "ref_s": 0.0, "update_actor_s": 2.0, "update_weights_s": 0.1, "tokens": 900, "kept_tokens": 600,
        "kept_lengths": [[0, 0, 300], [0, 3, 300 + batch]],
    }  # fmt: skip
    of_arm = {OFF: {"old_log_prob_s": 2.0, "step_s": 12.0} | computed, BYPASS: {}}
    return record | of_arm.get(arm, overlapped | computed | {"old_log_prob_s": 0.1, "step_s": 10.1}) | changes


def steps(workload=TAIL, **of_token):
    return [step(arm, batch, workload, **(of_token if arm == TOKEN else {})) for batch in (2, 3) for arm in ARMS]


def test_both_hidden_shares_and_the_ratio_of_steps():
    records = overlap_report.with_sums(steps())
    assert overlap_report.share(records, TOKEN, "hidden_s", "computed_s").value == pytest.approx(0.95)
    assert overlap_report.not_exposed(records, TOKEN).value == pytest.approx(0.95)
    assert overlap_report.not_exposed(records, BYPASS).value == 1
    text = overlap_report.tables(steps())
    assert "| token | 2 | 10.10 | 6.00 | 0.10 | 0.00 | 2.00 | 0.10 | 0.842 [0.842, 0.842] |" in text
    assert "| token | 0.950 [0.950, 0.950] | 0.950 [0.950, 0.950] | 0.600 | 0.970 | 1.50 | 100 | 12 | 0.250 |" in text
    assert "48 of 48 rows have the same tokens, their largest difference is 1.0e-06 nats" in text


def test_the_interval_of_what_was_not_exposed_is_in_order():
    records = overlap_report.with_sums([*steps(), *(r | {"batch": 4, "old_log_prob_s": 1.0} for r in steps()[:4])])
    estimate = overlap_report.not_exposed(records, TOKEN)
    assert isinstance(estimate, Estimate)
    assert estimate.low < estimate.value < estimate.high


def failed(records):
    return [check.name for check in overlap_report.checks(records) if not check.passed]


def test_a_good_run_passes_and_each_bound_can_fail():
    good = [*steps(), *(record | {"batch": record["batch"] + 2} for record in steps(EQUAL))]
    assert failed(good) == []
    assert len(overlap_report.checks(good)) == 5
    assert failed(steps(late_rows=1.0)) == ["late rows"]
    assert failed(steps(old_log_prob_s=0.3)) == ["heavy tail, token: hidden share"]
    assert failed(steps(kept_lengths=[[0, 0, 300], [0, 4, 302]])) == [overlap_report.SAME_LENGTHS]
    assert failed(steps(EQUAL, before_end_share=0.4)) == [
        "equal lengths, token: share of kept tokens computed before their response has finished"
    ]


def test_an_arm_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="arm 'token'"):
        overlap_report.tables(steps()[:-2] + steps()[-1:])


# --- the projection --------------------------------------------------------------------------------------------------


def options(**changes):
    settings = {
        "prompts": 8, "candidates": 12, "median": 300.0, "limit": 1024, "prompt_tokens": 50, "chunk_tokens": 64,
        "ranks": 2, "servers": 2, "max_tokens": 2048, "kv_cache_gib": 1.0, "seeds": 1,
    }  # fmt: skip
    return argparse.Namespace(**settings | changes)


def test_generation_ends_when_the_cost_model_says():
    lengths = np.array([[10, 30, 20], [7, 64, 65]])
    curve = LatencyCurve([1, 2, 4], [0.5, 1.0, 1.5])
    events, ended = overlap_projection.generation(lengths, 2, curve, chunk=32, late_s=0.0)
    assert ended == max(rollout_time([10, 20, 64], curve), rollout_time([30, 7, 65], curve))
    assert [event.at for event in events] == sorted(event.at for event in events)
    told = [(event.start, event.end, event.last) for event in events if (event.prompt, event.candidate) == (1, 2)]
    assert told == [(0, 32, False), (32, 64, False), (64, 65, True)]
    assert [e[3:] for e in events if (e.prompt, e.candidate) == (1, 1)] == [(0, 32, False), (32, 64, True)]


def call(number=0, **rows):
    return RankCall(step=1, number=number, **rows)


def row(name, start, tokens, last):
    key = SequenceKey(name, 0)
    return Row(key=key, prompt_tokens=1, start=start, token_ids=np.zeros(tokens, dtype=np.int32), last=last)


def test_a_call_lasts_as_long_as_its_slowest_rank_and_all_gather_as_often():
    gpu = Hardware(call_s=0.0, gather=2e6)  # a second for the small model
    actor = Actor(SMALL, gpu, ranks=2)
    alone = actor.seconds([call(whole=[row("a", 0, 90, True)]), call()])
    assert alone == pytest.approx(1.0, abs=0.01)
    both = actor.seconds([call(whole=[row("b", 0, 90, True)], growing=[row("c", 0, 90, False)]), call()])
    assert both == pytest.approx(2.0, abs=0.01)
    assert actor.tokens == 270
    assert actor.calls == 2


def test_the_peak_is_of_the_prefixes_kept_and_in_use():
    actor = Actor(SMALL, Hardware(), ranks=1)
    actor.seconds([call(growing=[row("a", 0, 60, False), row("b", 0, 20, False)])])
    assert actor.peak_tokens == 80 + 2 * 60
    actor.seconds([call(growing=[row("a", 60, 10, True)], drop=[SequenceKey("b", 0)])])
    assert actor.peak_tokens == 80 + 2 * 60, "70 and 70 are less"
    actor.seconds([call(growing=[row("c", 0, 150, False)])])
    assert actor.peak_tokens == 150 + 150, "nothing is left of a and b"


def project(**changes):
    gpu = Hardware(flops=changes.pop("flops", 1e12))
    records = overlap_projection.project(SMALL, gpu, options(**changes), seed=0)
    return {record["arm"]: record for record in records}


def test_a_fast_actor_hides_nearly_everything_and_computes_each_kept_token():
    arms = project()
    off, sequence, token = (arms[arm] for arm in (OFF, SEQUENCE, TOKEN))
    assert off["exposed_s"] == off["off_s"] > 0
    assert arms[BYPASS]["step_s"] < token["step_s"] < off["step_s"] + 0.2
    assert sequence["before_end_share"] == 0
    assert token["before_end_share"] > 0.5
    assert token["in_rollout_share"] > sequence["in_rollout_share"] > 0.8
    assert token["peak_gib"] > sequence["peak_gib"] == 0
    assert {"cpu_grow_s", "cpu_next_call_s", "cpu_pickle_s"} <= token.keys()


def test_a_slow_actor_computes_the_rest_after_generation_and_wastes_less():
    fast, slow = project()[TOKEN], project(flops=2e9)[TOKEN]
    assert slow["exposed_s"] > 10 * fast["exposed_s"]
    assert slow["in_rollout_share"] < fast["in_rollout_share"]
    assert slow["wasted"] < fast["wasted"]


def test_the_cache_stays_within_its_budget():
    tight = 20 * 1100 * SMALL.kv_bytes / overlap_projection.GIB
    arms = project(kv_cache_gib=tight)
    assert 0 < arms[TOKEN]["peak_gib"] <= tight
    assert arms[TOKEN]["in_rollout_share"] > 0.5


def test_the_command_prints_its_assumptions_and_says_that_it_is_no_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overlap_projection, "SHAPES", (SMALL,))
    out = tmp_path / "projection.json"
    arguments = ["--prompts=4", "--median=200", "--limit=512", "--ranks=2", "--servers=2", "--seeds=2", f"--out={out}"]
    assert overlap_projection.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "A projection, not measured" in printed
    assert all(f"| {name} | {text} |" in printed for name, text in overlap_projection.ASSUMPTIONS)
    assert "pass  scheduler, CPU seconds of the worst step" in printed
    assert len(json.loads(out.read_text())["records"]) == 2 * 4
