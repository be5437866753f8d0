"""`benchmarks.step_record`: what a run writes down of its candidates, and when."""

import json
from types import SimpleNamespace

import numpy as np
from omegaconf import OmegaConf

from benchmarks.step_figure import RECORDS
from benchmarks.step_record import RecordingManager
from darts.actor_calls import SequenceKey
from darts.metrics import finished_pool
from darts.rollout import DartsAgentLoopManager


def test_a_step_is_written_when_its_log_probs_are_fetched(tmp_path, monkeypatch):
    pool = finished_pool(
        np.array([3, 9]), truncated=np.array([False, True]), reward=np.ones(2), group_size=2, ended_at=101.5
    )
    rollout = SimpleNamespace(pool=pool, uids=["a"], began=100.0, ended=102.0)
    outcome = SimpleNamespace(computed={SequenceKey("a", 0): [(101.0, 2), (101.6, 1)]})
    manager = RecordingManager.__new__(RecordingManager)
    manager.config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path / "run")}})
    manager.overlap = None  # as the manager's constructor has it
    assert manager.overlap is None
    session = SimpleNamespace(finish=lambda keys: outcome)
    manager.overlap = session
    assert manager.overlap is session
    monkeypatch.setattr(DartsAgentLoopManager, "pop_rollout", lambda self: rollout)

    assert session.finish([]) is outcome
    assert not (tmp_path / "run").exists(), "nothing was rolled out"
    manager._of_step = 7
    assert manager.pop_rollout() is rollout
    assert session.finish([]) is outcome

    (line,) = (tmp_path / "run" / RECORDS).read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["seconds"]) == (7, 2.0)
    assert record["fate"] == ["k", "f"]
    assert record["ended"] == [1.5, 1.5]
    assert record["stop"] == [None, None]
    assert record["computed"] == [[[1.0, 2], [1.6, 1]], []]
