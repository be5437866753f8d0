"""verl's agent-loop worker with groups of candidates: it runs them, stops the losers, and keeps M of each.

Contract. A worker runs whole prompts: all candidates of a prompt, through verl's own agent loops, each as a request of
its own. It owns the decision which are kept.

1. A dropped candidate is padded, scored and sent nowhere. With `darts.reward.pool` each one that finishes is scored.
2. When `generate_groups` returns, every candidate's agent loop and request has ended, the aborted ones included.
3. A candidate that fails ends the rollout with the uid, the candidate and the cause; what still ran is stopped. One
   whose request the server ended unasked, or whose agent loop returned no generated token, is lost: the group goes on
   while enough are left. What fails in the agent loop of an aborted one is printed.
4. A candidate that its group keeps as the cut long end is trained on with what it has; its agent loop was left.
5. Of groups that are abandoned, since the rollout has enough others, nothing is kept.
6. `generate_sequences` (validation, plain runs) is verl's own, but for a limit that the rollout has of its own.
"""

import asyncio
from typing import Any

import numpy as np
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.protocol import DataProto

from darts.config import DartsConfig
from darts.evidence.log import logger
from darts.latency import StepTimes
from darts.messages import BUDGET, CANDIDATE, MAX_TOKENS, PROMPT, Progress
from darts.overlap.images import make_extras
from darts.overlap.outbox import GrowthOutbox
from darts.overlap.session import reason
from darts.pool import CandidatePool
from darts.rollout.client import AbortTimeout, DartsServerClient, current_listener
from darts.rollout.running import RunningCandidate, RunningGroup
from verl_patches.patches import patch_building


class CandidateError(RuntimeError):
    """A candidate could not be generated or scored. The message names uid, candidate and cause."""


DROPPED = object()
"""Stands in for the output of a candidate that was not kept."""


def candidate_seed(seed: int, step: int, prompt: int, candidate: int) -> int:
    """The sampling seed of one candidate: 32 bits, the same whatever the other prompts' budgets are (our choice).

    All turns of a multi-turn candidate have it.
    """
    return int(np.random.SeedSequence([seed, max(step, 0), prompt, candidate]).generate_state(1)[0])


