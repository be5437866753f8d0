"""The trainer's own lines, on verl's real methods with scripted parts: what is called, and in which order."""

import asyncio
import json
import logging
import warnings
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from pools import pool_of
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.skip import SkipManager
from verl.workers.rollout.replica import RolloutReplicaRegistry

import verl_patches.register
from darts.checks.model import model_id
from darts.config import ConfigError, DartsConfig
from darts.engines.measure import ProfileError
from darts.evidence.checkpoint import FILE_NAME, StateError
from darts.evidence.profile import LatencyProfile
from darts.evidence.trace import Trace
from darts.forecast import CostModel, MeasuredEngines
from darts.latency import LatencyCurve, StepTimes
from darts.planning import RolloutPlanner
from darts.rollout.manager import DartsAgentLoopManager
from darts.strategy import Bypass, Darts, Sorted
from darts.training import cost_model
from darts.training.trainer import RayDartsTrainer, short_to_long


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
    self._warned_of_saturation = self._warned_of_slowdown = False
    self._overridden = {}
    self.use_strategy(Darts(self.darts, 8))
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
    rollout = SimpleNamespace(metrics={"darts/candidates/kept": 64.0}, plan=SimpleNamespace(predicted_s=None))
    rounds, rollouts = [], [rollout, None]
    trainer.async_rollout_manager = SimpleNamespace(
        pop_rollout=lambda: rollouts.pop(0), begin_round=lambda rules, **how: rounds.append((rules, how["harvest"]))
    )
    assert trainer._fit_generate("batch") == "batch"
    assert trainer.metrics == {"darts/candidates/kept": 64.0}
    assert rounds == [(trainer.strategy.rules, None)]
    trainer._fit_generate("replayed")
    assert trainer._rollout is None


def test_what_a_strategy_sets_in_verls_configuration_is_put_back(trainer):
    trainer.config = OmegaConf.create(
        {
            "trainer": {"balance_batch": True},
            "actor_rollout_ref": {"actor": {"shuffle": True}},
            "algorithm": {"rollout_correction": {"bypass_mode": False}},
        }
    )
    before = OmegaConf.to_container(trainer.config)
    trainer.use_strategy(Sorted(trainer.darts, 8))
    switched = trainer.config.trainer.balance_batch, trainer.config.actor_rollout_ref.actor.shuffle
    assert switched == (False, False)
    trainer.use_strategy(Bypass(trainer.darts, 8))
    switched = trainer.config.trainer.balance_batch, trainer.config.actor_rollout_ref.actor.shuffle
    assert switched == (True, True)
    assert trainer.config.algorithm.rollout_correction.bypass_mode
    trainer.use_strategy(Darts(trainer.darts, 8))
    assert OmegaConf.to_container(trainer.config) == before


