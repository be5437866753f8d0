"""The run of a bench: one trainer on one warm engine, in which the arms take turns. Needs verl and Ray.

    python -m darts.bench.trainer FOLDER

Contract. `FOLDER/plan.json` says what is run (`BenchPlan`); records go to `FOLDER/records.jsonl`, the arms' traces to
`FOLDER/traces/`.

1. A round is one step of every arm, in an order that is drawn. Before its step an arm gets its own actor, optimizer and
   schedule (`darts.bench.states`), planner, strategy and position in the data, and the servers get its weights; none of
   this is in the step's time.
2. All arms of a seed begin with the initial actor and see the same prompts in the same order, as far as their strategy
   goes. Seeds differ in the order of the prompts, and in what the engine draws.
3. Validation is verl's own, on all arms after the same steps; the initial actor is validated once a seed, for all.
4. At start every arm makes one step that counts nowhere: the first of a kind is slow.
5. A bench that was interrupted goes on after its last complete round; the engine is measured anew, once.
6. What an arm has of its own outside of `darts:` is in force in its turn alone: the servers' log-probs as the old ones
   (they are computed in all arms, if one has a use for them), and limits on length (`darts.bench.limits`).
"""

import sys
import time
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo.utils import create_rl_sampler

from darts.bench.arms import BenchArm
from darts.bench.plan import RECORDS, STATES, TRACES, BenchPlan
from darts.bench.records import Records, ValidationRecord, step_record
from darts.bench.states import ArmStates
from darts.config import DartsConfig
from darts.evidence.trace import Trace
from darts.strategy import BYPASS_MODE, LOG_PROBS, make_strategy
from darts.training.launch import DartsTaskRunner
from darts.training.trainer import RayDartsTrainer


