"""verl's PPO trainer with DARTS: `RayDartsTrainer`.

Contract.
1. The trainer refuses to start if the plugin is not active or the rollout manager is not DARTS's.
2. With `darts.enable=false` it runs `RayPPOTrainer.init_workers` and `RayPPOTrainer.fit`: plain verl.
3. With DARTS on, a step is verl's own, by the `_fit_*` methods of `SeparateRayPPOTrainer` (one per phase). Workers and
   servers are those of `RayPPOTrainer.init_workers`, colocated or (`darts.placement=disaggregated`) on GPUs of their
   own, with current weights at every step. Where the two trainers of verl differ, the colocated order is restored: a
   checkpoint is saved while the engines sleep (and not during critic warm-up), engines are woken also during critic
   warm-up, the profiler's finish command runs after the last profiled step, and rollout dump and
   replay (`skip.rollout`) works; a replayed step has no `darts/*` metrics. Not restored: GDPO's per-component reward
   metrics, and that the dataset's `on_batch_end` is not called after the last step.
4. The manager decides, the trainer only reports: `darts/*` metrics are added to verl's, and the trace gets every step.
5. What the planner has learnt is in verl's checkpoint of the same step (`darts.evidence.checkpoint`), written before
   verl marks it. A resumed run takes it from the step that it resumes from; without it, it starts cold or not at all
   (`darts.state.strict`).
6. A step's rollout is a round of the run's `darts.strategy`. Those that choose their prompts get them from a
   `RoundLoader`; its position and the strategy's queue are in the same state, without which no run resumes.
7. With `darts.latency.profile=auto` the running engines are measured before the first step, unless a state had a model
   of engines like these.
"""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, compute_spec_decode_metrics
from verl.utils.debug import marked_timer
from verl.utils.skip import SkipManager

import verl_patches.register
from darts.checks.run import check_memory, check_run
from darts.config import ConfigError
from darts.evidence.checkpoint import StateError, load_state, save_state, step_folder
from darts.evidence.log import logger
from darts.evidence.trace import Trace
from darts.overlap.join import OverlappedLogProbs, actor_limits
from darts.overlap.session import OverlapSession
from darts.planning import Plan, Rollout, RolloutPlanner
from darts.rollout.manager import DartsAgentLoopManager
from darts.strategy import PromptLedger, Strategy, make_strategy
from darts.training.cost_model import first_cost_model
from darts.training.lines import banner, progress_line
from darts.training.rounds import RoundLoader
from verl_patches.patches import patch_llm_server_manager