@pytest.mark.parametrize(("ranks", "minibatch"), [(1, 2), (2, 4), (4, 4)])
def test_from_short_to_long_each_mini_batch_over_the_ranks_is_longer_than_the_one_before(ranks, minibatch):
    lengths = np.random.default_rng(ranks).integers(1, 99, 16)
    rows = np.split(lengths[short_to_long(lengths, ranks)], ranks)  # as verl dispatches them
    own = minibatch // ranks
    batches = [np.concatenate([part[start : start + own] for part in rows]) for start in range(0, 16 // ranks, own)]
    assert sorted(np.concatenate(batches).tolist()) == sorted(lengths.tolist())
    assert all(before.max() <= after.min() for before, after in pairwise(batches))
    assert all((np.diff(part) >= 0).all() for part in rows)


def test_rollout_skip_follows_the_step(trainer, monkeypatch):
    monkeypatch.setattr(SkipManager, "step", -1)
    trainer.actor_rollout_wg = object()
    trainer.total_training_steps = 3
    trainer._cost_model_is_set = True
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


def test_the_manager_is_the_one_that_the_configuration_names():
    from darts.checks.run import MANAGER

    assert f"{DartsAgentLoopManager.__module__}.{DartsAgentLoopManager.__qualname__}" == MANAGER
    assert RayDartsTrainer.__mro__.index(SeparateRayPPOTrainer) == 1


# --- state and cost model --------------------------------------------------------------------------------------------


def learnt() -> RolloutPlanner:
    """A planner after one rollout."""
    planner = RolloutPlanner(ema_weight=0.3, response_length=100)
    darts = DartsConfig.from_block({}, 8)
    plan = planner.plan(["a", "b"], darts)
    planner.observe(plan, darts, pool_of([list(range(1, 13)), list(range(20, 32))]), 1.0, StepTimes())
    return planner


@pytest.fixture
def saving(trainer, monkeypatch, tmp_path):
    """The trainer with a planner that has learnt, and verl's saving and loading recorded."""
    trainer.config.trainer.update({"default_local_dir": str(tmp_path), "resume_mode": "auto"})
    trainer.async_rollout_manager = SimpleNamespace(planner=learnt())
    marks = []
    monkeypatch.setattr(
        RayPPOTrainer, "_save_checkpoint", lambda self: marks.append((tmp_path / "global_step_3" / FILE_NAME).exists())
    )
    monkeypatch.setattr(RayPPOTrainer, "_load_checkpoint", lambda self: marks.append("loaded"))
    del trainer._save_checkpoint
    trainer.marks = marks
    return trainer


def resume(trainer, step: int = 3) -> RolloutPlanner:
    trainer.async_rollout_manager = SimpleNamespace(planner=RolloutPlanner(ema_weight=0.3, response_length=100))
    trainer.global_steps = step
    trainer._load_checkpoint()
    return trainer.planner


def test_what_was_learnt_is_saved_before_verl_marks_the_step_and_loaded_with_it(saving, capsys):
    before = saving.planner.state_dict()
    saving._save_checkpoint()
    assert saving.marks == [True]
    assert resume(saving).state_dict() == before
    assert saving.marks == [True, "loaded"]
    assert "resumed with the length history of 2 prompts" in capsys.readouterr().out


def test_a_run_from_scratch_loads_nothing(saving):
    saving._save_checkpoint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(resume(saving, step=0).history) == 0


@pytest.mark.parametrize("content", [None, '{"format": "verl-darts", "ste', '{"format": "other"}', "of step 2"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_that_cannot_be_used_is_a_cold_start_or_an_error(saving, tmp_path, content, strict):
    file = tmp_path / "global_step_3" / FILE_NAME
    saving._save_checkpoint()
    if content is None:
        file.unlink()
    elif content == "of step 2":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 2}))
    else:
        file.write_text(content)
    saving.darts = DartsConfig.from_block({"state": {"strict": strict}}, 8)
    if strict:
        with pytest.raises(StateError, match=FILE_NAME):
            resume(saving)
    else:
        with pytest.warns(UserWarning, match=r"darts\.json.* DARTS starts without what it had learnt"):
            planner = resume(saving)
        assert (planner.steps, len(planner.history)) == (0, 0)


def test_a_state_with_impossible_values_is_named(saving, tmp_path):
    saving._save_checkpoint()
    file = tmp_path / "global_step_3" / FILE_NAME
    content = json.loads(file.read_text())
    content["state"]["steps"] = -1
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"the state of step 3 cannot be used: steps=-1"):
        assert resume(saving).steps == 0


def test_plain_verl_saves_and_loads_without_a_state(saving, tmp_path):
    saving.darts = DartsConfig.from_block({"enable": False}, 8)
    saving._save_checkpoint()
    saving._load_checkpoint()
    assert saving.marks == [False, "loaded"]


CURVE = LatencyCurve([1, 2, 4], [0.01, 0.011, 0.015])


def profile_of(model: str, **changes) -> LatencyProfile:
    fields = {
        "model": model, "model_id": model_id(model), "tensor_parallel": 1, "device": "a device", "versions": {},
        "date": "2026-01-01", "command": "", "engines": 1, "max_num_seqs": 64, "prompt_tokens": 8, "tokens": 16,
        "sampling": {}, "batch_sizes": [1, 2, 4], "seconds": list(CURVE.seconds),
    }  # fmt: skip
    return LatencyProfile(**(fields | changes))