class DartsAgentLoopWorker(AgentLoopWorker):
    """verl's agent-loop worker, which also runs groups of candidates and keeps M of each."""

    llm_client: DartsServerClient

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.darts.enable:
            patch_building()
        self._groups: dict[str, RunningGroup] = {}  # by uid
        self._number = 0  # of the last rollout that began
        self._running: asyncio.Task | None = None  # that rollout, unless it is being stopped
        self._given_up = 0  # the last rollout that was
        self._outbox: GrowthOutbox | None = None  # of that rollout
        self._begun = asyncio.Condition()
        self._settled: list[str] = []  # uids of that rollout's groups, in the order in which they were settled
        self._news = asyncio.Event()  # one more of them, or no more to come
        self._closed = False
        self._darts: DartsConfig | None = None  # of the rollout that runs
        self._step = -1
        self._max_tokens: int | None = None  # of a response of the rollout that runs, where it is below the run's

    async def generate_sequences(self, batch: DataProto) -> DataProto:
        """Forwards to verl's method; responses end where `MAX_TOKENS` of the batch says so."""
        self._max_tokens = batch.meta_info.get(MAX_TOKENS)
        return await super().generate_sequences(batch)

    async def generate_groups(
        self, prompts: DataProto, darts: DartsConfig, number: int
    ) -> tuple[DataProto, CandidatePool, StepTimes]:
        """Runs `BUDGET` candidates of each prompt and keeps M.

        Args:
            prompts: one row per prompt, with `uid`, `priority` of its first candidate, `BUDGET` and `PROMPT` (position
                in the whole batch).
            darts: the settings of this rollout.
            number: of this rollout; above that of the one before.

        Returns:
            The kept rows, as verl's `generate_sequences` gives them, with `uid` and `CANDIDATE` (none if all groups
            were abandoned); all candidates; and the decoding steps that were seen.

        Raises:
            CandidateError: a candidate failed.
            CancelledError: the rollout was given up.
            RuntimeError: another call has not ended.
        """
        if number <= self._given_up:
            raise asyncio.CancelledError
        if self._groups:
            raise RuntimeError(f"this worker still runs {len(self._groups)} prompts of another rollout.")
        budgets = prompts.non_tensor_batch[BUDGET].astype(np.int64)
        candidate_rows = prompts.select_idxs(np.repeat(np.arange(len(prompts)), budgets))
        candidates = np.concatenate([np.arange(budget) for budget in budgets])
        candidate_rows.non_tensor_batch[CANDIDATE] = candidates
        candidate_rows.non_tensor_batch["priority"] = candidate_rows.non_tensor_batch["priority"] + candidates
        self._step = prompts.meta_info.get("global_steps", -1)
        self._darts = darts
        mode = darts.overlap.mode
        # With a processor nothing is told of growing candidates.
        self._outbox = None if mode == "off" else GrowthOutbox(growing=mode == "token" and self.processor is None)
        groups, positions = {}, prompts.non_tensor_batch[PROMPT].tolist()
        for uid, prompt, budget in zip(prompts.non_tensor_batch["uid"], positions, budgets.tolist(), strict=True):
            routing_key = self._routing_key(uid, prompt)
            groups[uid] = RunningGroup(
                uid,
                prompt,
                budget,
                darts,
                self.llm_client,
                routing_key,
                self._outbox,
                self._tell_settled,
                self.rollout_config.response_length,
            )
        self._groups = groups
        self._settled, self._closed, self._number = [], False, number
        self._running = asyncio.current_task()
        try:
            async with self._begun:
                self._begun.notify_all()
            kept_rows = await self.generate_sequences(candidate_rows)
            pool = CandidatePool.concat([group.pool() for group in self._groups.values()])
            return kept_rows, pool, self.llm_client.take_step_times()
        finally:
            self._running = None
            try:
                await self._stop_all()
            finally:
                self._groups = {}
                self._close()
                if self._outbox is not None:
                    self._outbox.end()

    async def give_up(self, number: int) -> None:
        """Rollout `number` has failed elsewhere: what this worker runs of it is stopped, or does not begin.

        `ray.cancel` would end the calls to the servers and to verl's balancer with it, and an ordered actor like the
        balancer waits 30 s for each call that was taken out of its queue (Ray 2.60).
        """
        self._given_up = max(self._given_up, number)
        async with self._begun:
            self._begun.notify_all()
        if self._number == number and self._running is not None:
            self.llm_client.abort_open(self._darts.streaming.abort_timeout_s)
            self._running.cancel()

    async def _has_begun(self, number: int) -> None:
        """Returns once rollout `number` or a later one has begun, or never will."""
        async with self._begun:
            await self._begun.wait_for(lambda: max(self._number, self._given_up) >= number)

    async def settled(self, number: int, known: int) -> list[str]:
        """The uids of rollout `number`'s groups that are complete or ready for the deadline, in the order in which they
        came to be, without the first `known`; waits until there is one. Empty once no more will come.

        Ray may run this before `generate_groups`, whose arguments are larger: it then waits for it.
        """
        await self._has_begun(number)
        while self._number == number and not self._closed and len(self._settled) <= known:
            self._news.clear()
            await self._news.wait()
        return self._settled[known:] if self._number == number else []

    async def end_waits(self, number: int, trained: list[str] | None = None) -> None:
        """Enough groups of rollout `number` are settled: none waits any longer than until it is.

        Args:
            trained: uids of those that the rollout goes on with, whichever worker has them; all others are given up
                unless they are complete. None: it goes on with all.
        """
        await self._has_begun(number)
        if self._number != number or not self._groups:
            return
        wanted_uids = set(self._groups if trained is None else trained)
        abandoned_groups = [group for uid, group in self._groups.items() if uid not in wanted_uids]
        open_requests = [request for group in abandoned_groups for request in group.abandon()]
        if open_requests:
            self.llm_client.abort(open_requests, self._darts.streaming.abort_timeout_s)
        for uid, group in self._groups.items():
            if uid in wanted_uids:
                group.act(group.machine.deadline())
        self._close()

    def _tell_settled(self, uid: str) -> None:
        self._settled.append(uid)
        self._news.set()

    def _close(self) -> None:
        self._closed = True
        self._news.set()

    async def take_growth(self, number: int, wait_s: float) -> Progress:
        """What candidates of rollout `number` have reported since the last call; see `darts.overlap.outbox`."""
        await self._has_begun(number)
        if self._number != number or self._outbox is None:
            return Progress(ended=True)
        return await self._outbox.take(wait_s)

    async def progress(self) -> tuple[int, int, list[str]] | None:
        """Finished candidates of the rollout that runs, its tokens so far, and the uids of incomplete prompts; None
        if none runs."""
        if not self._groups:
            return None
        groups = self._groups.values()
        num_finished = sum(len(group.machine.arrival) for group in groups)
        num_tokens = sum(sum(group.machine.lengths) for group in groups)
        return num_finished, num_tokens, [group.uid for group in groups if not group.machine.ended]

    async def _stop_all(self) -> None:
        """Stops what runs after a failure; after a rollout that succeeded there is nothing."""
        running_tasks = [
            candidate.task
            for group in self._groups.values()
            for candidate in group.candidates
            if candidate.task is not None and not candidate.task.done()
        ]
        if running_tasks:
            self.llm_client.abort_open(self._darts.streaming.abort_timeout_s)
            for task in running_tasks:
                task.cancel()
            await asyncio.wait(running_tasks, timeout=self._darts.streaming.abort_timeout_s)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        """verl's method, told which candidate this task runs; a failure gets its uid."""
        index = kwargs.pop(CANDIDATE, None)
        if self._max_tokens is not None:
            sampling_params["max_tokens"] = self._max_tokens
        if index is None:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in (BUDGET, PROMPT)}
        group = self._groups[kwargs["uid"]]
        candidate = group.candidates[int(index)]
        candidate.task = asyncio.current_task()
        candidate.single_turn = kwargs["agent_name"] == "single_turn_agent"
        current_listener.set(candidate)
        if (base_seed := self._seed()) is not None:
            sampling_params["seed"] = candidate_seed(base_seed, self._step, group.prompt, candidate.index)
        try:
            if not candidate.over:
                return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        except asyncio.CancelledError:
            if not candidate.over:
                raise
        except Exception as cause:
            if not candidate.over or isinstance(cause, AbortTimeout):
                raise self._failure(candidate, cause) from cause
            logger.warning(f"the agent loop of an aborted candidate (prompt uid={group.uid}) failed: {reason(cause)}")
        # Its agent loop was left in the middle.
        candidate.left()
        if (answer := candidate.answer()) is None or not await group.keeps(candidate.index):
            return DROPPED
        columns = {name: value for name, value in kwargs.items() if name not in ("agent_name", "trace")}
        try:
            return await self._padded(candidate, answer, trajectory["validate"], **columns)
        except Exception as cause:
            raise self._failure(candidate, cause) from cause

    def _failure(self, candidate: RunningCandidate, cause: Exception) -> CandidateError:
        group = candidate.group
        return CandidateError(
            f"candidate {candidate.index} of prompt uid={group.uid} (row {group.prompt} of the batch, step "
            f"{self._step}) failed: {reason(cause)}"
        )

    async def _agent_loop_postprocess(self, output: AgentLoopOutput, validate: bool, **kwargs: Any) -> Any:
        """Between an agent loop and its padding and reward: wait for the group, go on only if kept."""
        candidate = current_listener.get()
        if not isinstance(candidate, RunningCandidate):
            return await super()._agent_loop_postprocess(output, validate, **kwargs)
        group = candidate.group
        if candidate.over:
            candidate.left()
            is_kept = await group.keeps(candidate.index)
            return await self._padded(candidate, output, validate, **kwargs) if is_kept else DROPPED
        num_generated = int(sum(output.response_mask))
        if num_generated == 0:  # some loops return this where their environment fails
            candidate.lose(candidate.generated)
            return DROPPED
        if candidate.finish_reason is None:
            raise RuntimeError(
                f"its agent loop ({kwargs.get('agent_name', self.rollout_config.agent.default_agent_loop)}) returned a "
                "response that it did not generate through its server_manager: DARTS cannot follow or stop it."
            )
        # A loop may cut what was generated to the response budget. One that ends because a tool's answer would not fit
        # does not say so, and counts as ended.
        cut = candidate.generated > num_generated and len(output.response_ids) >= self.rollout_config.response_length
        candidate.finish(num_generated, truncated=candidate.finish_reason == "length" or cut)
        candidate.transcript = None  # the loop's own answer is there
        self._tell_end(candidate, output)
        if self._darts.reward.pool and not group.machine.abandoned:
            output.extra_fields["raw_prompt"] = kwargs["raw_prompt"]  # as verl does before it scores
            await self._compute_score([output], kwargs=kwargs)
            candidate.reward = output.reward_score
        is_kept = await group.keeps(candidate.index)
        if self._darts.selection.on_no_valid == "fail" and group.machine.num_valid == 0:
            raise RuntimeError(
                f"none of the {len(group.candidates)} candidates ended within the response budget "
                f"({self.rollout_config.response_length} tokens). Raise data.max_response_length, drop the prompt, or "
                "set darts.selection.on_no_valid=fill to train on truncated ones."
            )
        return await self._padded(candidate, output, validate, **kwargs) if is_kept else DROPPED

    async def _padded(self, candidate: RunningCandidate, output: AgentLoopOutput, validate: bool, **kwargs: Any) -> Any:
        """A kept response as verl pads and scores it."""
        self._tell_end(candidate, output)  # once; one that was cut was not told to have ended
        padded_output = await super()._agent_loop_postprocess(output, validate, **kwargs)
        if padded_output.reward_score is not None:
            candidate.reward = padded_output.reward_score
        return padded_output

    def _tell_end(self, candidate: RunningCandidate, output: AgentLoopOutput) -> None:
        group = candidate.group
        extras = None if self.processor is None else lambda: group.shared.put(make_extras(self, output))
        group.tell_end(candidate.index, output.prompt_ids, output.response_ids, extras)

    def _postprocess(
        self, inputs: list[Any], input_non_tensor_batch: dict | None = None, validate: bool = False
    ) -> DataProto:
        """Batches the kept alone, and adds the columns that rows are joined by."""
        columns = input_non_tensor_batch or {}
        if CANDIDATE not in columns:
            return super()._postprocess(inputs, input_non_tensor_batch=input_non_tensor_batch, validate=validate)
        kept = [row for row, output in enumerate(inputs) if output is not DROPPED]
        if not kept:
            return DataProto(meta_info={"metrics": []})
        columns = {key: value[kept] for key, value in columns.items() if key not in (BUDGET, PROMPT)}
        output = super()._postprocess([inputs[row] for row in kept], input_non_tensor_batch=columns, validate=validate)
        output.non_tensor_batch["uid"] = columns["uid"]
        output.non_tensor_batch[CANDIDATE] = columns[CANDIDATE]
        return output

    def _routing_key(self, uid: str, prompt: int) -> str | None:
        """What verl's balancer keeps together; None leaves each candidate to it. A uid differs from run to run."""
        if self._darts.routing == "balanced":
            return None
        return f"det-{prompt}" if self.rollout_config.full_determinism else uid

    def _seed(self) -> int | None:
        """What the candidates' seeds are made of; None leaves the draw to the engine."""
        if self._darts.seed is None and self.rollout_config.full_determinism:
            return self.rollout_config.seed  # verl's server gives every request of a replica the same seed
        return self._darts.seed
