"""Servers with GPUs of their own: the served weights are those of the last update, at every step.

Two trainers and one server, judged from the outside: checkpoints of every step, what the server saw, and what the
engine said of its own tokens. With one trainer, whose sums have the colocated run's order, everything equals that run.
"""

import re
import sys

import pytest
import torch
from jobs import run_job
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from darts.testbed import assets_dir

pytestmark = pytest.mark.slow  # tests/e2e/test_cut.py runs on two pools in the fast tiers

STEPS, PROMPTS, M = 3, 8, 8
COMMAND = [
    sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart",
    "trainer.val_before_train=false", "trainer.test_freq=-1",
    "darts.overlap.mode=off",
    # Enough for one update to show in probabilities.
    "actor_rollout_ref.actor.optim.lr=1e-3",
]  # fmt: skip
NOISE = 1e-4  # of a probability: two implementations of the same model in float32
MOVED = 0.02


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("disaggregated")
    command = [
        *COMMAND, "darts.placement=disaggregated", "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.rollout.n_gpus_per_node=1", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
        f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1", f"trainer.default_local_dir={out}/checkpoints",
    ]  # fmt: skip
    return run_job(command, out)


@pytest.fixture(scope="module")
def steps(run):
    return [metrics for metrics in run.metrics() if "timing_s/step" in metrics]


def folder_of(run, step):
    """The model after a step; 0: the one that the run started from."""
    if step == 0:
        return assets_dir("overthink") / "model"
    return run.out / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"


@torch.no_grad()
def probabilities(model, record):
    """Of each token of a recorded response."""
    tokens = torch.tensor([record["prompt"] + record["tokens"]])
    logits = model(input_ids=tokens).logits[0, len(record["prompt"]) - 1 : -1]
    return logits.softmax(-1).gather(1, tokens[0, len(record["prompt"]) :, None])[:, 0]


def test_the_run_succeeds_on_two_pools(run, steps):
    assert run.returncode == 0, run.output[-3000:]
    assert "disaggregated: 2 GPUs train, 1 serve" in run.output
    assert len(steps) == STEPS
    servers = re.search(r"LLMServerManager: \[(.*)\]", run.output).group(1).split(",")
    assert len(servers) == 1


def test_every_request_of_a_step_was_answered_with_the_weights_of_the_step_before(run):
    """By the version that the update told the server, request by request."""
    training = [record for record in run.records() if record.get("seed") is not None]
    versions = [record["weights"] for record in training]
    assert versions == sorted(versions)
    assert {version: versions.count(version) for version in versions} == dict.fromkeys(range(STEPS), 84)
    for step in range(1, STEPS + 1):
        decode = AutoTokenizer.from_pretrained(folder_of(run, 0)).decode
        of_step = [r for r in training if r["weights"] == step - 1]
        answers = {decode(record["tokens"], skip_special_tokens=True) for record in of_step}
        rows = run.rows(step)
        assert len(rows) == PROMPTS * M
        assert {row["output"] for row in rows} <= answers, "what is trained on is of this step"


def test_the_engine_gives_the_probabilities_of_those_weights_and_not_of_the_step_before(run, steps):
    """verl compares the engine's probabilities with the trainer's, which are of the weights before the step's update. A
    server that is one update behind would be off by what that update changes, which is measured here."""
    for step, metrics in enumerate(steps, 1):
        assert metrics["training/rollout_probs_diff_max"] < NOISE
        if step > 1:
            current, stale = (AutoModelForCausalLM.from_pretrained(folder_of(run, at)) for at in (step - 1, step - 2))
            records = [r for r in run.records() if r.get("seed") is not None and r["weights"] == step - 1][:16]
            changes = [(probabilities(current, r) - probabilities(stale, r)).abs().max() for r in records]
            assert max(changes) > MOVED > 100 * NOISE


SAME = [
    "actor_rollout_ref.rollout.agent.default_agent_loop=seeded",
    # The engine runs one sequence at a time, so that no sum in it depends on what else happens to run.
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "actor_rollout_ref.rollout.enable_prefix_caching=false",
    "actor_rollout_ref.rollout.n=4",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "data.shuffle=false",
    "trainer.total_training_steps=2",
    "darts.enable=false",
]


@pytest.mark.timeout(3600)
def test_one_trainer_and_one_server_give_what_the_colocated_run_gives(tmp_path):
    """With `darts.enable=false`: plain verl on two pools. Same responses, metrics and weights."""
    loops = tmp_path / "loops.yaml"
    loops.write_text("- name: seeded\n  _target_: seeded.SeededAgentLoop\n")
    runs = {}
    for where in ("colocated", "disaggregated"):
        out = tmp_path / where
        command = [
            *COMMAND, *SAME, f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
            f"darts.placement={where}", f"trainer.default_local_dir={out}/checkpoints",
        ]  # fmt: skip
        runs[where] = run_job(command, out)
        assert runs[where].returncode == 0, runs[where].output[-3000:]
    one, two = runs["colocated"], runs["disaggregated"]
    assert "plain verl; disaggregated: 1 GPUs train, 1 serve" in two.output
    for step in (1, 2):
        assert two.rows(step) == one.rows(step)
    timed = re.compile(r"timing|perf/|throughput|mfu|agent_loop/|_per_s|/seconds")
    for expected, found in zip(one.metrics(), two.metrics(), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if not timed.search(key):
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), key
    ours, theirs = (load_file(run.trained_model() / "model.safetensors") for run in (one, two))
    start = load_file(folder_of(one, 0) / "model.safetensors")
    assert max((start[name].float() - ours[name].float()).abs().max() for name in start) > 1e-4
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-7)