@pytest.fixture
def profiling(trainer, tmp_path, monkeypatch):
    """The trainer at its first step, with a model's folder and servers whose measurement is scripted."""
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    rollout = {"tensor_model_parallel_size": 1, "data_parallel_size": 2, "max_num_seqs": 64}
    trainer.config.actor_rollout_ref = {"model": {"path": str(tmp_path)}, "rollout": rollout}
    trainer.config.trainer.default_local_dir = str(tmp_path / "out")
    trainer.async_rollout_manager = SimpleNamespace(planner=learnt())
    trainer.llm_server_manager = SimpleNamespace(server_handles=["a server"])
    trainer.measured = []

    async def profile_servers(servers, model, limit_s, seeded, say):
        trainer.measured.append((servers, limit_s, seeded))
        if trainer.measured_error:
            raise ProfileError(trainer.measured_error)
        return profile_of(model)

    trainer.measured_error = None

    async def engine_device(server):
        return "a device"

    trainer.kv_tokens = 10_000

    async def kv_capacity(server):
        return trainer.kv_tokens

    monkeypatch.setattr(cost_model, "profile_servers", profile_servers)
    monkeypatch.setattr(cost_model, "engine_device", engine_device)
    monkeypatch.setattr(cost_model, "kv_capacity", kv_capacity)

    def start(cost=None, **darts):
        trainer.darts = DartsConfig.from_block(darts, 8)
        trainer.use_strategy(Darts(trainer.darts, 8))
        trainer.planner.cost = cost
        trainer._set_cost_model()
        return trainer.planner.cost

    trainer.start = start
    trainer.engines = MeasuredEngines(
        model=model_id(str(tmp_path)),
        device="a device",
        tensor_parallel=1,
        engines=2,
        max_num_seqs=64,
        kv_tokens=10_000,
    )
    return trainer


def test_auto_measures_the_engines_and_keeps_the_profile(profiling, tmp_path):
    cost = profiling.start(latency={"profile_s": 7})
    assert (cost.curve, cost.engines) == (CURVE, profiling.engines)
    assert profiling.planner.kv_tokens == 10_000
    assert profiling.measured == [(["a server"], 7.0, False)]
    assert LatencyProfile.load(tmp_path / "out" / "latency.json").curve() == CURVE


def test_auto_measures_only_what_is_needed(profiling):
    refined = CostModel(LatencyCurve([1, 2], [1.0, 2.0]), "of the checkpoint", engines=profiling.engines)
    assert profiling.start(cost=refined) is refined
    assert profiling.start(allocation={"mode": "uniform"}) is None
    assert profiling.start(latency={"profile": "off"}, cost=refined) is None
    assert profiling.measured == []


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"}, {"device": "another"}, {"tensor_parallel": 4}, {"engines": 8}, {"max_num_seqs": 512},
        {"kv_tokens": 40_000}, {"kv_tokens": None},
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_engine_is_measured_again(profiling, capsys, change):
    other = CostModel(LatencyCurve([1, 2], [1.0, 2.0]), "saved", engines=replace(profiling.engines, **change))
    cost = profiling.start(cost=other)
    assert (cost.curve, cost.engines) == (CURVE, profiling.engines)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "latency model" in line]
    assert "the checkpoint's latency model is of another engine" in line
    assert f"instead of {next(iter(change.values()))}" in line


def test_a_cost_model_of_unknown_engines_is_measured_again(profiling):
    assert profiling.start(cost=CostModel(LatencyCurve([1, 2], [1.0, 2.0]), "saved")).curve == CURVE


def test_a_kv_cache_that_is_a_little_larger_than_the_checkpoints_is_the_same_and_counts(profiling):
    refined = CostModel(LatencyCurve([1, 2], [1.0, 2.0]), "saved", engines=profiling.engines)
    profiling.kv_tokens = 10_400
    assert profiling.start(cost=refined) is refined
    assert profiling.planner.kv_tokens == refined.engines.kv_tokens == 10_400


def test_a_server_that_does_not_answer_leaves_the_run_without_a_cost_model(profiling, monkeypatch):
    async def never(server):
        await asyncio.sleep(60)

    monkeypatch.setattr(cost_model, "kv_capacity", never)
    with pytest.warns(UserWarning, match=r"did not answer within 0.1 s.* the mean number of candidates is 10.4"):
        assert profiling.start(latency={"profile_s": 0.1}) is None


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(profiling, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="the latency profile cannot be kept"):
        assert profiling.start().curve == CURVE


