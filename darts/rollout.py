"""The rollout with redundant candidates: verl's agent-loop manager and worker, with one decision in between.

Contract. The manager gets verl's batch (every prompt `rollout.n` times, interleaved), gives each prompt a budget of
M'_i candidates, and hands whole prompts to the workers. A worker runs the candidates of its prompts through verl's own
agent loops, each as a request of its own, and owns the decision which M of a prompt are kept.

1. The result has exactly `rollout.n` rows per prompt, in the order of the batch, joined by `uid`; the rows of a prompt
   are ordered by candidate number.
2. All candidates of a prompt run in one worker. No RPC per candidate besides the request itself.
3. A dropped candidate is padded, scored and sent nowhere. With `darts.reward.pool` it is scored, and then dropped.
4. Validation, and everything with `darts.enable=false`, takes verl's own path untouched.
5. Nothing is lost silently: a candidate that fails ends the rollout with the uid, the candidate and the cause, and what
   still ran is cancelled; a rollout that outlasts `darts.timeout_s` fails with the uids that were not complete.
"""

import asyncio
import contextvars
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from verl.experimental.agent_loop.agent_loop import AgentLoopManager, AgentLoopOutput, AgentLoopWorker
from verl.protocol import DataProto
from verl.utils.ray_utils import auto_await
from verl.utils.skip import SkipManager
from verl.workers.rollout.utils import get_max_position_embeddings

from darts.allocation import contiguous_parts, uniform_budgets
from darts.checks import darts_config
from darts.config import DartsConfig
from darts.group import CandidateGroup
from darts.metrics import CandidatePool, rollout_metrics

# Columns of the batch between manager and worker. Agent loops never see them.
BUDGET, PROMPT, CANDIDATE = "darts_budget", "darts_prompt", "darts_candidate"


class CandidateError(RuntimeError):
    """A candidate could not be generated or scored. The message names uid, candidate and cause."""


class _Dropped:
    """Stands in for the output of a candidate that was not kept."""


DROPPED = _Dropped()


class _RunningGroup:
    """One prompt's group while its candidates run: the state machine, and the wait for its decision."""

    def __init__(self, uid: str, prompt: int, budget: int, darts: DartsConfig) -> None:
        self.uid = uid
        self.prompt = prompt
        self.saturated = budget >= darts.allocation.high
        self.state = CandidateGroup(budget, darts.group_size, darts.num_long_for(budget))
        self.rewards = np.full(budget, np.nan)
        self._decided = asyncio.Event()

    def finish(self, candidate: int, length: int, truncated: bool) -> None:
        """Records that a candidate ended; the last one decides."""
        self.state.finish(candidate, length, truncated)
        if self.state.complete:
            self._decided.set()

    async def keeps(self, candidate: int) -> bool:
        """Waits for the decision. Returns whether the candidate is kept."""
        await self._decided.wait()
        return self.state.keeps(candidate)

    def pool(self) -> CandidatePool:
        """The group's candidates, for metrics."""
        budget = len(self.state.lengths)
        arrival = np.empty(budget, dtype=np.int64)
        arrival[self.state.arrival] = np.arange(budget)
        kept = np.zeros(budget, dtype=bool)
        kept[self.state.kept] = True
        return CandidatePool(
            prompt=np.full(budget, self.prompt),
            candidate=np.arange(budget),
            length=np.array(self.state.lengths, dtype=np.int64),
            truncated=np.array(self.state.truncated, dtype=bool),
            kept=kept,
            arrival=arrival,
            num_long=np.full(budget, self.state.num_long),
            saturated=np.full(budget, self.saturated),
            reward=self.rewards,
        )


# Which candidate the current task runs. Each agent loop is a task of its own, so each has its own value.
_current: contextvars.ContextVar[tuple[_RunningGroup, int] | None] = contextvars.ContextVar("darts", default=None)


def candidate_seed(seed: int, step: int, prompt: int, candidate: int) -> int:
    """The sampling seed of one candidate: 32 bits, the same whatever the other prompts' budgets are (our choice).

    All turns of a multi-turn candidate have it.
    """
    return int(np.random.SeedSequence([seed, max(step, 0), prompt, candidate]).generate_state(1)[0])


