"""`darts.enable=false` is plain verl: the same responses, metrics and weights as `RayPPOTrainer` itself.

Sampling is reproducible per row by an agent loop that all runs use. The engine runs one sequence at a time, so that no
sum in it depends on what else happens to run.
"""

import re
import sys

import pytest
import torch
from jobs import run_job
from safetensors.torch import load_file

from darts import CONFIG_DIR
from darts.testbed import assets_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]  # three runs in one fixture

STEPS = 2
TESTBED = assets_dir("overthink")
SHARED = [
    "actor_rollout_ref.rollout.agent.default_agent_loop=seeded",
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "actor_rollout_ref.rollout.enable_prefix_caching=false",
    "actor_rollout_ref.rollout.n=4",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    # Enough for float32 to show it.
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "data.shuffle=false",
    f"trainer.total_training_steps={STEPS}",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    f"data.train_files={TESTBED}/train.parquet",
    f"data.val_files={TESTBED}/val.parquet",
    f"actor_rollout_ref.model.path={TESTBED}/model",
]
# Seconds, and what is computed from them.
TIMED = re.compile(r"timing|perf/|throughput|mfu|agent_loop/|_per_s|/seconds")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Plain verl, DARTS off, and DARTS on without redundancy."""
    folder = tmp_path_factory.mktemp("off")
    loops = folder / "loops.yaml"
    loops.write_text("- name: seeded\n  _target_: seeded.SeededAgentLoop\n")
    plain = ["-m", "verl.trainer.main_ppo", "--config-dir", str(CONFIG_DIR), "--config-name", "quickstart"]
    darts = ["-m", "recipe.darts.main_darts", "--config-name", "quickstart"]
    commands = {
        "plain": [*plain, "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"],
        "off": [*darts, "darts.enable=false"],
        "on, M of M": [*darts, "darts.allocation.mode=off", "darts.allocation.mean_candidates=null", "darts.seed=null"],
    }
    runs = {}
    for name, command in commands.items():
        out = folder / re.sub(r"\W", "", name)
        runs[name] = run_job(
            [sys.executable, *command, *SHARED, f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
             f"trainer.default_local_dir={out}/checkpoints"],
            out,
        )  # fmt: skip
        assert runs[name].returncode == 0, f"{name}: {runs[name].output[-3000:]}"
    return runs


def test_the_plain_run_is_verls_own_trainer(runs):
    assert "TaskRunner hostname" in runs["plain"].output
    assert "[darts]" not in runs["plain"].output
    assert "DartsTaskRunner" not in runs["plain"].output
    assert "[darts] plugin active, darts.enable=false: plain verl" in runs["off"].output


def test_there_is_something_to_compare(runs):
    """Rewards differ within groups, and the weights moved by far more than rounding."""
    rows = [row for step in range(1, STEPS + 1) for row in runs["plain"].rows(step)]
    scores: dict[tuple[int, str], set[float]] = {}
    for row in rows:
        scores.setdefault((row["step"], row["input"]), set()).add(row["score"])
    assert any(len(values) > 1 for values in scores.values())
    before, after = (load_file(folder / "model.safetensors") for folder in (TESTBED / "model", model_of(runs["plain"])))
    assert max((before[name].float() - after[name].float()).abs().max() for name in before) > 1e-4


def model_of(run):
    return run.trained_model()


@pytest.mark.parametrize("name", ["off", "on, M of M"])
def test_same_responses(runs, name):
    for step in range(1, STEPS + 1):
        assert runs[name].rows(step) == runs["plain"].rows(step)
    requests = [(r["prompt"], r["seed"], r["tokens"]) for r in runs["plain"].records()]
    assert sorted(requests) == sorted((r["prompt"], r["seed"], r["tokens"]) for r in runs[name].records())


@pytest.mark.parametrize("name", ["off", "on, M of M"])
def test_same_metrics(runs, name):
    plain, other = runs["plain"].metrics(), runs[name].metrics()
    assert len(plain) == len(other) == STEPS
    for expected, found in zip(plain, other, strict=True):
        ours = {key for key in found if key.startswith("darts/")}
        assert bool(ours) == (name != "off")
        assert found.keys() - ours == expected.keys()
        for key, value in expected.items():
            if not TIMED.search(key):
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("name", ["off", "on, M of M"])
def test_same_updated_weights(runs, name):
    plain, other = (load_file(model_of(runs[run]) / "model.safetensors") for run in ("plain", name))
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=1e-7)