def test_a_file_of_another_device_is_a_warning(profiling, tmp_path):
    path = str(tmp_path / "profile.json")
    profile_of(str(tmp_path), device="another device").save(path)
    with pytest.warns(UserWarning, match="another device"):
        assert profiling.start(latency={"profile": path}).curve == CURVE


def test_the_planner_knows_the_engines(trainer):
    trainer.config.actor_rollout_ref = {"rollout": {"data_parallel_size": 2}}
    trainer.llm_server_manager = SimpleNamespace(server_handles=["one", "two"])
    trainer.async_rollout_manager = SimpleNamespace(planner=learnt())
    trainer._prepare_planner()
    assert trainer.planner.num_engines == 4


def test_a_run_without_long_responses_and_with_slower_rollouts_is_told_once(trainer, monkeypatch):
    monkeypatch.setattr(SeparateRayPPOTrainer, "_fit_generate", lambda self, batch: batch)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("darts"), "warning", said.append)
    plan = SimpleNamespace(predicted_s=12.0, base_s=10.0, keys=["a"] * trainer.strategy.num_prompts)
    rollout = SimpleNamespace(metrics={"darts/group/saturated_share": 1.0}, plan=plan)
    trainer.async_rollout_manager = SimpleNamespace(pop_rollout=lambda: rollout, begin_round=lambda rules, **how: None)
    with pytest.warns(UserWarning, match=r"all prompts of step 3 have M_up candidates"):
        trainer._fit_generate("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer._fit_generate("batch")
    assert len(said) == 1
    assert "rollouts are expected to take 1.20 times as long as plain verl's (12 s)" in said[0]


def test_engines_that_cannot_be_measured_are_a_warning(profiling):
    profiling.measured_error = "1 of 6 batch sizes could be measured."
    with pytest.warns(UserWarning, match=r"1 of 6 .* the mean number of candidates is 10.4"):
        assert profiling.start() is None


def test_settings_that_leave_nothing_to_measure_are_a_warning(profiling, monkeypatch):
    async def too_short(*arguments, **options):
        raise ValueError("tokens=8: 80 tokens do not fit into max_model_len=70.")

    monkeypatch.setattr(cost_model, "profile_servers", too_short)
    with pytest.warns(UserWarning, match=r"do not fit .* the mean number of candidates is 10.4"):
        assert profiling.start() is None


def test_a_file_is_used_unless_the_state_has_its_refinement(profiling, tmp_path):
    path = str(tmp_path / "profile.json")
    profile_of(str(tmp_path)).save(path)
    cost = profiling.start(latency={"profile": path})
    assert cost.curve == CURVE
    refined = CostModel(LatencyCurve([1, 2], [1.0, 2.0]), cost.source, engines=cost.engines)
    assert profiling.start(latency={"profile": path}, cost=refined) is refined
    for other in (replace(refined, source="other"), replace(refined, engines=replace(cost.engines, engines=8))):
        assert profiling.start(latency={"profile": path}, cost=other).curve == CURVE
    assert profiling.measured == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "another"}, "measured for the model"),
        ({"tensor_parallel": 4}, "tensor"),
        ({"batch_sizes": [1], "seconds": [0.1]}, "point"),
    ],
)
def test_a_file_of_another_engine_is_refused(profiling, tmp_path, changes, message):
    path = str(tmp_path / "profile.json")
    profile_of(str(tmp_path), **changes).save(path)
    with pytest.raises(ConfigError, match=message) as error:
        profiling.start(latency={"profile": path})
    assert str(error.value).startswith(f"darts.latency.profile='{path}'")


def test_a_step_ends_in_the_trace(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(SeparateRayPPOTrainer, "_fit_postprocess_step", lambda self: None)
    trainer.total_training_steps, trainer._rollout = 10, None
    trainer._trace = Trace(str(tmp_path / "darts.jsonl"))
    trainer.metrics = {"timing_s/step": np.float64(2.0)}
    trainer._fit_postprocess_step()
    line = json.loads((tmp_path / "darts.jsonl").read_text())
    assert (line["step"], line["metrics"]) == (3, {"timing_s/step": 2.0})
