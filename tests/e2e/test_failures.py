"""An engine that dies in the middle of a rollout ends the run within a minute, with the prompt's uid and the cause."""

import sys

from jobs import run_job


def test_a_killed_engine_ends_the_run_within_a_minute(tmp_path):
    """The engine's process is killed with SIGKILL, as an out-of-memory killer does, in the second step."""
    command = [
        sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart",
        "trainer.val_before_train=false", "trainer.save_freq=-1",
    ]  # fmt: skip
    run = run_job(command, tmp_path, limit=400, DARTS_TEST_KILL_AFTER="130")
    killed = [record for record in run.records() if "killed" in record]
    assert len(killed) == 1
    assert killed[0]["killed"], "an engine process was found and killed"
    assert run.returncode not in (0, None, -9)
    assert run.ended - killed[0]["time"] < 60
    assert "CandidateError" in run.output
    assert "of prompt uid=" in run.output
    assert "EngineDeadError" in run.output
    steps = [metrics for metrics in run.metrics() if "timing_s/step" in metrics]
    assert len(steps) == 1, "nothing was trained on a shorter batch"
