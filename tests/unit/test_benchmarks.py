"""The pure parts of the benches: what they compare with, how runs are paired, what the tables say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from darts.allocation import allocate as darts_allocate
from darts.bench import allocate, budgets, overhead
from darts.bench.command import BENCHES
from darts.config import ConfigError, DartsConfig
from darts.planning import RolloutPlanner

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["", *BENCHES])
def test_help_shows_the_contract(name):
    command = [sys.executable, "-m", "darts.bench", *name.split(), "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "Contract" in run.stdout
    assert "--out" in run.stdout


# --- allocate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2, 37])
@pytest.mark.parametrize("mean", [8, 10.5, 16])
def test_the_greedy_loop_allocates_as_darts_does(prompts, mean):
    rng = np.random.default_rng(prompts)
    total = int(mean * prompts)
    for weights in (rng.lognormal(size=prompts), rng.integers(0, 3, prompts).astype(float), np.ones(prompts)):
        expected = darts_allocate(weights, total, 8, 16).tolist()
        assert allocate.greedy(weights, total, 8, 16).tolist() == expected


def test_allocation_is_measured_with_every_repetition_in_the_file(tmp_path, capsys):
    out = tmp_path / "new" / "a.json"
    arguments = ["--prompts", "3", "40", "--repetitions=4", f"--out={out}"]
    assert allocate.BENCH.main(arguments) == 0
    written = json.loads(out.read_text())
    assert written["settings"]["prompts"] == [3, 40]
    assert {"date", "commit", "cores", "processor", "python"} <= written["machine"].keys()
    assert len(written["records"]) == 2 * 4 * 4
    assert "| optimal_total | 40 |" in capsys.readouterr().out


def test_only_a_hundred_thousand_prompts_have_a_target():
    def records(prompts, seconds):
        rows = [{"prompts": prompts, "repetition": n, "arm": allocate.ALLOCATE, "seconds": seconds} for n in range(3)]
        return pd.DataFrame(rows)

    assert allocate.checks(records(4096, 9.0)) == []
    assert [check.passed for check in allocate.checks(records(100_000, 0.049))] == [True]
    assert [check.passed for check in allocate.checks(records(100_000, 0.051))] == [False]


# --- overhead --------------------------------------------------------------------------------------------------------


def test_the_synthetic_rollout_is_one_that_early_stop_could_leave():
    rng = np.random.default_rng(0)
    keys = [f"{n:016x}" for n in range(64)]
    darts = DartsConfig.from_block({"allocation": {"mean_candidates": overhead.MEAN}}, overhead.GROUP_SIZE)
    plan = overhead.planner_of(keys, rng).plan(keys, darts)
    pool = overhead.pool_of(plan, rng)
    assert plan.adaptive
    assert np.array_equal(np.bincount(pool.prompt), plan.budgets)
    assert len(pool) == 12 * 64
    assert 0.15 < pool.aborted.mean() < 0.25
    assert not (pool.kept & pool.aborted).any()
    for prompt in range(64):
        some = pool.prompt == prompt
        assert pool.kept[some].sum() == overhead.GROUP_SIZE
        if pool.aborted[some].any():
            assert set(pool.length[some & pool.aborted]) == {pool.length[some & ~pool.aborted].max()}


def test_overhead_at_scale_times_every_part(capsys):
    assert overhead.BENCH.main(["--prompts", "32", "--history=64", "--repetitions=1"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 32 |")]
    assert row.startswith("| 32 | 384 |")
    assert all(float(cell) > 0 for cell in row.split("|")[4:-1])


def write_trace(path, steps):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"version": 1, "step": step, "metrics": metrics}) for step, metrics in steps]
    path.write_text("".join(f"{line}\n" for line in lines))


def own(seconds, step=10.0):
    return {"darts/rollout/own_s": seconds, "timing_s/step": step}


def test_overhead_of_runs_is_the_share_of_each_step(tmp_path, capsys):
    for name, seconds in (("good", [0.05, 0.06, 0.4]), ("bad", [0.2, 0.2, 0.05])):
        write_trace(tmp_path / name / "darts.jsonl", enumerate(map(own, seconds), 1))
    assert overhead.BENCH.main(["--prompts", "--runs", str(tmp_path / "good")]) == 0
    assert f"| {tmp_path / 'good'} | 3 | 0.060 | 10.00 | 0.60% | 4.00% |" in capsys.readouterr().out
    assert overhead.BENCH.main(["--prompts", "--runs", str(tmp_path / "good"), str(tmp_path / "bad")]) == 1


def test_a_run_without_the_metric_is_named(tmp_path):
    write_trace(tmp_path / "darts.jsonl", [(1, {"timing_s/step": 3.0})])
    with pytest.raises(ConfigError, match="no step of the trace has both"):
        overhead.of_run(tmp_path)


def test_of_a_trace_what_a_resume_replaced_and_a_cut_line_do_not_count(tmp_path):
    path = tmp_path / "darts.jsonl"
    write_trace(path, [(1, own(0.1)), (2, own(0.2)), (3, own(0.3)), (2, own(0.4))])
    with path.open("a") as file:
        file.write('{"version": 1, "st')
    assert overhead.of_run(tmp_path)["own_s"] == [0.1, 0.4]


def test_a_run_without_a_trace_is_refused_in_one_line(tmp_path, capsys):
    assert overhead.BENCH.main(["--prompts", "--runs", str(tmp_path)]) == 1
    assert "must hold one darts.jsonl" in capsys.readouterr().err


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_the_arms_launch_equally_many_and_saturate_as_named():
    saturated = {}
    for arm in budgets.ALLOCATIONS:
        darts = budgets.settings(arm, 3, "deadline", 16)
        planner = RolloutPlanner(ema_weight=0.3, response_length=256)
        planner.steps = 1
        for key, longest in zip("abcd", (10, 20, 40, 400), strict=True):
            planner.history.update(key, [10.0, longest], [False, False])
        plan = planner.plan(list("abcd"), darts)
        assert plan.budgets.sum() == 42
        assert darts.seed == 3
        assert darts.selection.long_wait == "deadline"
        saturated[arm] = sum(darts.group_rules(budget).num_long == 0 for budget in plan.budgets.tolist())
    assert saturated == {budgets.UNIFORM: 0, budgets.HALF: 2, budgets.ADAPTIVE: 2}


def test_every_epoch_has_the_pool_once_in_another_order():
    questions = [f"q{n}" for n in range(100)]
    steps = list(budgets.batches(questions, pool=8, prompts=4, steps=5, seed=1))
    assert [epoch for epoch, _ in steps] == [0, 0, 1, 1, 2]
    first, second = steps[0][1] + steps[1][1], steps[2][1] + steps[3][1]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 8
    assert first != second
    assert set(steps[4][1]) <= set(first)
    assert steps == list(budgets.batches(questions, pool=8, prompts=4, steps=5, seed=1))
    other = [some for _, some in budgets.batches(questions, pool=8, prompts=4, steps=2, seed=2)]
    assert sorted(other[0] + other[1]) != sorted(first)


def rollout(arm, step, seconds, seed=0, **changes):
    record = {
        "arm": arm, "seed": seed, "step": step, "epoch": step // 2, "seconds": seconds, "tokens/generated": 100,
        "tokens/kept": 60, "candidates/aborted": 3, "candidates/launched": 20, "length/kept_mean": 7.5,
        "length/pool_mean": 9.0, "group/saturated_share": 0.5, "allocation/budget_min": 8.0,
        "allocation/budget_max": 12.0, "history/std_correlation": None if step < 2 else 0.25,
        "latency/predicted_s": seconds, "unrefined_s": seconds / 2,
    }  # fmt: skip
    return record | changes


def test_the_last_steps_seconds_are_those_of_the_same_arm_and_seed():
    records = [
        rollout("a", 0, 1.0), rollout("b", 0, 2.0), rollout("b", 1, 4.0), rollout("a", 1, 3.0),
        rollout("a", 0, 5.0, seed=1), rollout("a", 1, 6.0, seed=1),
    ]  # fmt: skip
    found = budgets.with_last(pd.DataFrame(records))["last_s"]
    assert found.tolist() == pytest.approx([np.nan, np.nan, 2.0, 1.0, np.nan, 5.0], nan_ok=True)


def test_the_error_of_a_forecast_is_relative_and_leaves_out_what_was_not_forecast():
    forecasts = enumerate([None, 1.0, 2.2, 3.0])
    records = [rollout("a", step, 2.0) | {"latency/predicted_s": forecast} for step, forecast in forecasts]
    records = budgets.with_last(pd.DataFrame(records))
    assert budgets.errors(records)["latency/predicted_s"] == pytest.approx(0.5)
    assert np.isnan(budgets.errors(records[:1])["latency/predicted_s"])


def test_the_tables_are_of_known_prompts_and_pair_the_arms():
    records = [rollout(budgets.UNIFORM, step, 9.0 if step < 2 else 2.0) for step in range(4)]
    records += [rollout(budgets.ADAPTIVE, step, 1.0) | {"tokens/generated": 90} for step in range(4)]
    text = budgets.tables(pd.DataFrame(records))
    assert "| uniform | 4.0 | 1 | 200 | 1 | 120 | 7.5 | 9.0 | 6 of 40 | 50% | 8 to 12 | 0.25 |" in text
    assert "| adaptive | 2.0 | 0.50 [0.50, 0.50] | 180 | 0.90 [0.90, 0.90] |" in text
    assert "| uniform | 2 | 0.0% | 50.0% | 175.0% |" in text
    assert "| adaptive | 2 | 0.0% | 50.0% | 0.0% |" in text
    assert "| all | 4 |" in text
    with pytest.raises(ValueError, match="adaptive"):
        budgets.tables(pd.DataFrame(records[:-1]))
    assert "no prompt was known" in budgets.tables(pd.DataFrame(records[:2]))


def test_a_pool_that_does_not_divide_is_refused(capsys):
    assert budgets.BENCH.main(["--pool", "30"]) == 2
    assert "--pool=30: must be a multiple of --prompts 8" in capsys.readouterr().err
