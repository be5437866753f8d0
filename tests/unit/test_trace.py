"""The trace: one line per step with what became of every candidate; what cannot be written does not end a run."""

import json
import warnings

import numpy as np
import pytest
from pools import pool_of

from darts.config import DartsConfig
from darts.latency import StepTimes
from darts.planning import Rollout, RolloutPlanner
from darts.trace import Trace


def rollout(rewards=None) -> Rollout:
    darts = DartsConfig.from_block({"allocation": {"mode": "uniform", "mean_candidates": 4}}, 3)
    planner = RolloutPlanner(ema_weight=0.3, response_length=100)
    columns = {} if rewards is None else {"reward": np.array(rewards)}
    pool = pool_of([[10, 20, 30, 99], [5, 6, 7, 4]], ["kkkt", "fkax"], **columns)
    plan = planner.plan(["aa", "bb"], darts)
    observed, metrics = planner.observe(plan, darts, pool, 2.0, StepTimes())
    return Rollout(plan=planner.plan(["aa", "new"], darts), pool=pool, observed_std=observed, metrics=metrics)


def test_a_line_has_what_became_of_every_candidate(tmp_path):
    path = tmp_path / "folder" / "darts.jsonl"
    trace = Trace(str(path))
    nan = float("nan")
    done = rollout(rewards=[1.0, 0.5, 0.0, nan, 1.0, 0.25, nan, nan])
    trace.write(3, {"timing_s/step": np.float32(1.5), "bad": nan, "text": "x"}, done)
    trace.write(4, {}, None)
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["version"], first["step"], first["metrics"]) == (1, 3, {"timing_s/step": 1.5})
    columns = first["rollout"]
    assert columns["key"] == ["aa", "new"]
    assert columns["budget"] == [4, 4]
    assert columns["length"] == [[10, 20, 30, 99], [5, 6, 7, 4]]
    assert columns["fate"] == ["kkkt", "fkax"]
    assert columns["reward"] == [[1.0, 0.5, 0.0, None], [1.0, 0.25, None, None]]
    assert columns["observed_std"] == pytest.approx(done.observed_std, abs=1e-3)
    assert columns["std"] == [pytest.approx(done.plan.std[0], abs=1e-3), None], "the second prompt is new"
    assert (second["step"], "rollout" in second) == (4, False)
    assert second["at"] >= first["at"] > 1.7e9


def test_nothing_known_and_nothing_scored_is_said(tmp_path):
    path = tmp_path / "darts.jsonl"
    darts = DartsConfig.from_block({"allocation": {"mode": "uniform", "mean_candidates": 4}}, 3)
    done = rollout()
    plan = RolloutPlanner(ema_weight=0.3, response_length=100).plan(["aa", "bb"], darts)
    Trace(str(path)).write(1, {}, Rollout(plan=plan, pool=done.pool, observed_std=done.observed_std, metrics={}))
    columns = json.loads(path.read_text())["rollout"]
    assert columns["std"] == [None, None]
    assert "reward" not in columns


def test_a_resumed_run_appends(tmp_path):
    path = tmp_path / "darts.jsonl"
    for step in (1, 2, 2):
        Trace(str(path)).write(step, {}, None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]


def test_a_line_that_a_killed_run_left_half_written_is_removed(tmp_path):
    path = tmp_path / "darts.jsonl"
    for content, kept in (('{"step":1}\n{"step":2,"metr', [1]), ('{"st', []), ("", []), ('{"step":1}\n', [1])):
        path.write_text(content)
        trace = Trace(str(path))
        trace.write(7, {}, None)
        trace.write(8, {}, None)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 7, 8]


def test_one_warning_and_no_more_lines_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    trace = Trace(str(tmp_path / "file" / "darts.jsonl"))
    with pytest.warns(UserWarning, match=r"darts\.trace=.*cannot be written"):
        trace.write(1, {}, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.write(2, {}, None)


def test_no_path_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trace(None).write(1, {}, rollout())
    assert list(tmp_path.iterdir()) == []
