"""Log-probs computed while generation runs, actor and server on the same device, parameters offloaded between phases.

The judge is the engine: verl compares its probabilities of the tokens with those that are trained on. Rows that the
overlap did not have would be computed by verl, and are counted.
"""

import sys

import pytest
from jobs import run_job

STEPS, PROMPTS, M = 3, 8, 8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_a_colocated_run_trains_on_the_overlapped_log_probs(tmp_path, mode):
    command = [
        sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart", f"darts.overlap.mode={mode}",
        "darts.overlap.kv_cache_gib=1", "actor_rollout_ref.actor.fsdp_config.param_offload=true",
        "actor_rollout_ref.actor.optim.lr=1e-3", "trainer.val_before_train=false", f"trainer.test_freq={STEPS}",
        f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1",
    ]  # fmt: skip
    run = run_job(command, tmp_path)
    assert run.returncode == 0, run.output[-3000:]
    said = f"log-probs during generation (overlap {mode}" + (", prefixes of up to" if mode == "token" else ")")
    assert said in run.output
    steps = [metrics for metrics in run.metrics() if "timing_s/step" in metrics]
    assert len(steps) == STEPS
    for metrics in steps:
        assert metrics["darts/overlap/late_rows"] == metrics["darts/overlap/tokens_twice"] == 0
        assert metrics["darts/overlap/tokens_forwarded"] > 0
        assert metrics["darts/overlap/in_rollout_share"] > 0
        assert (metrics["darts/overlap/before_end_share"] > 0) == (mode == "token")
        assert metrics["training/rollout_probs_diff_max"] < 1e-4
    assert len(run.rows(STEPS)) == PROMPTS * M
