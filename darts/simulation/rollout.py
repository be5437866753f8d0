"""One rollout as discrete events: candidates on engines, and the groups that decide about them.

Contract: pure. `darts.group.CandidateGroup` decides which candidates are aborted and kept, `Round.harvest` when the
rollout ends; here is what happens in between.

1. All candidates are submitted at once, prompt by prompt in the order of launch. `balanced` routing gives each to the
   engine with the fewest requests, which is in turns; `group` all of a prompt to the engine that has the fewest (ties
   to the first; verl's balancer draws among them).
2. An abort takes `abort_s`, and frees its slot when it arrives; a candidate that ends before has finished. Of what
   happens at one instant aborts come first, then ends by engine, and on one engine by the order of launch.
3. With `early_stop=exact` shortest-only groups hear of growth as servers report it, every `streaming.chunk_tokens`
   tokens; others could decide nothing by it.
4. With `long_wait=deadline` time is up once enough groups are settled (`darts.group.num_due`). With `harvest` it is up
   for the first so many groups that are, and the others are abandoned. A settled group is complete, or ready.
5. A running candidate may be cut as soon as it runs; one that is stopped within its first step has one token.
6. Without aborts the seconds are those of `darts.latency.makespan`. Prefill and preemption are not modelled.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darts.config import DartsConfig
from darts.group import CandidateGroup, num_due
from darts.latency import LatencyCurve
from darts.pool import CandidatePool, State
from darts.simulation.costs import Cluster
from darts.simulation.engine import NEVER, Engine

ABORT = -1
"""In the queue of events, where an engine's number stands otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of a rollout."""

    seconds: float  # until the last candidate has ended
    complete: list[int]  # positions of the prompts that are trained on, in their order
    slot_seconds: float  # in which a slot ran a sequence, sum over the slots
    pool: CandidatePool  # nothing is known of rewards, chunks and caches


def route(budgets: Sequence[int], order: Sequence[int], engines: int, routing: str) -> list[int]:
    """The engine of each candidate, prompt after prompt; see the module's contract."""
    firsts = np.cumsum(budgets) - budgets
    engine_numbers = np.empty(int(np.sum(budgets)), dtype=np.int64)
    engine_loads = [(0, engine) for engine in range(engines)]
    position = 0
    for prompt in order:
        budget, (engine_load, engine) = int(budgets[prompt]), engine_loads[0]
        heapq.heapreplace(engine_loads, (engine_load + budget, engine))
        in_turns = np.arange(position, position + budget) % engines
        engine_numbers[firsts[prompt] : firsts[prompt] + budget] = engine if routing == "group" else in_turns
        position += budget
    return engine_numbers.tolist()


