"""The trace: one line per step with what became of every candidate; what cannot be written does not end a run."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from pools import pool_of

from darts.config import DartsConfig
from darts.evidence.trace import Trace, timeline_columns
from darts.latency import StepTimes
from darts.messages import ActorCall
from darts.planning import Rollout, RolloutPlanner


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


def test_a_timeline_has_the_running_candidates_and_the_calls(tmp_path):
    done = rollout()
    done = dataclasses.replace(done, began=100.0, ended=112.5)
    ended_at = np.array([101.0, 102, 103, 112.4, 101.5, 101.6, 101.7, 104])
    done = dataclasses.replace(done, pool=dataclasses.replace(done.pool, ended_at=ended_at))
    calls = [ActorCall(100.5, 101.25, 40), ActorCall(111.0, 113.0, 7)]
    line = timeline_columns(done, calls)
    assert line["seconds"] == 12.5
    assert line["running"][:3] == [[0.0, 8], [1.0, 7], [1.5, 6]]
    assert line["running"][-1] == [12.4, 0]
    assert line["calls"] == [[0.5, 1.25, 40], [11.0, 13.0, 7]]
    Trace(str(tmp_path / "t.jsonl")).write(1, {}, done, calls)
    assert json.loads((tmp_path / "t.jsonl").read_text())["timeline"] == line
    assert timeline_columns(done, [])["calls"] == []


def test_a_long_timeline_is_thinned_out(tmp_path):
    done = rollout()
    many = [ActorCall(100 + n, 100.5 + n, 2) for n in range(1000)]
    calls = timeline_columns(done, many)["calls"]
    assert len(calls) <= 256
    assert sum(tokens for *_, tokens in calls) == 2000
    assert sum(end - begin for begin, end, _ in calls) == pytest.approx(500)
