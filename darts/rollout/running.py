"""A prompt's candidates while they run: what their requests report becomes events of the group, and its answers aborts.

Contract. One `RunningGroup` per prompt, in the agent-loop worker that runs its candidates; everything happens in that
worker's event loop. A `RunningCandidate` listens to the requests of its agent loop (one per turn).

1. A candidate ends once: `finish` when its agent loop has returned, `stop` when it was aborted, `lose` when a server
   ended a request that nobody aborted. Its state is the group's.
2. An abort stops the open request; a candidate between two requests (tool, judge) is cancelled, which releases what it
   holds. Either way its agent loop is left by a `CancelledError`. Where the group keeps it as its cut long end, the
   answer is what its requests have (`darts.rollout.transcript`); a candidate between two requests, or whose requests do
   not go on from one another, is on hold: it cannot be kept so.
3. Length is counted in generated tokens over all turns; tool answers do not count.
4. With an outbox, the overlapped actor is told of what grows, ends and is dropped (`darts.overlap.outbox`).
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.workers.rollout.replica import TokenOutput

from darts.config import DartsConfig
from darts.group import CandidateGroup
from darts.messages import Chunk, Extras, SequenceKey
from darts.overlap.images import SharedInputs
from darts.overlap.outbox import GrowthOutbox
from darts.pool import CandidatePool, State
from darts.rollout.client import DartsServerClient, OpenRequest
from darts.rollout.transcript import Transcript

MEASURED = (
    "reward", "weights_min", "weights_max", "prompt_tokens", "cached_tokens", "chunks", "chunk_seconds", "ended_at",
    "stop_seconds", "tokens_after",
)  # fmt: skip
"""What `RunningCandidate` knows for the columns of a `CandidatePool`."""


class RunningCandidate:
    """One candidate: its task, its requests, and what is known about them."""

    def __init__(self, group: "RunningGroup", index: int) -> None:
        self.group = group
        self.index = index
        self.chunk_tokens = group.darts.streaming.chunk_tokens
        self.transcript = Transcript() if group.machine.rules.cuts else None
        self.first_tokens = 1 if group.machine.rules.cuts else self.chunk_tokens  # tells that it can be cut
        self.routing_key = group.routing_key
        self.task: asyncio.Task | None = None
        self.single_turn = False  # its agent loop makes one request
        self.requests: dict[str, OpenRequest] = {}
        self.generated = 0  # tokens of the turns that have ended
        self.finish_reason: str | None = None  # of the last turn
        self.reward = np.nan
        self.weights_min = self.weights_max = -1  # oldest and newest version of the weights that generated
        self.prompt_tokens = 0  # over all turns
        self.cached_tokens = 0  # of them, those that the server had in its prefix cache
        self.chunks = 0
        self.chunk_seconds = 0.0
        self.ended_at = np.nan  # `time.time()`
        self.stop_seconds = np.nan  # from the decision to abort to the server's answer, or the loop's end
        self.tokens_after = 0  # of them decoded after the decision, estimated
        self._aborted_at: float | None = None  # `time.monotonic()`
        self._tokens_then: dict[str, int] = {}  # of each open request, as far as chunks had told

    @property
    def state(self) -> State:
        """What it does, or how it ended."""
        return self.group.machine.states[self.index]

    @property
    def over(self) -> bool:
        """Whether the agent loop is to be left: it was aborted or lost."""
        return self._aborted_at is not None or self.state is State.LOST

    def opened(self, request: OpenRequest) -> None:
        """A turn begins."""
        self.requests[request.request_id] = request
        self.prompt_tokens += len(request.prompt_ids)
        if self.transcript is not None:
            self.transcript.is_whole &= len(self.requests) == 1
            self.group.act(self.group.machine.hold(self.index, not self.transcript.goes_on(request)))

    def grew(self, request: OpenRequest, chunk: Chunk, latency: float) -> None:
        """A turn has more tokens."""
        self.chunks += 1
        self.chunk_seconds += latency
        tokens_so_far = self.generated + sum(open_.tokens for open_ in self.requests.values())
        self.group.act(self.group.machine.progress(self.index, tokens_so_far))
        if self.single_turn and self.state is State.RUNNING:
            self.group.tell_growth(self.index, request.prompt_ids, chunk)

    def closed(self, request: OpenRequest, output: TokenOutput, finish_reason: str) -> bool:
        """A turn has ended. Returns whether the agent loop goes on."""
        del self.requests[request.request_id]
        num_tokens = len(output.token_ids)
        self.generated += num_tokens
        self.finish_reason = finish_reason
        if (weights_version := output.extra_fields.get("global_steps")) is not None:
            version = int(weights_version)
            self.weights_min = version if self.weights_min < 0 else min(self.weights_min, version)
            self.weights_max = max(self.weights_max, version)
        self.cached_tokens += output.extra_fields.get("num_cached_tokens") or 0
        if self.transcript is not None:
            self.transcript.add(request, output)
            if not self.over:
                self.group.machine.hold(self.index, True)
                self.group.act(self.group.machine.progress(self.index, self.generated))
        if self._aborted_at is not None:
            self.stop_seconds = time.monotonic() - self._aborted_at
            # The request's own decoding rate tells how much of it came after the decision.
            decoding_rate = num_tokens / max(time.monotonic() - request.opened_at, 1e-9)
            known_tokens = self._tokens_then.get(request.request_id, 0)
            self.tokens_after += min(round(decoding_rate * self.stop_seconds), num_tokens - known_tokens)
        elif not self.over and (finish_reason == "abort" or num_tokens == 0):
            self.lose(self.generated)
        self._leave_other_branches()
        return not self.over

    def dropped(self, request: OpenRequest) -> None:
        """A turn was given up by its agent loop; its tokens are not known."""
        self.requests.pop(request.request_id, None)
        if self.transcript is not None and not self.over:
            self.group.machine.hold(self.index, True, self.generated)
        self._leave_other_branches()

    def abort(self) -> list[OpenRequest]:
        """The candidate is not needed any more. Returns the requests to stop; without any, its task is cancelled."""
        self._aborted_at = time.monotonic()
        self._tokens_then = {request.request_id: request.tokens for request in self.requests.values()}
        if not self.requests and self.task is not None:
            self.task.cancel()
        return list(self.requests.values())

    def lose(self, length: int) -> None:
        """The candidate has no usable response."""
        self.ended_at, self.transcript = time.time(), None
        self.group.act(self.group.machine.lose(self.index, length))
        self.group.tell_dropped([self.index])
        self.group.stop_requests(list(self.requests.values()))

    def finish(self, length: int, truncated: bool) -> None:
        """The agent loop has returned."""
        self.ended_at = time.time()
        self.group.act(self.group.machine.finish(self.index, length, truncated))

    def left(self) -> None:
        """The agent loop of an aborted candidate was left. If it had ended before the abort arrived, it finished."""
        if self.state.ended:
            return
        if self._aborted_at is not None and np.isnan(self.stop_seconds):  # no request was open
            self.stop_seconds = time.monotonic() - self._aborted_at
        if self.single_turn and self.generated and self.finish_reason in ("stop", "length"):
            self.finish(self.generated, self.finish_reason == "length")
        else:
            self.ended_at = time.time()
            self.group.act(self.group.machine.stop(self.index, self.generated))

    def answer(self) -> AgentLoopOutput | None:
        """What it has, where it was left in the middle and may be kept all the same; else None."""
        transcript, self.transcript = self.transcript, None  # tokens that are not needed twice
        if transcript is None or not (self.generated and transcript.is_whole):
            return None
        return transcript.answer(self.group.response_length)

    def _leave_other_branches(self) -> None:
        """An agent loop with parallel branches is left in all of them, once no request of it is open."""
        if self.over and not self.requests and self.task not in (None, asyncio.current_task()):
            self.task.cancel()


@dataclass(eq=False)
class RunningGroup:
    """One prompt's group while its candidates run: the state machine, its aborts, and the wait for its decision."""

    uid: str
    prompt: int  # its position in the batch
    budget: int
    darts: DartsConfig
    client: DartsServerClient
    routing_key: str | None = None
    outbox: GrowthOutbox | None = None  # None: nobody computes log-probs meanwhile
    on_settled: Callable[[str], None] = lambda uid: None  # told once: it is complete, or ready for the deadline
    response_length: int = 1 << 30  # tokens of a response at most

    def __post_init__(self) -> None:
        self.machine = CandidateGroup(self.budget, self.darts.group_rules(self.budget))
        self.candidates = [RunningCandidate(self, index) for index in range(self.budget)]
        self.shared = SharedInputs()  # of the candidates, for the outbox
        self._decided, self._settled = asyncio.Event(), False

    def act(self, losers: list[int]) -> None:
        """Does what an event of the machine asks for: aborts the losers, and tells of a decision."""
        self.stop_requests([request for index in losers for request in self.candidates[index].abort()])
        if not self.machine.rules.cuts:
            self.tell_dropped(losers)
        if not self._settled and (self.machine.complete or self.machine.ready):
            self._settled = True
            self.on_settled(self.uid)
        if self.machine.complete and not self._decided.is_set():
            self._decided.set()
            self.tell_dropped(set(range(len(self.candidates))).difference(self.machine.kept))
            if self.outbox is not None:
                self.outbox.keep(SequenceKey(self.uid, index) for index in self.machine.kept)

    def abandon(self) -> list[OpenRequest]:
        """Forwards `CandidateGroup.abandon`: the rollout ends without this group, unless it is complete.

        Returns:
            Its requests, for the caller to stop.
        """
        if self.machine.complete:
            return []
        losers = self.machine.abandon()
        self.tell_dropped(range(len(self.candidates)))
        self._decided.set()
        return [request for index in losers for request in self.candidates[index].abort()]

    async def keeps(self, index: int) -> bool:
        """Waits for the decision. Returns whether the candidate is kept."""
        await self._decided.wait()
        return self.machine.complete and self.machine.keeps(index)

    def pool(self) -> CandidatePool:
        """The group's candidates, for metrics."""
        group, candidate_indices = self.machine, range(len(self.candidates))
        arrival_places = {index: arrival_place for arrival_place, index in enumerate(group.arrival)}
        return CandidatePool.of(
            [len(candidate_indices)],
            prompt=self.prompt,
            length=group.lengths,
            state=[state.value for state in group.states],
            kept=[group.complete and group.keeps(index) for index in candidate_indices],
            arrival=[arrival_places.get(index, -1) for index in candidate_indices],
            num_long=group.rules.num_long,
            saturated=self.budget >= self.darts.allocation.high,
            **{name: [getattr(candidate, name) for candidate in self.candidates] for name in MEASURED},
        )

    def stop_requests(self, requests: list[OpenRequest]) -> None:
        """Stops them at their servers."""
        if requests:
            self.client.abort(requests, self.darts.streaming.abort_timeout_s)

    def tell_growth(self, index: int, prompt_ids: list[int], chunk: Chunk) -> None:
        """The overlapped actor may go on with a response that grows."""
        if self.outbox is not None:
            chance = self.machine.chance(index)
            self.outbox.grow(SequenceKey(self.uid, index), prompt_ids, chunk.offset, chunk.token_ids, chance)

    def tell_end(
        self, index: int, prompt_ids: list[int], response_ids: list[int], extras: Callable[[], Extras] | None
    ) -> None:
        """The overlapped actor has the whole response; `extras` as in `GrowthOutbox.finish`."""
        if self.outbox is not None:
            key, chance = SequenceKey(self.uid, index), self.machine.chance(index)
            self.outbox.finish(key, prompt_ids, response_ids, chance, extras)

    def tell_dropped(self, indices: Iterable[int]) -> None:
        """The overlapped actor need not go on with these."""
        if self.outbox is not None:
            for index in indices:
                self.outbox.drop(SequenceKey(self.uid, index))
