"""The run of `darts.bench.overlap`: one training run in which every batch is a step of each arm. Needs verl and Ray.

    python -m darts.bench.overlap_run FOLDER OVERRIDE...

Contract. The command trains in a folder that `darts.bench.overlap_inputs` has filled, with `ArmsTrainer`, and adds one
JSON record per step to its `records.jsonl`. What is not named here is as in `recipe.darts.main_darts`.

1. A batch is stepped once per arm, with the step number, the prompts, the planner's state, the candidates' seeds and
   the weights (learning rate 0) of the others; the order of the arms rotates.
2. The length of a response is scripted, by prompt and candidate: until then the end token is masked, then it is
   certain. So the arms have equal lengths whatever last bits do to tokens, and no response counts as truncated. Where
   two arms have the same tokens their old log-probs are compared.
3. On a CPU the actor's processes run on one core and the server's on another, with all their threads. Trainer,
   agent-loop worker and the rest run where the system puts them.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.protocol import DataProto

from darts import CONFIG_DIR
from darts.bench.harness import rotated
from darts.bench.overlap_inputs import RECORDS
from darts.bench.overlap_report import ARMS, BYPASS, OFF, OVERLAPPED
from darts.engines.start import engine_processes, process_of
from darts.messages import CANDIDATE
from darts.rollout.manager import DartsAgentLoopManager
from darts.rollout.worker import DartsAgentLoopWorker
from darts.strategy import make_strategy
from darts.training.launch import DartsTaskRunner
from darts.training.trainer import RayDartsTrainer

CERTAIN = 100.0
"""Added to a logit."""
TIMED = ("step", "gen", "old_log_prob", "ref", "update_actor", "update_weights")


class ScriptedWorker(DartsAgentLoopWorker):
    """The agent-loop worker, with responses as long as the prompt's row says."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        length = int(kwargs["extra_info"]["lengths"][int(kwargs[CANDIDATE])])
        sampling_params |= {"min_tokens": length - 1, "logit_bias": {self.tokenizer.eos_token_id: CERTAIN}}
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)


class ScriptedManager(DartsAgentLoopManager):
    """The manager, with these workers."""

    agent_loop_workers_class = ray.remote(ScriptedWorker)


class ArmsTrainer(RayDartsTrainer):
    """The trainer, with a step of each arm for each batch."""

    def init_workers(self) -> None:
        """As upstream; then actor and server get cores of their own."""
        super().init_workers()
        if self.config.trainer.device == "cpu":
            own, servers = self.actor_rollout_wg.workers, self.llm_server_manager.server_handles
            first, second = sorted(os.sched_getaffinity(0))[:2]
            pin([process_of(worker) for worker in own], first)
            pin([p for server in servers for p in (process_of(server), *engine_processes(server))], second)
            print(f"[bench] actor on core {first}, server on core {second}", flush=True)

    def _prepare_overlap(self) -> None:
        """One session with the actor for each mode."""
        self._arms: dict[str, tuple[Any, Any]] = dict.fromkeys(ARMS, (None, None))  # log-probs, session
        for arm in OVERLAPPED:
            self._choose(arm)
            super()._prepare_overlap()
            self._arms[arm] = self._log_probs, self.async_rollout_manager.overlap

    def _choose(self, arm: str) -> None:
        """From now on steps are of this arm."""
        mode = arm if arm in OVERLAPPED else OFF
        self.darts = dataclasses.replace(self.darts, overlap=dataclasses.replace(self.darts.overlap, mode=mode))
        self._log_probs, self.async_rollout_manager.overlap = self._arms[arm]
        self.use_strategy(make_strategy(self.darts, self.config.data.train_batch_size))
        self.config.algorithm.rollout_correction.bypass_mode = arm == BYPASS

    def fit_step(self, batch_dict: Any = None) -> None:
        """A step of each arm."""
        step, learnt = self.global_steps, deepcopy(self.planner.state_dict())
        loss = deepcopy(self.config.actor_rollout_ref.actor.policy_loss)
        workload = batch_dict["extra_info"][0]["workload"]
        self._first: dict[tuple[int, int], tuple[bytes, np.ndarray]] = {}
        for place, arm in enumerate(rotated(ARMS, step)):
            self._compared: dict[str, float] = {}
            self.global_steps = step
            self.planner.load_state_dict(deepcopy(learnt))
            self._choose(arm)
            super().fit_step(deepcopy(batch_dict))
            with open_dict(self.config):  # bypass_mode writes into it
                self.config.actor_rollout_ref.actor.policy_loss = deepcopy(loss)
            record = {"workload": workload, "batch": step, "arm": arm, "place": place, "at": time.time()}
            self._write(record | self._measured())

    def _fit_compute_log_prob(self, batch: DataProto) -> DataProto:
        """As upstream; then what was computed is compared with what the batch's first arm to do so computed."""
        batch = super()._fit_compute_log_prob(batch)
        if not self.config.algorithm.rollout_correction.bypass_mode:
            found = old_log_probs(batch)
            if self._first:
                same = [key for key, (tokens, _) in found.items() if tokens == self._first[key][0]]
                worst = max((float(np.abs(found[key][1] - self._first[key][1]).max()) for key in same), default=0.0)
                self._compared = {"same_rows": len(same), "rows": len(found), "log_prob_diff_max": worst}
            self._first = self._first or found
        return batch

    def _measured(self) -> dict[str, Any]:
        """The figures of the step that has ended."""
        pool = self._rollout.pool
        figures = {f"{name}_s": float(self.timing_raw.get(name, 0.0)) for name in TIMED}
        figures |= {
            key.removeprefix("darts/overlap/"): float(value)
            for key, value in self.metrics.items()
            if key.startswith("darts/overlap/")
        }
        return (
            figures
            | {
                "tokens": int(self.metrics["darts/tokens/generated"]),
                "kept_tokens": int(self.metrics["darts/tokens/kept"]),
                "kept_lengths": np.stack([pool.prompt, pool.candidate, pool.length], axis=1)[pool.kept].tolist(),
            }
            | self._compared
        )

    def _write(self, record: dict[str, Any]) -> None:
        with (Path(self.config.trainer.default_local_dir) / RECORDS).open("a") as file:
            file.write(json.dumps(record) + "\n")