class ArmsTrainer(RayDartsTrainer):
    """The trainer, whose loop goes over rounds of arms instead of batches."""

    def __init__(self, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        self._folder = Path(config.trainer.default_local_dir)
        self._plan = BenchPlan.load(self._folder)
        self._bypass = bool(OmegaConf.select(config, BYPASS_MODE))  # of all arms; a strategy may set it from now on
        super().__init__(config, *args, **kwargs)

    def _create_dataloader(self, *args: Any, **kwargs: Any) -> None:
        """Keeps upstream's loader; the batches are those of the arms' own ones."""
        super()._create_dataloader(*args, **kwargs)
        self._data = self.train_dataloader
        self.train_dataloader = list(self._plan.turns())

    @cached_property
    def _settings(self) -> dict[str, DartsConfig]:
        """The block `darts:` of each arm."""
        block, size = OmegaConf.to_container(self.config.darts), self.darts.group_size
        return {arm.name: arm.config(block, size) for arm in self._plan.arms}

    def init_workers(self) -> None:
        """Adds the arms' states to upstream's workers."""
        if any(arm_settings.bypass for arm_settings in self._settings.values()):
            OmegaConf.update(self.config, LOG_PROBS, True)  # the servers read it once, when they are made
        super().init_workers()
        self._states = ArmStates(self._folder / STATES, [arm.name for arm in self._plan.arms], self.actor_rollout_wg)
        self._records = Records(self._folder / RECORDS)
        self._records.keep(self._states.is_complete)
        self._initial: Any = None  # the planner's state with the engines' curve

    def _prepare_overlap(self) -> None:
        """One session with the actor for each mode that an arm has."""
        base = self.darts
        self._log_probs_of: dict[str, Any] = {"off": None}
        for name, settings in self._settings.items():
            mode = settings.overlap.mode
            if mode not in self._log_probs_of:
                self.darts = settings
                super()._prepare_overlap()
                self._log_probs_of[mode] = self._log_probs
                if self.darts.overlap.mode != mode:
                    raise RuntimeError(f"arm {name}: darts.overlap.mode={mode} is not possible on these ranks.")
        self.darts = base

    def fit_step(self, batch_dict: Any = None) -> None:
        """A round: `batch_dict` is the turn."""
        seed, step = batch_dict
        if not self._states.is_complete(seed, step):
            if self._initial is None:
                self._measure_once()
                self._initial = self.planner.state_dict()
                for bench_arm in self._plan.arms:
                    self._take_up(bench_arm, seed, 1, None)
                    self._trace = Trace(None)
                    super().fit_step(self._rounds.next())
            if step == 1:
                self._validate_initial(seed)
            arm_order = np.random.default_rng([seed, step]).permutation(len(self._plan.arms))
            for turn_place, arm_number in enumerate(arm_order):
                self._take_turn(self._plan.arms[arm_number], turn_place, seed, step)
            self._states.complete(seed, step)
        self.is_last_step = (seed, step) == self.train_dataloader[-1]

    def _measure_once(self) -> None:
        """The engines' cost model, if an arm needs one."""
        for arm_settings in self._settings.values():
            self.use_strategy(make_strategy(arm_settings, self.config.data.train_batch_size))
            self.darts = arm_settings
            if self.strategy.needs_cost_model:
                break
        self._set_cost_model()
        self._cost_model_is_set = True

    def _validate_initial(self, seed: int) -> None:
        if self._plan.validate_every == 0:
            return
        self.checkpoint_manager.sleep_replicas()
        self._states.load(self._plan.arms[0].name, seed, 1)
        self.checkpoint_manager.update_weights(0)
        initial_record = self._validated(self._plan.arms[0].name, seed, 0)
        for bench_arm in self._plan.arms:
            self._records.append(replace(initial_record, arm=bench_arm.name))

    def _take_turn(self, arm: BenchArm, place: int, seed: int, step: int) -> None:
        """One step of one arm."""
        started_at = time.monotonic()
        self.checkpoint_manager.sleep_replicas()  # verl updates the weights of sleeping engines
        arm_state = self._states.load(arm.name, seed, step)
        self._take_up(arm, seed, step, arm_state)
        self.checkpoint_manager.update_weights(step - 1)
        swap_s = time.monotonic() - started_at
        super().fit_step(self._rounds.next())
        rollout, step_metrics = self._rollout, self.metrics
        validation_records = [self._validated(arm.name, seed, step)] if self._plan.validates(step) else []
        started_at = time.monotonic()
        self.checkpoint_manager.sleep_replicas()  # as where verl saves: the actor needs the memory
        states = {"planner": self.planner, "strategy": self.strategy, "ledger": self.ledger}
        arm_state = {name: owner.state_dict() for name, owner in states.items()} | {"position": self._rounds.position}
        self._states.save(arm.name, seed, step, arm_state)
        swap_s += time.monotonic() - started_at
        facts = {"arm": arm.name, "seed": seed, "step": step, "place": place, "swap_s": swap_s}
        engines = {"num_engines": self.planner.num_engines, "max_running": self.planner.max_running}
        measured_step = step_record(step_metrics, rollout.pool, rollout.plan.launch_order, **engines, **facts)
        for bench_record in (measured_step, *validation_records):
            self._records.append(bench_record)

    def _take_up(self, bench_arm: BenchArm, seed: int, step: int, arm_state: Any) -> None:
        """From now on the trainer is this arm's, after its last step."""
        # 1. Its settings, in `darts:` and outside of it.
        self.darts = self._settings[bench_arm.name]
        self.use_log_probs(self._log_probs_of[self.darts.overlap.mode])
        self.use_strategy(make_strategy(self.darts, self.config.data.train_batch_size))
        bypass_mode = self._bypass or bench_arm.bypass or bool(self.strategy.settings.get(BYPASS_MODE))
        OmegaConf.update(self.config, BYPASS_MODE, bypass_mode)
        self._limits = bench_arm.limits
        self.async_rollout_manager.limit_responses(self._limits.max_tokens(self.config.data.max_response_length))
        # 2. What it has learnt, and what follows for its next round.
        self.planner.load_state_dict(deepcopy(self._initial if arm_state is None else arm_state["planner"]))
        has_cost_model = self.strategy.needs_cost_model or self.darts.latency.profile != "auto"
        self.planner.use_cost_model(self.planner.cost if has_cost_model else None)  # as where the arm runs alone
        if arm_state is not None:
            self.strategy.load_state_dict(arm_state["strategy"])
        self._choose()
        # 3. Its place in the data, and its books, which a loader begins.
        data_config = OmegaConf.merge(self.config.data, {"seed": seed})
        self._rounds = self.round_loader(self._data, create_rl_sampler(data_config, self._data.dataset))
        if arm_state is not None:
            self._rounds.go_to(arm_state["position"])
            self.ledger.load_state_dict(arm_state["ledger"])
        self._trace = Trace(str(self._folder / TRACES / f"seed{seed}" / f"{bench_arm.name}.jsonl"))
        self.global_steps, self.epoch = step, self._rounds.epoch

    def _fit_prepare_step(self) -> None:
        """Upstream's preparation; no step of an arm is the run's last, which would close the run."""
        super()._fit_prepare_step()
        self.is_last_step = False

    def _fit_compute_reward(self, batch: DataProto) -> DataProto:
        """Upstream's scores, with the arm's overlong penalty at the last token of each response."""
        batch = super()._fit_compute_reward(batch)
        if self._limits.buffer is not None:
            response_length = batch.batch["responses"].shape[-1]
            row_lengths = batch.batch["attention_mask"][:, -response_length:].sum(dim=-1)
            penalties = self._limits.penalties(row_lengths.numpy(), self.config.data.max_response_length)
            self.reward_tensor = self.reward_tensor.clone()  # the batch's column keeps the scores
            self.reward_tensor[torch.arange(len(row_lengths)), row_lengths - 1] += torch.from_numpy(penalties).float()
        return batch

    def _validated(self, arm_name: str, seed: int, step: int) -> ValidationRecord:
        """verl's validation, with the accuracy of each prompt."""
        self._lengths: list[int] = []
        generate_sequences = self.async_rollout_manager.generate_sequences

        def measured(prompts: DataProto) -> DataProto:
            output_batch = generate_sequences(prompts)
            self._lengths += output_batch.batch["response_mask"].sum(dim=-1).tolist()
            return output_batch

        self.async_rollout_manager.generate_sequences = measured
        try:
            self._validate()
        finally:
            del self.async_rollout_manager.generate_sequences
        return ValidationRecord(
            arm=arm_name,
            seed=seed,
            step=step,
            accuracy=float(np.mean(self._accuracies)) if self._accuracies else None,
            mean_length=float(np.mean(self._lengths)),
            prompt_accuracy=tuple(self._accuracies),
        )

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: list[str], reward_extra_infos_dict: dict[str, list], sample_turns: Any
    ) -> dict[str, Any]:
        """Upstream's metrics; keeps the mean of `acc`, or of the reward without it, for each prompt in its order."""
        scores = reward_extra_infos_dict.get("acc") or reward_extra_infos_dict["reward"]
        by_response = pd.Series(scores, index=sample_uids, dtype=float)
        self._accuracies = by_response.groupby(level=0, sort=False).mean().tolist()
        return super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, sample_turns)


