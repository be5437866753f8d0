"""Log-probs computed while the responses grow train as those computed afterwards.

One run overlaps (servers apart, mode token, responses of 1,024 tokens in chunks of 64, with a reference) and dumps its
rollouts; another replays them without overlap, so that verl's own full forward computes everything. The optimizer is
SGD: its updates are as close as the gradients, where Adam would make a full step of a gradient of rounding errors.
"""

import sys

import pytest
from jobs import ROOT, run_job
from safetensors.torch import load_file

from darts.testbed import assets_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]  # the runs are fixtures

STEPS, PROMPTS, M, CANDIDATES, LENGTH, CHUNK = 3, 2, 4, 6, 1024, 64
RATE = 0.02
SAME = 1e-6
"""Largest difference of a weight after all steps; the updates themselves are over 100 times as large."""


def command(dump, **overrides):
    settings = {
        "data.max_response_length": LENGTH,
        "data.train_batch_size": PROMPTS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": M,
        # The second epoch's ratios are not 1: there the old log-probs decide what is clipped.
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.optim.optimizer": "SGD",
        "actor_rollout_ref.actor.optim.lr": RATE,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": M,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": M,
        "actor_rollout_ref.rollout.n": M,
        "actor_rollout_ref.rollout.ignore_eos": True,
        "actor_rollout_ref.rollout.max_model_len": 1088,
        "+actor_rollout_ref.model.override_config.max_position_embeddings": 1088,
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.max_position_embeddings": 1088,
        "darts.allocation.mode": "uniform",
        "darts.allocation.high": CANDIDATES,
        "darts.allocation.mean_candidates": CANDIDATES,
        "darts.selection.mode": "dual_end",
        "darts.latency.profile": "off",
        "darts.streaming.chunk_tokens": CHUNK,
        "darts.placement": "disaggregated",
        "reward.custom_reward_function.path": ROOT / "tests" / "support" / "varied_reward.py",
        "skip.rollout.enable": True,
        "skip.rollout.dump_dir": dump,
        "skip.rollout.steps": list(range(1, STEPS + 1)),
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.total_training_steps": STEPS,
        **overrides,
    }
    given = [f"{key}={value}".replace(", ", ",") for key, value in settings.items()]
    return [sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart", *given]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The overlapped run and its replay."""
    root = tmp_path_factory.mktemp("overlap")
    modes = {"overlapped": "token", "replayed": "off"}
    found = {}
    for name, mode in modes.items():
        out = root / name
        overrides = {"darts.overlap.mode": mode, "trainer.default_local_dir": out / "checkpoints"}
        found[name] = run_job(command(root / "dump", **overrides), out)
    return found


@pytest.fixture(scope="module")
def steps(runs):
    return {name: [m for m in run.metrics() if "timing_s/step" in m] for name, run in runs.items()}


def test_both_runs_succeed_on_the_same_rollouts(runs, steps):
    for run in runs.values():
        assert run.returncode == 0, run.output[-3000:]
    assert [len(found) for found in steps.values()] == [STEPS, STEPS]
    assert "Load generate result at step 3" in runs["replayed"].output
    assert not [r for r in runs["replayed"].records() if r.get("seed") is not None], "nothing was generated again"
    for step in range(1, STEPS + 1):
        ours, theirs = (runs[name].rows(step) for name in ("overlapped", "replayed"))
        assert len(ours) == PROMPTS * M
        assert ours == theirs


def test_at_least_half_of_the_kept_tokens_were_computed_before_their_response_ended(steps):
    for metrics in steps["overlapped"]:
        assert metrics["darts/length/kept_mean"] == LENGTH
        assert metrics["darts/overlap/before_end_share"] >= 0.5
        assert metrics["darts/overlap/in_rollout_share"] >= metrics["darts/overlap/before_end_share"]
        assert metrics["darts/overlap/late_rows"] == metrics["darts/overlap/tokens_twice"] == 0
        assert metrics["darts/overlap/cache_peak_gib"] > 0
    assert not [key for metrics in steps["replayed"] for key in metrics if key.startswith("darts/overlap")]


def test_log_probs_entropies_and_the_reference_are_those_of_a_full_forward(steps):
    """By verl's metrics; and by the engine, which generated the tokens."""
    equal = ("actor/entropy", "actor/kl_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_loss", "actor/grad_norm")
    for ours, theirs in zip(steps["overlapped"], steps["replayed"], strict=True):
        for key in equal:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
        assert ours["training/rollout_probs_diff_max"] < 1e-4
        assert ("perf/mfu/actor_infer" in ours) == ("perf/mfu/actor_infer" in theirs)


def test_the_same_recorded_rollouts_give_the_same_weights(runs):
    start = load_file(assets_dir("overthink") / "model" / "model.safetensors")
    ours, theirs = (load_file(runs[name].trained_model() / "model.safetensors") for name in ("overlapped", "replayed"))
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in start)
    moved = max((start[name].float() - theirs[name]).abs().max().item() for name in start)
    assert apart <= SAME
    assert moved > 100 * SAME