class ArmsTaskRunner(DartsTaskRunner):
    """The task runner, with that trainer."""

    def trainer_class(self) -> type:
        """Upstream: `DartsTaskRunner.trainer_class`."""
        return ArmsTrainer


def old_log_probs(batch: DataProto) -> dict[tuple[int, int], tuple[bytes, np.ndarray]]:
    """By the prompt's index and the candidate: the response's tokens, and their old log-probs."""
    found = {}
    columns, mask = batch.non_tensor_batch, batch.batch["response_mask"].bool()
    for row, (info, candidate) in enumerate(zip(columns["extra_info"], columns[CANDIDATE], strict=True)):
        tokens, values = (batch.batch[name][row][mask[row]].numpy() for name in ("responses", "old_log_probs"))
        found[info["index"], int(candidate)] = tokens.tobytes(), values.copy()
    return found


def pin(processes: Iterable[psutil.Process], core: int) -> None:
    """Keeps processes, with the threads that they have and will have, on one core."""
    for process in processes:
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread.id, {core})


def train(folder: Path, overrides: list[str]) -> None:
    """Trains in this folder; as `recipe.darts.main_darts.main`, with `ArmsTaskRunner`."""
    from hydra import compose, initialize_config_dir
    from verl.trainer.main_ppo import run_ppo
    from verl.utils.device import auto_set_device

    import verl_patches.register
    from darts.checks.placement import choose_backend
    from darts.checks.run import check_run

    verl_patches.register.assert_active()
    paths = [
        f"actor_rollout_ref.model.path={folder}/model", f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet", f"trainer.default_local_dir={folder}",
        f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={__name__}.ScriptedManager",
        f"+ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH={Path(__file__).resolve().parents[1]}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config: DictConfig = compose("quickstart", overrides=[*paths, *overrides])
    auto_set_device(config)
    OmegaConf.resolve(config)
    choose_backend(config)
    check_run(config)
    run_ppo(config, task_runner_class=ray.remote(ArmsTaskRunner))


if __name__ == "__main__":
    # Ray's workers know the classes by this module's name, not by __main__.
    from darts.bench import overlap_run as overlap_bench

    overlap_bench.train(Path(sys.argv[1]).resolve(), sys.argv[2:])