class ArmsTaskRunner(DartsTaskRunner):
    """The task runner, with the plan's trainer."""

    def add_actor_rollout_worker(self, config: DictConfig) -> tuple[type, type]:
        """Upstream's worker; the actor can overlap if an arm wants it."""
        config = deepcopy(config)
        self._plan = BenchPlan.load(Path(config.trainer.default_local_dir))
        for bench_arm in self._plan.arms:
            if bench_arm.overlap not in (None, "off"):
                config.darts.overlap.mode = bench_arm.overlap
        return super().add_actor_rollout_worker(config)

    def trainer_class(self) -> type:
        """Upstream: `DartsTaskRunner.trainer_class`, which is called after the former."""
        return get_class(self._plan.trainer)


def train(bench_folder: Path) -> None:
    """Runs the bench of this folder; the steps are those of `recipe.darts.main_darts.main`."""
    from verl.trainer.main_ppo import run_ppo
    from verl.utils.device import auto_set_device

    import verl_patches.register
    from darts.checks.placement import choose_backend
    from darts.checks.run import check_run

    verl_patches.register.assert_active()
    config = BenchPlan.load(bench_folder).compose(bench_folder)
    auto_set_device(config)
    OmegaConf.resolve(config)
    choose_backend(config)
    check_run(config)
    run_ppo(config, task_runner_class=ray.remote(get_class("darts.bench.trainer.ArmsTaskRunner")))


if __name__ == "__main__":
    train(Path(sys.argv[1]).resolve())