class DartsAgentLoopWorker(AgentLoopWorker):
    """verl's agent-loop worker, which also runs groups of candidates and keeps M of each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.darts = darts_config(self.config)
        self._groups: dict[str, _RunningGroup] = {}
        self._tasks: set[asyncio.Task] = set()
        self._step = -1
        self._end_tokens = _end_tokens(self.model_config)
        # Without max_model_len the server takes the model's, in a copy of the configuration that only it sees.
        self._context = self.rollout_config.max_model_len or get_max_position_embeddings(self.model_config.hf_config)
        self._seed = self.darts.seed
        if self._seed is None and self.rollout_config.full_determinism:
            self._seed = self.rollout_config.seed  # verl's server gives every request of a replica the same seed

    async def generate_groups(self, prompts: DataProto) -> tuple[DataProto, CandidatePool]:
        """Runs `BUDGET` candidates of each prompt and keeps M.

        Args:
            prompts: one row per prompt, with `uid`, `priority` of its first candidate, `BUDGET` and `PROMPT` (position
                in the whole batch).

        Returns:
            The kept rows, as verl's `generate_sequences` gives them, with `uid` and `CANDIDATE`; and all candidates.

        Raises:
            CandidateError: a candidate failed.
            RuntimeError: another call has not ended.
        """
        if self._groups:
            raise RuntimeError(f"this worker still runs {len(self._groups)} prompts of another rollout.")
        budgets = prompts.non_tensor_batch[BUDGET].astype(np.int64)
        rows = prompts.select_idxs(np.repeat(np.arange(len(prompts)), budgets))
        candidates = np.concatenate([np.arange(budget) for budget in budgets])
        rows.non_tensor_batch[CANDIDATE] = candidates
        rows.non_tensor_batch["priority"] = rows.non_tensor_batch["priority"] + candidates
        self._step = prompts.meta_info.get("global_steps", -1)
        self._groups = {
            uid: _RunningGroup(uid, int(prompt), budget, self.darts)
            for uid, prompt, budget in zip(
                prompts.non_tensor_batch["uid"], prompts.non_tensor_batch[PROMPT], budgets.tolist(), strict=True
            )
        }
        try:
            output = await super().generate_sequences(rows)
            return output, CandidatePool.concat([group.pool() for group in self._groups.values()])
        finally:
            for task in self._tasks:
                task.cancel()
            self._tasks.clear()
            self._groups = {}

    async def progress(self) -> tuple[int, list[str]] | None:
        """Of the rollout that runs: finished candidates, and the uids of incomplete prompts; None if none runs."""
        if not self._groups:
            return None
        groups = self._groups.values()
        finished = sum(len(group.state.arrival) for group in groups)
        return finished, [group.uid for group in groups if not group.state.complete]

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        """verl's method, told which candidate this task runs; a failure gets its uid."""
        candidate = kwargs.pop(CANDIDATE, None)
        if candidate is None:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in (BUDGET, PROMPT)}
        group, candidate = self._groups[kwargs["uid"]], int(candidate)
        self._tasks.add(asyncio.current_task())
        _current.set((group, candidate))
        if self._seed is not None:
            sampling_params["seed"] = candidate_seed(self._seed, self._step, group.prompt, candidate)
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        except Exception as cause:
            raise CandidateError(
                f"candidate {candidate} of prompt uid={group.uid} (row {group.prompt} of the batch, step {self._step}) "
                f"failed: {_reason(cause)}"
            ) from cause
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _agent_loop_postprocess(self, output: AgentLoopOutput, validate: bool, **kwargs: Any) -> Any:
        """Between an agent loop and its padding and reward: wait for the group, go on only if kept."""
        current = _current.get()
        if current is None:
            return await super()._agent_loop_postprocess(output, validate, **kwargs)
        group, candidate = current
        length = int(sum(output.response_mask))
        if length == 0:
            raise RuntimeError("the server returned no token: the request was aborted or rejected.")
        group.finish(candidate, length, self._is_truncated(output))
        if self.darts.reward.pool:
            output.extra_fields["raw_prompt"] = kwargs["raw_prompt"]  # as verl does before it scores
            await self._compute_score([output], kwargs=kwargs)
            group.rewards[candidate] = output.reward_score
        kept = await group.keeps(candidate)
        if self.darts.selection.on_no_valid == "fail" and group.state.num_valid == 0:
            raise RuntimeError(
                f"none of the {len(group.state.lengths)} candidates ended within the response budget "
                f"({self.rollout_config.response_length} tokens). Raise data.max_response_length, drop the prompt, or "
                "set darts.selection.on_no_valid=fill to train on truncated ones."
            )
        if not kept:
            return DROPPED
        padded = await super()._agent_loop_postprocess(output, validate, **kwargs)
        if padded.reward_score is not None:
            group.rewards[candidate] = padded.reward_score
        return padded

    def _postprocess(
        self, inputs: list[Any], input_non_tensor_batch: dict | None = None, validate: bool = False
    ) -> DataProto:
        """Batches the kept alone, and adds the columns that rows are joined by."""
        columns = input_non_tensor_batch or {}
        if CANDIDATE not in columns:
            return super()._postprocess(inputs, input_non_tensor_batch=input_non_tensor_batch, validate=validate)
        kept = [row for row, output in enumerate(inputs) if output is not DROPPED]
        columns = {key: value[kept] for key, value in columns.items() if key not in (BUDGET, PROMPT)}
        output = super()._postprocess([inputs[row] for row in kept], input_non_tensor_batch=columns, validate=validate)
        output.non_tensor_batch["uid"] = columns["uid"]
        output.non_tensor_batch[CANDIDATE] = columns[CANDIDATE]
        return output

    def _is_truncated(self, output: AgentLoopOutput) -> bool:
        """Whether the response filled its budget without ending by itself.

        The budget is `response_length`, or what the context leaves beside the prompt, over all turns. It ended by
        itself if its last token was generated and is an end token. A loop that stops because a tool's answer would not
        fit has not filled the budget; verl does not tell such a stop from another, and it counts as ended.
        """
        budget = min(self.rollout_config.response_length, self._context - len(output.prompt_ids))
        filled = len(output.response_ids) >= budget
        ended = bool(output.response_mask[-1]) and output.response_ids[-1] in self._end_tokens
        return filled and not ended