class SimulatedRollout:
    """Candidates until every group is decided and every candidate has ended.

    Args:
        lengths: tokens of each candidate if nobody stops it, at least 1; prompt after prompt, shape [num_candidates].
        truncated: which of them end at the length limit.
        budgets: candidates of each prompt, shape [num_prompts].
        rules: of the groups.
        cluster: its engines share the candidates.
        curve: PTL of an engine.
        order: positions of the prompts in the order of launch; None: as they stand.
        harvest: the rollout goes on with the first so many prompts that are settled; None: with all.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        truncated: NDArray[np.bool_],
        budgets: NDArray[np.int64],
        rules: DartsConfig,
        cluster: Cluster,
        curve: LatencyCurve,
        *,
        order: Sequence[int] | None = None,
        harvest: int | None = None,
    ) -> None:
        self.rules, self.cluster, self.budgets = rules, cluster, budgets
        self.truncated = truncated.tolist()
        self.lengths = lengths.tolist()
        self.harvest = harvest
        self.groups = [CandidateGroup(budget, rules.group_rules(budget)) for budget in budgets.tolist()]
        self.firsts = (np.cumsum(budgets) - budgets).tolist()
        self.prompts = np.repeat(np.arange(len(budgets)), budgets).tolist()
        step_seconds = curve(np.arange(min(cluster.max_num_seqs, len(lengths)) + 1)).tolist()
        self.engines = [Engine(step_seconds, cluster.max_num_seqs) for _ in range(cluster.engines)]
        self.order = range(len(budgets)) if order is None else list(order)
        self.engine_of = route(budgets, self.order, cluster.engines, rules.routing)
        self.ended_at = [NEVER] * len(self.lengths)
        self.settled: list[int] = []
        self.is_settled = [False] * len(self.groups)
        has_deadline = rules.enable and rules.selection.long_wait == "deadline"
        # So many settled groups end the waits of all; 0: none do, or they have ended.
        self.num_needed = (num_due(len(self.groups)) if has_deadline else 0) if harvest is None else harvest
        self.trained: list[int] = list(range(len(self.groups)))
        self.followed = [group.rules.follows_growth for group in self.groups]  # those that hear of growth
        self.chunk = rules.streaming.chunk_tokens
        self.versions = [0] * cluster.engines
        self.events: list[tuple[float, int, int]] = []  # (time, engine, its version) or (time, ABORT, candidate)
        self.touched: set[int] = set()

    def run(self) -> Outcome:
        """Runs them, once."""
        # 1. All are submitted, and events handled in the order of time.
        for prompt in self.order:
            first_candidate = self.firsts[prompt]
            for candidate in range(first_candidate, first_candidate + int(self.budgets[prompt])):
                self.engines[self.engine_of[candidate]].submit(candidate, self.lengths[candidate])
        self.touched.update(range(len(self.engines)))
        self._schedule(0.0)
        events, versions, engines = self.events, self.versions, self.engines
        while events:
            now_s, engine, event_mark = heapq.heappop(events)
            if engine == ABORT:
                self._stop(event_mark, now_s)
            elif event_mark == versions[engine]:
                next_engine = engines[engine]
                candidate, has_ended = next_engine.pop_event(now_s)
                if has_ended:
                    self._finish(candidate, now_s)
                else:
                    self._report(candidate, now_s)
                if self.touched or next_engine.waits:
                    self.touched.add(engine)
                elif (next_time := next_engine.next_event()) < NEVER:  # nothing else has changed
                    heapq.heappush(events, (next_time, engine, event_mark))
            if self.touched:
                self._schedule(now_s)
        # 2. What became of them.
        is_kept = np.zeros(len(self.lengths), dtype=bool)
        for prompt in self.trained:
            first_candidate = self.firsts[prompt]
            is_kept[[first_candidate + index for index in self.groups[prompt].kept]] = True
        states = np.array([state.value for group in self.groups for state in group.states])
        ended = np.array(self.ended_at)
        began_at = [
            self.engines[engine].began.get(candidate, (0.0, self.ended_at[candidate]))[1]
            for candidate, engine in enumerate(self.engine_of)
        ]
        return Outcome(
            seconds=float(ended.max(initial=0.0)),
            complete=sorted(self.trained),
            slot_seconds=float((ended - began_at).sum()),
            pool=CandidatePool.of(
                self.budgets,
                length=self.lengths,
                state=np.where(is_kept | (states != State.CUT.value), states, State.STOPPED.value),
                kept=is_kept,
                num_long=np.repeat([group.rules.num_long for group in self.groups], self.budgets),
                saturated=np.repeat(self.budgets >= self.rules.allocation.high, self.budgets),
                ended_at=ended,
            ),
        )

    def _schedule(self, now: float) -> None:
        """Free slots are filled, and the next event of each engine that has changed is queued."""
        while self.touched:
            engine_number = min(self.touched)
            self.touched.discard(engine_number)
            engine = self.engines[engine_number]
            for candidate in engine.fill(now):
                prompt = self.prompts[candidate]
                if self.followed[prompt]:
                    self._follow(candidate, 0)
                if self.groups[prompt].rules.cuts:
                    self._act(prompt, self.groups[prompt].progress(candidate - self.firsts[prompt], 1), now)
            self.versions[engine_number] += 1
            event_time = engine.next_event()
            if event_time < NEVER:
                heapq.heappush(self.events, (event_time, engine_number, self.versions[engine_number]))

    def _finish(self, candidate: int, now: float) -> None:
        """A candidate has ended by itself, or at the limit."""
        prompt = self.prompts[candidate]
        self.ended_at[candidate] = now
        index, length = candidate - self.firsts[prompt], self.lengths[candidate]
        self._act(prompt, self.groups[prompt].finish(index, length, self.truncated[candidate]), now)

    def _report(self, candidate: int, now: float) -> None:
        """A server tells how far a candidate is."""
        prompt, engine = self.prompts[candidate], self.engines[self.engine_of[candidate]]
        tokens = engine.tokens(candidate, now)
        self._act(prompt, self.groups[prompt].progress(candidate - self.firsts[prompt], tokens), now)
        if self.ended_at[candidate] == NEVER:
            self._follow(candidate, tokens)

    def _stop(self, candidate: int, now: float) -> None:
        """An abort arrives."""
        if self.ended_at[candidate] < NEVER:
            return
        engine_number, prompt = self.engine_of[candidate], self.prompts[candidate]
        tokens_done = self.engines[engine_number].leave(candidate, now)
        tokens_done = max(tokens_done, self.groups[prompt].lengths[candidate - self.firsts[prompt]])
        self.touched.add(engine_number)
        self.ended_at[candidate], self.lengths[candidate] = now, tokens_done
        self._act(prompt, self.groups[prompt].stop(candidate - self.firsts[prompt], tokens_done), now)

    def _act(self, prompt: int, losers: list[int], now: float) -> None:
        """After an event of a group: its losers are aborted, and it may be settled, which may end waits."""
        first_candidate = self.firsts[prompt]
        for index in losers:
            if self.cluster.abort_s:
                heapq.heappush(self.events, (now + self.cluster.abort_s, ABORT, first_candidate + index))
            else:
                self._stop(first_candidate + index, now)
        group = self.groups[prompt]
        if not self.is_settled[prompt] and (group.complete or group.ready):
            self.is_settled[prompt] = True
            self.settled.append(prompt)
            if len(self.settled) == self.num_needed:
                self._end_waits(now)

    def _end_waits(self, now: float) -> None:
        """No group waits longer than until it is settled; with a harvest, the others are given up."""
        if self.harvest is not None:
            self.trained = self.settled[: self.harvest]
        wanted_prompts = set(self.trained)
        for prompt, group in enumerate(self.groups):
            self._act(prompt, group.deadline() if prompt in wanted_prompts else group.abandon(), now)

    def _follow(self, candidate: int, tokens: int) -> None:
        """The next report of a candidate that has so many tokens, if it grows so far."""
        next_tokens = tokens - tokens % self.chunk + self.chunk
        if next_tokens < self.lengths[candidate]:
            self.engines[self.engine_of[candidate]].report_at(candidate, next_tokens)
