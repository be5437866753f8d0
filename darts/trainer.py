"""verl's PPO trainer with DARTS: `RayDartsTrainer`.

Contract.
1. The trainer refuses to start if the plugin is not active or the rollout manager is not DARTS's.
2. With `darts.enable=false` it runs `RayPPOTrainer.init_workers` and `RayPPOTrainer.fit`: plain verl.
3. With DARTS on, a step is verl's own, by the `_fit_*` methods of `SeparateRayPPOTrainer` (one per phase). Workers and
   servers are those of `RayPPOTrainer.init_workers` (colocated). Where the two trainers of verl differ, the colocated
   order is restored: a checkpoint is saved while the engines sleep (and not during critic warm-up), engines are woken
   also during critic warm-up, the profiler's finish command runs after the last profiled step, and rollout dump and
   replay (`skip.rollout`) works; a replayed step has no `darts/*` metrics. Not restored: GDPO's per-component reward
   metrics, and that the dataset's `on_batch_end` is not called after the last step.
4. The manager decides, the trainer only reports: `darts/*` metrics are added to verl's.
"""

import math
from typing import Any

from omegaconf import DictConfig
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, compute_spec_decode_metrics
from verl.utils.debug import marked_timer
from verl.utils.skip import SkipManager

import verl_patches.register
from darts.checks import check_run
from darts.rollout import DartsAgentLoopManager


class RayDartsTrainer(SeparateRayPPOTrainer):
    """A `RayPPOTrainer` whose rollouts are shaped by DARTS. Arguments as `RayPPOTrainer`."""

    async_rollout_manager: DartsAgentLoopManager

    def __init__(self, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        verl_patches.register.assert_active()
        self.darts = check_run(config)
        super().__init__(config, *args, **kwargs)

    def init_workers(self) -> None:
        """Colocated workers and managers, exactly as `RayPPOTrainer` makes them, and servers that stream."""
        print("[darts] starting workers, engines and reward loop", flush=True)
        if self.darts.enable:
            from verl_patches import vllm_stream_server  # imports vLLM

            vllm_stream_server.register()
        RayPPOTrainer.init_workers(self)
        if self.darts.enable:
            if not isinstance(self.async_rollout_manager, DartsAgentLoopManager):
                raise RuntimeError(
                    f"the rollout manager is {type(self.async_rollout_manager).__name__}, not DartsAgentLoopManager: "
                    "DARTS would do nothing."
                )
            # SeparateRayPPOTrainer asks the rollout manager to start the servers' profilers: the server manager does.
            self.async_rollout_manager.start_profile = lambda global_step: self.llm_server_manager.start_profile()
        print(self.banner(), flush=True)

    def banner(self) -> str:
        """One line that says whether DARTS is on, and with which settings."""
        if not self.darts.enable:
            return "[darts] plugin active, darts.enable=false: plain verl"
        allocation, selection = self.darts.allocation, self.darts.selection
        mean = allocation.mean_candidates if allocation.mode == "uniform" else self.darts.group_size
        return (
            f"[darts] plugin active: M={self.darts.group_size} of {mean:g} candidates ({allocation.mode}, "
            f"{allocation.low} to {allocation.high}), selection {selection.mode}: K={self.darts.num_short} shortest "
            f"and L={selection.num_long} longest (wait: {selection.long_wait}), early stop {self.darts.early_stop}"
            f"{'' if self._some_shortest_only() else ' (no group is shortest-only: it never acts)'}"
        )

    def _some_shortest_only(self) -> bool:
        allocation = self.darts.allocation
        most = math.ceil(allocation.mean_candidates) if allocation.mode == "uniform" else self.darts.group_size
        return self.darts.num_long_for(most) == 0

    def fit(self) -> None:
        """Trains: plain verl's loop with `darts.enable=false`, else the loop of `SeparateRayPPOTrainer`."""
        if not self.darts.enable:
            return RayPPOTrainer.fit(self)
        if self._dump_executor._shutdown:
            self._init_dump_executor()
        SkipManager.init(self.config)
        try:
            super().fit()
        finally:
            self._shutdown_dump_executor()

    def _fit_prepare_step(self) -> None:
        SkipManager.set_step(self.global_steps)
        super()._fit_prepare_step()

    def _fit_generate(self, batch: DataProto = None) -> DataProto:
        batch = super()._fit_generate(batch)
        self.metrics.update(self.async_rollout_manager.pop_metrics())
        return batch

    def _fit_update_weights(self) -> None:
        """Saves while the engines sleep, then wakes them with the new weights; as in `RayPPOTrainer.fit`."""
        if self.config.trainer.critic_warmup <= self.global_steps:
            super()._fit_save_checkpoint()
            super()._fit_update_weights()
        else:
            with marked_timer("update_weights", self.timing_raw, color="red"):
                self.checkpoint_manager.update_weights(self.global_steps)

    def _fit_save_checkpoint(self) -> None:
        """Done in `_fit_update_weights`."""

    def _stop_profiling(self, do_profile: bool, run_command: bool = False) -> None:
        steps = self.config.global_profiler.steps
        last = bool(steps) and (self.global_steps == max(steps) or self.is_last_step)
        super()._stop_profiling(do_profile, run_command=run_command or last)

    def _fit_collect_metrics(self, batch: DataProto) -> None:
        super()._fit_collect_metrics(batch)
        columns = batch.non_tensor_batch
        self.metrics.update(
            compute_spec_decode_metrics(
                columns.get("spec_num_draft_tokens"),
                columns.get("spec_num_accepted_tokens"),
                columns.get("spec_num_verify_steps"),
            )
        )

    def _fit_postprocess_step(self) -> None:
        print(f"[darts] {progress_line(self.metrics, self.global_steps, self.total_training_steps)}", flush=True)
        super()._fit_postprocess_step()


def progress_line(metrics: dict[str, Any], step: int, total: int) -> str:
    """One readable line about a step; a figure that the step did not measure is left out."""
    figures = (
        ("timing_s/step", "{:.1f} s"),
        ("timing_s/gen", "rollout {:.1f} s"),
        ("darts/length/pool_mean", "mean length {:.0f}"),
        ("darts/length/kept_mean", "of the kept {:.0f}"),
        ("darts/length/pool_max", "longest {:.0f}"),
        ("darts/reward/pool_mean", "reward {:.2f}"),
        ("darts/reward/kept_mean", "of the kept {:.2f}"),
        ("darts/candidates/dropped", "dropped {:.0f}"),
        ("darts/candidates/aborted", "of them aborted {:.0f}"),
    )
    return f"step {step}/{total}: " + ", ".join(text.format(metrics[key]) for key, text in figures if key in metrics)