class RayDartsTrainer(SeparateRayPPOTrainer):
    """A `RayPPOTrainer` whose rollouts are shaped by DARTS. Arguments as `RayPPOTrainer`."""

    async_rollout_manager: DartsAgentLoopManager
    strategy: Strategy
    _rounds: RoundLoader | None = None  # where the strategy chooses its prompts
    ledger: PromptLedger  # of these rounds
    _log_probs: OverlappedLogProbs | None = None  # where they are computed during generation

    def __init__(self, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        verl_patches.register.assert_active()
        self.darts = check_run(config)
        self._overridden: dict[str, Any] = {}
        super().__init__(config, *args, **kwargs)

    @property
    def planner(self) -> RolloutPlanner:
        """What plans the rollouts and learns from them."""
        return self.async_rollout_manager.planner

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

    def fit_step(self, batch_dict: Any = None) -> None:
        """A step on a round of the strategy."""
        if self._rounds is not None:
            self.epoch = self._rounds.epoch
        super().fit_step(batch_dict)

    # --- a step, phase by phase ---------------------------------------------------------------------------------------

    def _fit_prepare_step(self) -> None:
        SkipManager.set_step(self.global_steps)
        super()._fit_prepare_step()
        if not self._cost_model_is_set:
            self._set_cost_model()
            self._cost_model_is_set = True

    def _fit_generate(self, batch: DataProto = None) -> DataProto:
        """A round of the strategy: its rollout, and what is learnt from it."""
        manager, round_ = self.async_rollout_manager, self.strategy.next_round()
        trained_positions = list(range(len(batch)))

        def keep(prompts: list[int]) -> None:
            # verl's method repeats and joins the batch once its rows are there.
            harvested = batch.select_idxs(np.array(prompts))
            batch.batch, batch.non_tensor_batch = harvested.batch, harvested.non_tensor_batch
            trained_positions[:] = prompts

        # 1. The manager runs the prompts' groups, and keeps M of each.
        manager.begin_round(round_.rules, harvest=round_.harvest, on_harvest=keep)
        output = super()._fit_generate(batch)
        # 2. The strategy queues what was launched and is not trained on.
        if self._rounds is not None:
            self.strategy.ended(self._rounds.launched, trained_positions)
        # 3. What the manager has learnt is reported.
        self._rollout = manager.pop_rollout()
        if self._rounds is not None:
            keys = self._rollout.plan.keys
            lengths = [self.planner.history.mean(key) for key in keys]
            self.metrics["darts/strategy/queue"] = len(self.strategy.queue)
            self.metrics |= self.ledger.enter(self._rounds.launched, round_.new, trained_positions, lengths)
        self._choose()
        if self._rollout is not None:
            self.metrics.update(self._rollout.metrics)
            self._warn_of_saturation()
            self._warn_of_slower_rollouts(self._rollout.plan)
        # 4. Rows go to the actor in the strategy's order; otherwise as verl balances them.
        if self.strategy.short_to_long:
            row_lengths = output.batch["response_mask"].sum(dim=-1)
            row_order = short_to_long(row_lengths.numpy(), self._get_dp_size(self.actor_rollout_wg, "actor"))
            output.reorder(torch.from_numpy(row_order))
            output.meta_info["global_token_num"] = [output.meta_info["global_token_num"][row] for row in row_order]
        return output

    def _compute_old_log_prob(self, batch: DataProto) -> tuple[DataProto, float]:
        compute = super()._compute_old_log_prob
        return compute(batch) if self._log_probs is None else self._log_probs.old(batch, compute)

    def _compute_ref_log_prob(self, batch: DataProto) -> DataProto:
        compute = super()._compute_ref_log_prob
        return compute(batch) if self._log_probs is None else self._log_probs.reference(batch, compute)

    def _fit_compute_ref_log_prob(self, batch: DataProto) -> DataProto:
        batch = super()._fit_compute_ref_log_prob(batch)
        if self._log_probs is not None and self._rollout is not None:
            self.metrics.update(self._log_probs.metrics(self._rollout))
        return batch

    def _fit_update_weights(self) -> None:
        """Saves while the engines sleep (or idle, on GPUs of their own), then gives them the new weights; as in
        `RayPPOTrainer.fit`."""
        if self.config.trainer.critic_warmup <= self.global_steps:
            super()._fit_save_checkpoint()
            super()._fit_update_weights()
        else:
            with marked_timer("update_weights", self.timing_raw, color="red"):
                self.checkpoint_manager.update_weights(self.global_steps)

    def _fit_save_checkpoint(self) -> None:
        """Done in `_fit_update_weights`."""

    def _stop_profiling(self, do_profile: bool, run_command: bool = False) -> None:
        profiled_steps = self.config.global_profiler.steps
        is_last = bool(profiled_steps) and (self.global_steps == max(profiled_steps) or self.is_last_step)
        super()._stop_profiling(do_profile, run_command=run_command or is_last)

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
        logger.info(progress_line(self.metrics, self.global_steps, self.total_training_steps))
        calls = [] if self._log_probs is None else self._log_probs.calls
        self._trace.write(self.global_steps, self.metrics, self._rollout, calls)
        super()._fit_postprocess_step()

    def _warn_of_saturation(self) -> None:
        all_saturated = self.metrics.get("darts/group/saturated_share") == 1
        if all_saturated and self.strategy.rules.selection.mode == "auto" and not self._warned_of_saturation:
            self._warned_of_saturation = True
            warnings.warn(
                f"all prompts of step {self.global_steps} have M_up candidates, so all groups are shortest-only and no "
                "long response is kept: raise darts.allocation.cost_weight, set darts.allocation.mean_candidates, or "
                "darts.selection.mode=dual_end, unless this is what you want.",
                stacklevel=2,
            )

    def _warn_of_slower_rollouts(self, plan: Plan) -> None:
        """Once: the plan expects that rollouts take longer than plain verl's."""
        slowdown = 1.0 if plan.predicted_s is None else plan.predicted_s / plan.base_s
        if slowdown > 1.01 and len(plan.keys) == self.strategy.num_prompts and not self._warned_of_slowdown:
            self._warned_of_slowdown = True
            logger.warning(
                f"plan: rollouts are expected to take {slowdown:.2f} times as long as plain verl's "
                f"({plan.predicted_s:.3g} s), until shaping has made responses shorter. darts.preset=fast waits for no "
                "long response."
            )

    # --- before the first step ----------------------------------------------------------------------------------------

    def _create_dataloader(self, *args: Any, **kwargs: Any) -> None:
        """Makes verl's loader; a strategy that chooses its prompts gets one of its own."""
        super()._create_dataloader(*args, **kwargs)
        if self.darts.enable:
            self.use_strategy(make_strategy(self.darts, self.config.data.train_batch_size))
            if self.strategy.chooses_prompts:
                self.train_dataloader = self._rounds = self.round_loader(self.train_dataloader)

    def round_loader(self, loader: Any, sampler: Any = None) -> RoundLoader:
        """Batches by the strategy's rounds, from the beginning.

        Args:
            loader: verl's train dataloader.
            sampler: of its rows; None: its own.

        Raises:
            ConfigError: a round takes more prompts than there are.
        """
        num_new = self.strategy.most_new
        if num_new > len(loader.dataset):
            raise ConfigError(
                "data.train_batch_size",
                self.strategy.num_prompts,
                f"a round of darts.strategy={self.darts.strategy} may launch {num_new} prompts; the data have "
                f"{len(loader.dataset)}.",
                f"lower data.train_batch_size, or {self.strategy.more_prompts}.",
            )
        self.ledger = PromptLedger()
        row_sources = loader.dataset, loader.sampler if sampler is None else sampler, loader.collate_fn
        return RoundLoader(*row_sources, lambda: self.strategy.next_round())

    def use_strategy(self, strategy: Strategy) -> None:
        """From now on rounds are this strategy's. What it sets in verl's configuration is set; what the one before had
        set is put back."""
        for key, value in self._overridden.items():
            OmegaConf.update(self.config, key, value)
        self._overridden = {key: OmegaConf.select(self.config, key) for key in strategy.settings}
        for key, value in strategy.settings.items():
            OmegaConf.update(self.config, key, value)
        self.strategy = strategy

    def init_workers(self) -> None:
        """Workers and managers exactly as `RayPPOTrainer` makes them, servers on GPUs of their own where disaggregated,
        and servers that stream."""
        if self.darts.placement == "disaggregated":
            patch_llm_server_manager()
        logger.info("starting workers, engines and reward loop")
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
            self._prepare_planner()
            self._prepare_overlap()
            # SeparateRayPPOTrainer asks the rollout manager to start the servers' profilers: the server manager does.
            self.async_rollout_manager.start_profile = lambda global_step: self.llm_server_manager.start_profile()
        cache_tokens = 0 if self._log_probs is None else self._log_probs.session.cache_tokens
        logger.info(banner(self.config, self.darts, cache_tokens))

    def _prepare_planner(self) -> None:
        rollout = self.config.actor_rollout_ref.rollout
        self.planner.num_engines = len(self.llm_server_manager.server_handles) * rollout.data_parallel_size
        self._rollout: Rollout | None = None
        self._trace = Trace(self.darts.trace)
        self._cost_model_is_set = False
        self._warned_of_saturation = self._warned_of_slowdown = False

    def _prepare_overlap(self) -> None:
        """Where log-probs are computed during generation: the session with the actor, its abilities and memory."""
        if self.darts.overlap.mode == "off":
            return
        num_ranks = self._get_dp_size(self.actor_rollout_wg, "actor")
        limits = actor_limits(self.config, self.darts, num_ranks, self.use_reference_policy)
        session = OverlapSession(self.actor_rollout_wg, self.darts.overlap, limits)
        abilities = session.prepare()
        # Workers tell of growing responses only if somebody computes them.
        self.darts = replace(self.darts, overlap=replace(self.darts.overlap, mode=session.mode))
        self.use_strategy(make_strategy(self.darts, self.config.data.train_batch_size))
        rollout = self.config.actor_rollout_ref.rollout
        engines_sleep = self.config.trainer.device != "cpu" and rollout.free_cache_engine
        check_memory(
            self.darts,
            abilities,
            logit_bytes=8 * limits.max_tokens * len(self.tokenizer),  # bfloat16, and what is made of it
            server_share=rollout.gpu_memory_utilization if engines_sleep else 0.0,
        )
        self.use_log_probs(OverlappedLogProbs(session, limits))

    def use_log_probs(self, log_probs: OverlappedLogProbs | None) -> None:
        """From now on log-probs are computed so; None: after generation, as verl does it."""
        self._log_probs = log_probs
        self.async_rollout_manager.overlap_with(None if log_probs is None else log_probs.session)

    def _choose(self) -> None:
        """Where the settings leave numbers to the plan: those of the next rounds, by what was learnt."""
        if not self.strategy.plans:
            return
        choice = self.planner.choose(self.strategy.num_prompts, self.strategy.rules)
        if choice is not None and choice.option != (self.strategy.choice and self.strategy.choice.option):
            logger.info(f"plan: {choice}")
        self.strategy.choice = choice or self.strategy.choice

    def _set_cost_model(self) -> None:
        """Before the first rollout: what the settings ask for, unless the state has a refinement of it."""
        adaptive = self.strategy.needs_cost_model
        servers = self.llm_server_manager.server_handles
        cost = first_cost_model(self.config, self.darts, servers, self.planner.cost, adaptive)
        self.planner.use_cost_model(cost)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        if self.darts.enable:
            folder = step_folder(self.config.trainer, self.global_steps)
            state = self.planner.state_dict()
            if self._rounds is not None:
                state["rounds"] = {
                    "strategy": self.darts.strategy,
                    "state": self.strategy.state_dict(),
                    "ledger": self.ledger.state_dict(),
                    "position": self._rounds.position,
                }
            save_state(folder, self.global_steps, state)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if not self.darts.enable or self.global_steps == 0:
            return
        try:
            folder = step_folder(self.config.trainer, self.global_steps)
            self._load_state(load_state(folder, self.global_steps))
        except StateError as error:
            if self.darts.state.strict or self._rounds is not None or error.loses_prompts:
                raise
            warnings.warn(f"{error} DARTS starts without what it had learnt.", stacklevel=2)

    def _load_state(self, state: Any) -> None:
        saved_rounds = state.pop("rounds", None) if isinstance(state, dict) else None
        try:
            if self._rounds is not None:
                self._load_rounds(saved_rounds)
            elif saved_rounds is not None:  # verl's own place in the data is not in that checkpoint
                saved_strategy = saved_rounds.get("strategy") if isinstance(saved_rounds, dict) else saved_rounds
                raise ValueError(f"it is of strategy={saved_strategy!s:.80}, which has prompts of its own.")
            self.planner.load_state_dict(state)
            self._choose()
        except ValueError as cause:
            message = f"the state of step {self.global_steps} cannot be used: {cause}"
            raise StateError(message, loses_prompts=saved_rounds is not None) from cause
        logger.info(f"resumed with the length history of {len(self.planner.history)} prompts")

    def _load_rounds(self, state: Any) -> None:
        if not isinstance(state, dict) or state.get("strategy") != self.darts.strategy:
            saved_name = state.get("strategy") if isinstance(state, dict) else "one without a queue"
            raise ValueError(f"darts.strategy={self.darts.strategy}, but the checkpoint's strategy is {saved_name}.")
        self.strategy.load_state_dict(state.get("state"))
        self.ledger.load_state_dict(state.get("ledger"))
        self._rounds.go_to(state.get("position"))


def short_to_long(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """The order of rows in which every rank's part, and so each mini-batch over the ranks, goes from short to long.

    Args:
        lengths: of the rows' responses, shape [num_rows].
        num_ranks: that get equal parts of consecutive rows; divides the number of rows.
    """
    return np.argsort(lengths, kind="stable").reshape(-1, num_ranks).T.ravel()
