"""What dies or raises in the middle of a rollout ends the run within a minute, with the cause."""

import sys
import time

import psutil
import pytest
from jobs import SUPPORT, Run, run_job

SETTINGS = ["--config-name", "quickstart", "trainer.val_before_train=false", "trainer.save_freq=-1"]


def check_end(run: Run, failed_at: float) -> None:
    """The run ended with an error, soon, after one step, and left nothing behind."""
    assert run.returncode not in (0, None, -9)
    assert run.ended - failed_at < 60
    steps = [metrics for metrics in run.metrics() if "timing_s/step" in metrics]
    assert len(steps) == 1, "nothing was trained on a shorter batch"


@pytest.mark.slow
def test_a_killed_engine_ends_the_run_within_a_minute(tmp_path):
    """The engine's process is killed with SIGKILL, as an out-of-memory killer does, in the second step."""
    command = [sys.executable, "-m", "recipe.darts.main_darts", *SETTINGS]
    run = run_job(command, tmp_path, limit=400, DARTS_TEST_KILL_AFTER="130")
    killed = [record for record in run.records() if "killed" in record]
    assert len(killed) == 1
    assert killed[0]["killed"], "an engine process was found and killed"
    check_end(run, killed[0]["time"])
    assert "CandidateError" in run.output
    assert "of prompt uid=" in run.output
    assert "EngineDeadError" in run.output


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("trouble", "cause"), [("raise", "MemoryError: scripted: out of memory"), ("die", "ActorDied")]
)
def test_a_rank_of_the_overlapped_actor_that_fails_ends_the_run_within_a_minute(tmp_path, trouble, cause):
    """The other rank waits for it in a collective."""
    command = [
        sys.executable, SUPPORT / "failing_actor.py", *SETTINGS, "darts.placement=disaggregated",
        "trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
    ]  # fmt: skip
    run = run_job(command, tmp_path, limit=400, DARTS_TEST_ACTOR_TROUBLE=trouble)
    (failed_at,) = [record["failed"] for record in run.records() if "failed" in record]
    check_end(run, failed_at)
    assert "the overlapped actor failed" in run.output
    assert cause in run.output
    ranks = [record["actor"] for record in run.records() if "actor" in record]
    assert len(ranks) == 2
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, ranks)):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.5)
