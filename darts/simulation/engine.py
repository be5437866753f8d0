"""One engine as discrete events: its running sequences get one token per step, and a step takes `PTL(running)`.

Contract: pure. Whoever owns the engines keeps the time and calls in its order; between two calls nothing changes.

1. At most `slots` sequences run; the others wait, and start in the order in which they were submitted.
2. Progress is fluid: an engine that is stopped within a step has done a part of it. Only what leaves on another
   engine's event, or late, sees parts; a sequence's tokens are the whole steps it has seen.
3. What leaves frees its slot at once; `fill` gives it to the next in the queue.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence

WAITING, RUNNING, LEFT = 0, 1, 2
NEVER = math.inf


class Engine:
    """The sequences of one engine.

    Args:
        step_seconds: PTL(b) for b = 0, 1, ..., as far as may run at once; 0.0 for 0.
        slots: sequences that run at once, `max_num_seqs`.

    Example:
        >>> engine = Engine([0.0, 1.0, 1.5], slots=2)
        >>> engine.submit(7, 10)
        >>> engine.fill(0.0)
        [7]
        >>> engine.next_event()
        10.0
    """

    __slots__ = ("_events", "_now", "_queue", "_seconds", "_slots", "_state", "_step_s", "_steps", "began", "running")

    def __init__(self, step_seconds: Sequence[float], slots: int) -> None:
        self._seconds = step_seconds
        self._slots = slots
        self._queue: deque[tuple[int, int, int]] = deque()  # (number, sequence, its tokens)
        # (-step, -number, -sequence, whether it ends then), sorted: the next comes last. Nearly all are there from the
        # start, and a list is faster for these than a heap.
        self._events: list[tuple[float, int, int, bool]] = []
        self._state: dict[int, int] = {}
        self._now = 0.0
        self._steps = 0.0  # done until `_now`
        self._step_s = 0.0
        self.began: dict[int, tuple[float, float]] = {}  # sequence -> (step, time) at its start
        self.running = 0

    def submit(self, sequence: int, tokens: int) -> None:
        """A sequence of so many tokens joins the queue."""
        self._queue.append((len(self._state), sequence, tokens))
        self._state[sequence] = WAITING

    @property
    def waits(self) -> bool:
        """Whether a sequence may wait for a slot."""
        return bool(self._queue)

    def fill(self, now: float) -> list[int]:
        """Free slots go to the queue; returns the sequences that start."""
        queue, state, started = self._queue, self._state, []
        while queue and self.running + len(started) < self._slots:
            queue_number, sequence, tokens = queue.popleft()
            if state[sequence] == WAITING:
                if not started:
                    self._advance(now)
                state[sequence] = RUNNING
                self.began[sequence] = self._steps, now
                insort(self._events, (-self._steps - tokens, -queue_number, -sequence, True))
                started.append(sequence)
        if started:
            self._resize(self.running + len(started))
        return started

    def report_at(self, sequence: int, tokens: int) -> None:
        """An event once a running sequence has so many tokens."""
        insort(self._events, (-self.began[sequence][0] - tokens, 1, -sequence, False))

    def next_event(self) -> float:
        """When the next sequence ends or is to be reported; infinite without any."""
        own_events, state = self._events, self._state
        while own_events and state[-own_events[-1][2]] == LEFT:
            own_events.pop()
        return self._now + (-own_events[-1][0] - self._steps) * self._step_s if own_events else NEVER

    def pop_event(self, now: float) -> tuple[int, bool]:
        """The event that `next_event` announced for `now`: the sequence, and whether it has ended, and left."""
        minus_step, _, sequence, has_ended = self._events.pop()
        sequence = -sequence
        self._now, self._steps = now, -minus_step  # exactly, without what floats lose
        if has_ended:
            self._state[sequence] = LEFT
            self.running -= 1  # as `_resize`, which takes longer; the most frequent event
            self._step_s = self._seconds[self.running]
        return sequence, has_ended

    def tokens(self, sequence: int, now: float) -> int:
        """Whole tokens that a sequence has so far; 0 while it waits."""
        if sequence not in self.began:
            return 0
        steps_done = self._steps + ((now - self._now) / self._step_s if self._step_s else 0.0)
        return math.floor(steps_done - self.began[sequence][0] + 1e-6)  # floats may fall just short of a whole step

    def leave(self, sequence: int, now: float) -> int:
        """A sequence is stopped, or gives up waiting; returns its tokens."""
        self._advance(now)
        tokens_done = self.tokens(sequence, now)
        if self._state[sequence] == RUNNING:
            self._resize(self.running - 1)
        self._state[sequence] = LEFT
        return tokens_done

    def _advance(self, now: float) -> None:
        if now > self._now:
            if self._step_s:
                self._steps += (now - self._now) / self._step_s
            self._now = now

    def _resize(self, running: int) -> None:
        self.running = running
        self._step_s = self._seconds[running]
