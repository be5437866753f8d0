"""The pure parts of the overlap's benchmark: workloads, tables and checks."""

import argparse

import numpy as np
import pandas as pd
import pytest

from darts.bench import overlap
from darts.bench.harness import ArmFigures
from darts.bench.overlap import ARMS, BYPASS, EQUAL, OFF, TAIL, TOKEN
from darts.evidence.statistics import Estimate

# --- the run's workloads ---------------------------------------------------------------------------------------------


def given(**changes):
    settings = {
        "prompts": 3, "candidates": 12, "median": 300.0, "limit": 1024, "chunk_tokens": 64, "kv_cache_gib": 2,
        "seed": 0, "batches": 2, "equal_batches": 1, "override": ["a.b=1"],
    }  # fmt: skip
    return argparse.Namespace(**settings | changes)


def test_every_batch_has_a_length_for_each_candidate():
    batches = overlap.batches_of(given())
    assert [workload for workload, _ in batches] == [TAIL, TAIL, EQUAL]
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


def test_the_run_changes_no_weights_and_has_one_response_in_a_micro_batch(tmp_path):
    overrides = overlap.overrides(tmp_path, given(), platform="cpu")
    assert {
        "actor_rollout_ref.actor.optim.lr=0",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "darts.placement=disaggregated",
        f"data.train_files={tmp_path}/train.parquet",
    } <= set(overrides)
    assert overrides[-1] == "a.b=1"


# --- its report ------------------------------------------------------------------------------------------------------


def step(arm, batch, workload=TAIL, **changes):
    overlapped = {
        "hidden_s": 1.9, "before_end_share": 0.6, "in_rollout_share": 0.97, "forwarded_per_kept": 1.5,
        "tokens_wasted": 100.0, "calls": 12.0, "late_rows": 0.0, "cache_peak_gib": 0.25,
    }  # fmt: skip
    computed = {"same_rows": 8, "rows": 8, "log_prob_diff_max": 1e-6}
    record = {
        "workload": workload, "step": batch, "arm": arm, "step_s": 10.0, "rollout_s": 6.0, "old_log_prob_s": 0.0,
        "ref_s": 0.0, "update_s": 2.0, "weights_s": 0.1, "tokens_generated": 900, "tokens_kept": 600,
        "kept_lengths": [[0, 0, 300], [0, 3, 300 + batch]],
    }  # fmt: skip
    of_arm = {OFF: {"old_log_prob_s": 2.0, "step_s": 12.0} | computed, BYPASS: {}}
    return record | of_arm.get(arm, overlapped | computed | {"old_log_prob_s": 0.1, "step_s": 10.1}) | changes


def steps(workload=TAIL, **of_token):
    return [step(arm, batch, workload, **(of_token if arm == TOKEN else {})) for batch in (2, 3) for arm in ARMS]


def figures(arm, records):
    return ArmFigures(arm=arm, base=OFF, pair_by=["step"], records=overlap.with_sums(pd.DataFrame(records)))


def test_both_hidden_shares_and_the_ratio_of_steps():
    assert figures(TOKEN, steps()).share("hidden_s", "computed_s").value == pytest.approx(0.95)
    assert overlap.not_exposed(figures(TOKEN, steps())).value == pytest.approx(0.95)
    assert overlap.not_exposed(figures(BYPASS, steps())).value == 1
    text = overlap.tables(pd.DataFrame(steps()))
    assert "| token | 2 | 10.10 | 6.00 | 0.10 | 0.00 | 2.00 | 0.10 | 0.842 [0.842, 0.842] |" in text
    assert "| token | 0.950 [0.950, 0.950] | 0.950 [0.950, 0.950] | 0.600 | 0.970 | 1.50 | 100 | 12 | 0.250 |" in text
    assert "48 of 48 rows have the same tokens, their largest difference is 1.0e-06 nats" in text


def test_the_interval_of_what_was_not_exposed_is_in_order():
    records = [*steps(), *(r | {"step": 4, "old_log_prob_s": 1.0} for r in steps()[:4])]
    estimate = overlap.not_exposed(figures(TOKEN, records))
    assert isinstance(estimate, Estimate)
    assert estimate.low < estimate.value < estimate.high


def failed(records):
    return [check.name for check in overlap.checks(pd.DataFrame(records)) if not check.passed]


def test_a_good_run_passes_and_each_bound_can_fail():
    good = [*steps(), *(record | {"step": record["step"] + 2} for record in steps(EQUAL))]
    assert failed(good) == []
    assert len(overlap.checks(pd.DataFrame(good))) == 5
    assert failed(steps(late_rows=1.0)) == ["late rows"]
    assert failed(steps(old_log_prob_s=0.3)) == ["heavy tail, token: hidden share"]
    assert failed(steps(kept_lengths=[[0, 0, 300], [0, 4, 302]])) == [overlap.SAME_LENGTHS]
    assert failed(steps(EQUAL, before_end_share=0.4)) == [
        "equal lengths, token: share of kept tokens computed before their response has finished"
    ]


def test_an_arm_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="arm 'token'"):
        overlap.tables(pd.DataFrame(steps()[:-2] + steps()[-1:]))
