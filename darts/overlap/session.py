"""The overlapped actor's side of a rollout: reports from the workers in, calls to the actor's ranks out, results.

Contract. One `OverlapSession` per run, in the process of trainer and rollout manager (`darts.schedule` says why). A
step is `run` while the rollout runs, in its event loop, and then `finish`, which blocks: what is left for it is
exposed.

1. One call is in flight at a time: ranks forward together, and Ray does not promise an order to calls of an actor that
   has async methods. Generation never waits: `run` only awaits, and returns when the workers have nothing to report any
   more; a call that is in flight then goes on, and `finish` takes its answer.
2. A rank that raises or dies ends `prepare`, `run` or `finish` with a `RuntimeError` that has the cause. Every wait has
   a limit, `darts.timeout_s`: a `TimeoutError`.
3. Nothing of a step outlives it: ranks forget when a step opens and when it is finished; every call names its step.
4. `finish` gives results only for sequences whose tokens are those of the batch, by checksum. The rest is missing, and
   verl computes it.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from darts.config import OverlapConfig
from darts.evidence.log import logger
from darts.messages import (
    ActorCall,
    Progress,
    RankAbility,
    RankCall,
    RankReport,
    RankResults,
    SequenceKey,
    StepSettings,
)
from darts.schedule import OverlapSchedule

POLL_S = 5.0
PAUSE_S = 0.05
"""Between two polls of a worker: at 64 GPUs it has thousands of reports in a second, and one call brings them all."""
CAUSE_S = 5.0
"""Wait for the other ranks after a failure: one that died ends the collectives of others, who may be heard first."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLimits:
    """What the run's configuration says about forwards of the actor."""

    num_ranks: int  # data-parallel
    max_tokens: int  # of a forward on one GPU
    max_rows: int | None  # of a forward; None: as many as `max_tokens` allows
    padded: bool  # verl's forward pads its rows to the longest
    sequence_parallel: int  # GPUs of a rank
    longest: int  # tokens of prompt and response, at most
    temperature: float
    with_reference: bool
    sum_pi_squared: bool
    timeout_s: float


@dataclass(slots=True, eq=False)
class OverlapOutcome:
    """What the actor computed in a step.

    `values[key]` as `darts.messages.RankResults.values`, for the kept sequences that it has; `checksums[key]` of
    their tokens.
    """

    values: dict[SequenceKey, dict[str, np.ndarray]] = field(default_factory=dict)
    checksums: dict[SequenceKey, int] = field(default_factory=dict)
    mfu: float = 0.0
    calls: list[ActorCall] = field(default_factory=list)
    # of each sequence: when a part was there, tokens of it
    computed: dict[SequenceKey, list[tuple[float, int]]] = field(default_factory=dict)
    restarted_tokens: int = 0
    peak_cache_bytes: int = 0

    def release(self) -> None:
        """Gives the values back: in long runs they are hundreds of megabytes of Ray's object store."""
        self.values = {key: {} for key in self.values}


@dataclass(slots=True, eq=False)
class _Step:
    """A step that has begun and is not finished."""

    number: int
    schedule: OverlapSchedule
    waiting: list[Any]  # answers of the ranks, object references
    sent: list[RankCall] = field(default_factory=list)  # what they answer; empty: they open the step
    outcome: OverlapOutcome = field(default_factory=OverlapOutcome)


