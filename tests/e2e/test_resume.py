"""A run that is stopped and resumed continues at its step, with verl's own checkpoint."""

import sys

import pytest
from jobs import run_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_resumed_run_continues(tmp_path):
    command = [
        sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart",
        "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.resume_mode=auto", "trainer.save_freq=2",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]",
        f"trainer.default_local_dir={tmp_path}/checkpoints",
    ]  # fmt: skip
    first = run_job([*command, "trainer.total_training_steps=2"], tmp_path / "first", limit=400)
    assert first.returncode == 0, first.output[-3000:]
    second = run_job([*command, "trainer.total_training_steps=4"], tmp_path / "second", limit=400)
    assert second.returncode == 0, second.output[-3000:]
    steps = [metrics["training/global_step"] for metrics in second.metrics() if "timing_s/step" in metrics]
    assert steps == [3, 4]
    weights = {record["weights"] for record in second.records()}
    assert weights == {2, 3}, "the first resumed rollout ran on the weights of step 2"
    before = {row["input"] for step in (1, 2) for row in first.rows(step)}
    after = {row["input"] for step in (3, 4) for row in second.rows(step)}
    assert not before & after, "the data went on where it stopped"
