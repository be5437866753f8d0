"""The trainer's own lines, on verl's real methods with scripted parts: what is called, and in which order."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.skip import SkipManager
from verl.workers.rollout.replica import RolloutReplicaRegistry

import verl_patches.register
from darts import trainer as trainer_module
from darts.config import DartsConfig
from darts.rollout import DartsAgentLoopManager
from darts.trainer import RayDartsTrainer, progress_line


@pytest.fixture
def trainer():
    """A trainer without its constructor: only what the steps under test touch."""
    self = RayDartsTrainer.__new__(RayDartsTrainer)
    self.calls = []
    self.config = OmegaConf.create(
        {
            "trainer": {"critic_warmup": 0, "save_freq": 1, "esi_redundant_time": 0},
            "global_profiler": {"steps": None},
        }
    )
    self.darts = DartsConfig.from_block({}, 8)
    self.global_steps, self.is_last_step, self.max_steps_duration = 3, False, 0.0
    self.metrics, self.timing_raw = {}, {}
    self.checkpoint_manager = SimpleNamespace(
        update_weights=lambda step: self.calls.append(("update_weights", step)) or {"sync": 1}
    )
    self._save_checkpoint = lambda: self.calls.append(("save", self.global_steps))
    return self


def test_a_checkpoint_is_saved_while_the_engines_sleep_and_once(trainer):
    trainer._fit_update_weights()
    trainer._fit_save_checkpoint()
    assert trainer.calls == [("save", 3), ("update_weights", 3)]
    assert trainer.metrics == {"sync": 1}
    assert {"save_checkpoint", "update_weights"} <= set(trainer.timing_raw)


def test_during_critic_warm_up_engines_are_woken_and_nothing_is_saved(trainer):
    trainer.config.trainer.critic_warmup = 5
    trainer._fit_update_weights()
    assert trainer.calls == [("update_weights", 3)]


def test_the_rollouts_metrics_join_the_steps(trainer, monkeypatch):
    monkeypatch.setattr(SeparateRayPPOTrainer, "_fit_generate", lambda self, batch: batch)
    trainer.async_rollout_manager = SimpleNamespace(pop_metrics=lambda: {"darts/candidates/kept": 64.0})
    assert trainer._fit_generate("batch") == "batch"
    assert trainer.metrics == {"darts/candidates/kept": 64.0}


def test_rollout_skip_follows_the_step(trainer, monkeypatch):
    monkeypatch.setattr(SkipManager, "step", -1)
    trainer.actor_rollout_wg = object()
    trainer.total_training_steps = 3
    trainer._fit_prepare_step()
    assert SkipManager.step == 3
    assert trainer.is_last_step


@pytest.mark.parametrize(
    ("steps", "step", "last", "runs"),
    [([1, 3], 3, False, True), ([1, 5], 3, False, False), ([1, 5], 3, True, True), (None, 3, True, False)],
)
def test_the_profilers_finish_command_runs_after_the_last_profiled_step(trainer, monkeypatch, steps, step, last, runs):
    seen = []
    monkeypatch.setattr(RayPPOTrainer, "_stop_profiling", lambda self, do, run_command: seen.append((do, run_command)))
    trainer.config.global_profiler.steps, trainer.global_steps, trainer.is_last_step = steps, step, last
    trainer._stop_profiling(True)
    assert seen == [(True, runs)]


@pytest.mark.parametrize("enable", [True, False])
def test_off_is_verls_own_loop(trainer, monkeypatch, enable):
    monkeypatch.setattr(RayPPOTrainer, "fit", lambda self: self.calls.append("RayPPOTrainer"))
    monkeypatch.setattr(SeparateRayPPOTrainer, "fit", lambda self: self.calls.append("SeparateRayPPOTrainer"))
    monkeypatch.setattr(SkipManager, "init", lambda config: trainer.calls.append("skip"))
    trainer._dump_executor = SimpleNamespace(_shutdown=False)
    trainer._shutdown_dump_executor = lambda: trainer.calls.append("dumps written")
    trainer.darts = DartsConfig.from_block({"enable": enable}, 8)
    trainer.fit()
    assert trainer.calls == (["skip", "SeparateRayPPOTrainer", "dumps written"] if enable else ["RayPPOTrainer"])


def test_it_refuses_a_manager_that_is_not_darts(trainer, monkeypatch, capsys):
    monkeypatch.setattr(RayPPOTrainer, "init_workers", lambda self: setattr(self, "async_rollout_manager", object()))
    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", dict(RolloutReplicaRegistry._registry))
    with pytest.raises(RuntimeError, match="the rollout manager is object, not DartsAgentLoopManager"):
        trainer.init_workers()
    assert RolloutReplicaRegistry.get("vllm").__name__ == "StreamingReplica"
    trainer.darts = DartsConfig.from_block({"enable": False}, 8)
    trainer.init_workers()
    assert "darts.enable=false: plain verl" in capsys.readouterr().out


def test_it_refuses_to_start_if_the_plugin_is_not_active(monkeypatch):
    def not_active():
        raise verl_patches.register.PluginNotActive("no entry point")

    monkeypatch.setattr(verl_patches.register, "assert_active", not_active)
    with pytest.raises(verl_patches.register.PluginNotActive):
        RayDartsTrainer(OmegaConf.create({}))


def test_the_banner_says_what_is_on(trainer):
    trainer.darts = DartsConfig.from_block({"allocation": {"mean_candidates": 10.5, "high": 11}}, 8)
    assert "plugin active: M=8 of 10.5 candidates (uniform, 8 to 11)" in trainer.banner()
    assert "K=7 shortest and L=1 longest" in trainer.banner()
    trainer.darts = DartsConfig.from_block({"enable": False}, 8)
    assert trainer.banner() == "[darts] plugin active, darts.enable=false: plain verl"


def test_a_progress_line_leaves_out_what_was_not_measured():
    assert progress_line({"timing_s/step": 3.21}, 2, 10) == "step 2/10: 3.2 s"


def test_the_manager_is_the_one_that_the_configuration_names():
    from darts.checks import MANAGER

    assert f"{DartsAgentLoopManager.__module__}.{DartsAgentLoopManager.__qualname__}" == MANAGER
    assert trainer_module.RayDartsTrainer.__mro__.index(SeparateRayPPOTrainer) == 1