class DartsAgentLoopManager(AgentLoopManager):
    """verl's agent-loop manager with a budget of candidates per prompt.

    After each training rollout `pop_metrics` gives its metrics, once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "agent_loop_workers_class"):  # a subclass may have one of its own
            self.agent_loop_workers_class = ray.remote(DartsAgentLoopWorker)
        super().__init__(*args, **kwargs)
        self.darts = darts_config(self.config)
        self._metrics: dict[str, float] = {}

    @auto_await
    async def generate_sequences(self, prompts: DataProto) -> DataProto:
        """verl's entry point: validation and plain runs as verl does it, training batches with redundant candidates."""
        if not self.darts.enable or prompts.meta_info.get("validate", False):
            return await super().generate_sequences(prompts)
        output = await self._generate_groups(prompts)
        # Here and not below, since a replayed rollout (verl's `skip.rollout`) has the uids of the run that was dumped.
        output.non_tensor_batch["uid"] = prompts.non_tensor_batch["uid"]
        return output

    def pop_metrics(self) -> dict[str, float]:
        """The metrics of the last training rollout (`darts.metrics.METRICS`); empty if there was none since."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    @SkipManager.annotate(role="rollout")
    async def _generate_groups(self, prompts: DataProto) -> DataProto:
        """The kept rows in the batch's order, without `uid`; ends as `AgentLoopManager.generate_sequences` (0.9.1)."""
        start = time.monotonic()
        uids = self._group_uids(prompts)
        budgets = self._budgets(len(uids))
        groups = prompts.select_idxs(np.arange(0, len(prompts), self.darts.group_size))
        groups.non_tensor_batch[BUDGET] = budgets
        groups.non_tensor_batch[PROMPT] = np.arange(len(uids))
        groups.non_tensor_batch["priority"] = np.cumsum(budgets) - budgets
        parts = contiguous_parts(budgets, len(self.agent_loop_workers))
        jobs = [
            _Job(worker, worker.generate_groups.remote(groups[part]), uids[part].tolist(), int(budgets[part].sum()))
            for worker, part in zip(self.agent_loop_workers, parts, strict=False)
        ]
        results = await self._gather(jobs)
        outputs = [output for output, _ in results]
        metrics = [output.meta_info.pop("metrics") for output in outputs]
        output = DataProto.concat(outputs)
        if not np.array_equal(output.non_tensor_batch.pop("uid"), np.repeat(uids, self.darts.group_size)):
            raise RuntimeError(
                f"the rollout returned {len(output)} rows that are not {self.darts.group_size} for each of the "
                f"{len(uids)} prompts in their order; this is a bug in darts.rollout."
            )
        output.meta_info = {"timing": self._performance_metrics(metrics, output), **outputs[0].meta_info}
        pool = CandidatePool.concat([pool for _, pool in results])
        self._metrics = rollout_metrics(pool, self.darts.group_size, time.monotonic() - start)
        return output

    def _group_uids(self, prompts: DataProto) -> np.ndarray:
        """The uid of each prompt; asserts that verl repeated every prompt `rollout.n` times, interleaved."""
        size, uids = self.darts.group_size, prompts.non_tensor_batch["uid"]
        firsts = uids[::size]
        if not np.array_equal(uids, np.repeat(firsts, size)) or len(set(firsts)) != len(firsts):
            raise RuntimeError(
                f"the batch does not hold each prompt exactly rollout.n={size} times in consecutive rows with a uid of "
                "its own; darts.rollout relies on verl 0.9.1's RayPPOTrainer for that."
            )
        return firsts

    def _budgets(self, num_prompts: int) -> np.ndarray:
        allocation = self.darts.allocation
        if allocation.mode == "off":
            return np.full(num_prompts, self.darts.group_size)
        return uniform_budgets(num_prompts, allocation.mean_candidates, allocation.low, allocation.high)

    async def _gather(self, jobs: list["_Job"]) -> list[tuple[DataProto, CandidatePool]]:
        """Waits for the workers, with progress lines and a time limit; the first failure ends the wait, and them."""
        deadline = time.monotonic() + self.darts.timeout_s
        futures = {asyncio.wrap_future(job.ref.future()): job for job in jobs}
        pending = set(futures)
        try:
            while pending:
                left = deadline - time.monotonic()
                wait = max(min(left, self.darts.progress_s or left), 0.0)
                done, pending = await asyncio.wait(pending, timeout=wait, return_when=asyncio.FIRST_EXCEPTION)
                for future in done:
                    futures[future].raise_failure(future)
                if pending:
                    expired = time.monotonic() >= deadline
                    running = [job for future, job in futures.items() if future in pending]
                    await self._report(jobs, running, expired)
            return [future.result() for future in futures]
        finally:
            for future in pending:
                ray.cancel(futures[future].ref)

    async def _report(self, jobs: list["_Job"], running: list["_Job"], expired: bool) -> None:
        """Prints how far the rollout is; raises if its time is over."""
        answers = await asyncio.gather(*[job.progress() for job in running])
        launched = sum(job.candidates for job in jobs)
        finished = launched - sum(job.candidates for job in running) + sum(answer[0] for answer in answers)
        waiting = [uid for answer in answers for uid in answer[1]]
        print(f"[darts] rollout: {finished}/{launched} candidates finished, {len(waiting)} prompts wait", flush=True)
        if expired:
            raise TimeoutError(
                f"darts.timeout_s={self.darts.timeout_s:g}: the rollout did not end in this time. {len(waiting)} "
                f"prompts are not complete, uids {_some(waiting)}. Raise darts.timeout_s if responses may take this "
                "long, else look at the rollout servers' logs."
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """The part of a rollout that one worker runs."""

    worker: Any
    ref: ray.ObjectRef
    uids: list[str]
    candidates: int

    def raise_failure(self, future: asyncio.Future) -> None:
        """Raises what the worker raised; that a worker died is said with the uids it had."""
        try:
            future.result()
        except ray.exceptions.RayActorError as cause:
            raise RuntimeError(f"an agent-loop worker died with prompts uid={_some(self.uids)}: {cause}") from cause

    async def progress(self) -> tuple[int, list[str]]:
        """As `DartsAgentLoopWorker.progress`; a worker that has not begun or does not answer has finished nothing."""
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(self.worker.progress.remote().future()), timeout=10)
        except (asyncio.TimeoutError, ray.exceptions.RayError):
            answer = None
        return answer or (0, self.uids)


def _reason(error: Exception) -> str:
    """Type and text of an exception; of one that another Ray process raised, without that process's traceback."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"


def _some(uids: list[str]) -> str:
    """The first few of many uids."""
    return ", ".join(uids[:8]) + (" ..." if len(uids) > 8 else "")


def _end_tokens(model_config: Any) -> frozenset[int]:
    """Token ids that end a response by themselves: the tokenizer's and the generation config's."""
    ids = [model_config.tokenizer.eos_token_id, getattr(model_config.generation_config, "eos_token_id", None)]
    flat = [token for entry in ids for token in (entry if isinstance(entry, list | tuple) else [entry])]
    return frozenset(token for token in flat if token is not None)