@dataclass(eq=False)
class OverlapSession:
    """Drives the overlapped actor, once `prepare` has asked it what it can do."""

    actor: Any  # worker group of `verl_patches.dp_actor.OverlappedActorWorker`
    overlap: OverlapConfig  # the settings; the mode is `sequence` or `token`
    limits: ActorLimits

    def __post_init__(self) -> None:
        self.mode = self.overlap.mode
        """In which log-probs are computed; `sequence` also where `token` was asked for and cannot be."""
        self.cache_tokens = 0
        """Tokens of prefixes that each rank may hold and work on; 0 in mode `sequence`."""
        self._step: _Step | None = None
        self._more = asyncio.Event()  # something was reported

    @property
    def begun(self) -> bool:
        """Whether a step has run and is not finished."""
        return self._step is not None

    def prepare(self) -> list[RankAbility]:
        """Finds out what the ranks can do, in a step of its own, number 0, and says once if that excludes `token`."""
        abilities: list[RankAbility] = self._get(self.actor.overlap_open(self._settings(0)))
        self._get(self.actor.overlap_clear(0))
        if self.mode == "token":
            refusal = next((ability.refusal for ability in abilities if ability.refusal), None)
            if refusal is None:
                bytes_per_token = max(ability.bytes_per_token for ability in abilities)
                self.cache_tokens = int(self.overlap.kv_cache_gib * GIB / bytes_per_token)
                least_tokens = 2 * self.limits.longest
                if self.cache_tokens < least_tokens:
                    refusal = (
                        f"darts.overlap.kv_cache_gib={self.overlap.kv_cache_gib:g} holds {self.cache_tokens} tokens "
                        f"on a rank; two sequences of {self.limits.longest} need "
                        f"{least_tokens * bytes_per_token / GIB:.2f} GiB"
                    )
            if refusal is not None:
                self.mode, self.cache_tokens = "sequence", 0
                logger.warning(f"overlap: complete responses alone (mode sequence), since {refusal}")
        return abilities

    async def run(self, workers: Iterable[Any], rollout: int, step: int) -> None:
        """Computes while `workers` run rollout number `rollout`."""
        self._more = asyncio.Event()
        limits = self.limits
        forward_tokens = limits.max_tokens * limits.sequence_parallel
        schedule = OverlapSchedule(
            step, limits.num_ranks, forward_tokens, self.cache_tokens, max_rows=limits.max_rows, padded=limits.padded
        )
        self._step = _Step(step, schedule, self.actor.overlap_open(self._settings(step)))
        driver_task = asyncio.ensure_future(self._drive(self._step))
        poll_tasks = asyncio.gather(*[self._poll(self._step, worker, rollout) for worker in workers])
        try:
            await asyncio.wait({driver_task, poll_tasks}, return_when=asyncio.FIRST_COMPLETED)
            for ended_task in (driver_task, poll_tasks):
                if ended_task.done():
                    ended_task.result()
        finally:
            driver_task.cancel()
            poll_tasks.cancel()
            await asyncio.gather(driver_task, poll_tasks, return_exceptions=True)

    def finish(self, keys: list[SequenceKey]) -> OverlapOutcome:
        """Computes what is left of the kept sequences `keys`, fetches their results, and clears the ranks.

        Raises:
            RuntimeError: no step has begun; or see the module's contract.
        """
        if self._step is None:
            raise RuntimeError("no step has begun: run() comes before finish().")
        step, self._step = self._step, None
        was_sent = True
        while was_sent:
            if step.waiting:
                self._take(step, self._get(step.waiting))
            step.schedule.keep_only(keys)
            was_sent = self._send(step)
        rank_answers = self._get(self.actor.overlap_collect(step.number, step.schedule.complete(keys)))
        rank_results: list[RankResults] = rank_answers[: self.limits.num_ranks]
        self._get(self.actor.overlap_clear(step.number))
        outcome = step.outcome
        outcome.values = {key: value for result in rank_results for key, value in result.values.items()}
        outcome.checksums = {key: step.schedule.checksum(key) for key in outcome.values}
        outcome.mfu = float(np.mean([result.mfu for result in rank_results]))
        outcome.restarted_tokens = step.schedule.restarted_tokens
        return outcome

    async def _poll(self, step: _Step, worker: Any, rollout: int) -> None:
        """Takes what one worker reports until it has ended."""
        try:
            while True:
                progress: Progress = await worker.take_growth.remote(rollout, POLL_S)
                for growth in progress.growths:
                    step.schedule.grow(growth)
                for key in progress.kept:
                    step.schedule.keep(key)
                for key in progress.dropped:
                    step.schedule.drop(key)
                self._more.set()
                if progress.ended:
                    return
                await asyncio.sleep(PAUSE_S)
        except ray.exceptions.RayActorError:
            return  # the rollout fails with the same cause

    async def _drive(self, step: _Step) -> None:
        while True:
            reports = await self._answers(step.waiting)
            self._take(step, reports)
            while not self._send(step):
                self._more.clear()
                await self._more.wait()

    async def _answers(self, refs: list[Any]) -> list[Any]:
        """What all ranks answer, or the first failure. If it is cancelled the ranks go on."""
        try:
            return await asyncio.wait_for(asyncio.gather(*refs), self.limits.timeout_s)
        except ray.exceptions.RayError as cause:
            failure_text = await asyncio.to_thread(_failure_text, refs, cause)
            raise RuntimeError(f"the overlapped actor failed: {failure_text}") from cause
        except asyncio.TimeoutError:
            raise self._too_late() from None

    def _send(self, step: _Step) -> bool:
        """Sends the next call. Returns whether there was one."""
        next_calls = step.schedule.next_call()
        if next_calls is not None:
            step.sent = next_calls
            step.waiting = self.actor.overlap_extend(next_calls)
        return next_calls is not None

    def _take(self, step: _Step, answers: list[Any]) -> None:
        step.waiting = []
        if not step.sent:
            return
        outcome = step.outcome
        reports: list[RankReport] = answers[: self.limits.num_ranks]  # the others are parts of the same ranks
        ended_at = max(report.ended for report in reports)
        actor_call = ActorCall(min(r.began for r in reports), ended_at, sum(r.tokens for r in reports))
        if actor_call.tokens:
            outcome.calls.append(actor_call)
        outcome.peak_cache_bytes = max(outcome.peak_cache_bytes, *(report.peak_cache_bytes for report in reports))
        for rank_call in step.sent:
            for row in (*rank_call.whole, *rank_call.growing):
                # Log-probs there are now: of all tokens but the prompt's; a row's own first token has one too.
                num_new = row.start + len(row.token_ids) - max(row.start, row.prompt_tokens)
                if row.start == 0:
                    outcome.computed[row.key] = []
                outcome.computed[row.key].append((ended_at, max(num_new, 0)))

    def _settings(self, step: int) -> StepSettings:
        limits = self.limits
        return StepSettings(
            step=step,
            mode=self.mode,
            temperature=limits.temperature,
            with_reference=limits.with_reference,
            sum_pi_squared=limits.sum_pi_squared,
        )

    def _get(self, refs: list[Any]) -> list[Any]:
        try:
            return ray.get(refs, timeout=self.limits.timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise self._too_late() from None
        except ray.exceptions.RayError as cause:
            raise RuntimeError(f"the overlapped actor failed: {_failure_text(refs, cause)}") from cause

    def _too_late(self) -> TimeoutError:
        return TimeoutError(
            f"darts.timeout_s={self.limits.timeout_s:g}: the overlapped actor did not answer in this time. Look at "
            "the log of the actor's ranks, or set darts.overlap.mode=off."
        )


def _failure_text(refs: list[ray.ObjectRef], error: ray.exceptions.RayError) -> str:
    """Why these calls, one a rank, failed: `error`, which was heard first, and a rank's death that may be its cause."""
    if isinstance(error, ray.exceptions.RayActorError):
        return reason(error)
    ended_calls, _ = ray.wait(refs, num_returns=len(refs), timeout=CAUSE_S)
    deaths = [death for death in map(_death, ended_calls) if death is not None]
    return f"{reason(deaths[0])} (heard first: {reason(error)})" if deaths else reason(error)


def _death(ref: ray.ObjectRef) -> ray.exceptions.RayActorError | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayActorError as death:
        return death
    except ray.exceptions.RayError:
        pass
    return None


def reason(error: BaseException) -> str:
    """Type and text of an exception; of one that another Ray process raised, without that process's traceback."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"
