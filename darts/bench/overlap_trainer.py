"""The trainer of `darts.bench.overlap`: that of the arms, with scripted lengths, and figures of the overlap.

Contract. The folder is one that `darts.bench.overlap` has filled. What is not named here is as in
`darts.bench.trainer`; besides its records, `figures.jsonl` gets a line for each step of an arm.

1. The length of a response is scripted, by prompt and candidate: until then the end token is masked, then it is
   certain. So the arms have equal lengths whatever last bits do to tokens, and no response counts as truncated. Where
   two arms have the same tokens their old log-probs are compared.
2. On a CPU the actor's processes run on one core and the server's on another, with all their threads. Trainer,
   agent-loop worker and the rest run where the system puts them.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import ray
from verl.protocol import DataProto

from darts.bench.arms import BenchArm
from darts.bench.overlap import FIGURES
from darts.bench.trainer import ArmsTrainer
from darts.engines.start import engine_processes, process_of
from darts.messages import CANDIDATE
from darts.rollout.manager import DartsAgentLoopManager
from darts.rollout.worker import DartsAgentLoopWorker

CERTAIN = 100.0
"""Added to a logit."""
OVERLAP = "darts/overlap/"
LogProbs = dict[tuple[int, int], tuple[bytes, np.ndarray]]
"""Tokens of a response and their old log-probs, by the prompt's index and the candidate."""


class ScriptedWorker(DartsAgentLoopWorker):
    """The agent-loop worker, with responses as long as the prompt's row says."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        response_length = int(kwargs["extra_info"]["lengths"][int(kwargs[CANDIDATE])])
        sampling_params |= {"min_tokens": response_length - 1, "logit_bias": {self.tokenizer.eos_token_id: CERTAIN}}
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)


class ScriptedManager(DartsAgentLoopManager):
    """The manager, with these workers."""

    agent_loop_workers_class = ray.remote(ScriptedWorker)


class OverlapTrainer(ArmsTrainer):
    """The bench's trainer, which also measures what overlaps."""

    _first: LogProbs | None = None  # of the first arm of a round that computed some
    _compared: Mapping[str, float] = MappingProxyType({})

    def init_workers(self) -> None:
        """Upstream's workers; then actor and server get cores of their own."""
        super().init_workers()
        if self.config.trainer.device == "cpu":
            actors, servers = self.actor_rollout_wg.workers, self.llm_server_manager.server_handles
            first, second = sorted(os.sched_getaffinity(0))[:2]
            pin([process_of(actor) for actor in actors], first)
            pin([p for server in servers for p in (process_of(server), *engine_processes(server))], second)

    def _take_turn(self, arm: BenchArm, place: int, seed: int, step: int) -> None:
        self._first, self._compared = None if place == 0 else self._first, {}
        super()._take_turn(arm, place, seed, step)
        pool = self._rollout.pool
        step_figures = {
            "arm": arm.name,
            "step": step,
            "ref_s": float(self.timing_raw.get("ref", 0.0)),
            "kept_lengths": np.stack([pool.prompt, pool.candidate, pool.length], axis=1)[pool.kept].tolist(),
            **{key.removeprefix(OVERLAP): float(value) for key, value in self.metrics.items() if OVERLAP in key},
            **self._compared,
        }
        with (self._folder / FIGURES).open("a") as figures_file:
            figures_file.write(json.dumps(step_figures) + "\n")

    def _fit_compute_log_prob(self, batch: DataProto) -> DataProto:
        """Upstream's phase; what was computed is compared with what the round's first arm to do so computed."""
        batch = super()._fit_compute_log_prob(batch)
        if not self.config.algorithm.rollout_correction.bypass_mode:
            found = old_log_probs(batch)
            if self._first:
                same = [key for key, (tokens, _) in found.items() if tokens == self._first[key][0]]
                worst = max((float(np.abs(found[key][1] - self._first[key][1]).max()) for key in same), default=0.0)
                self._compared = {"same_rows": len(same), "rows": len(found), "log_prob_diff_max": worst}
            self._first = self._first or found
        return batch


def old_log_probs(batch: DataProto) -> LogProbs:
    """Those of the batch's responses."""
    found = {}
    columns, mask = batch.non_tensor_batch, batch.batch["response_mask"].bool()
    for row, (info, candidate) in enumerate(zip(columns["extra_info"], columns[CANDIDATE], strict=True)):
        tokens, values = (batch.batch[name][row][mask[row]].numpy() for name in ("responses", "old_log_probs"))
        found[info["index"], int(candidate)] = tokens.tobytes(), values.copy()
    return found


def pin(pinned_processes: Iterable[psutil.Process], core_number: int) -> None:
    """Keeps processes, with the threads that they have and will have, on one core."""
    for pinned_process in pinned_processes:
        for process_thread in pinned_process.threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(process_thread.id, {core_number})
