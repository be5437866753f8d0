"""The candidates of one prompt as a state machine: lengths as they grow in, the decision out.

Contract: pure, no clock, no I/O and no randomness. The agent-loop worker that runs the candidates owns one
`CandidateGroup` per prompt.

Every candidate runs until it ends, once: by `finish` (by itself, or at the length limit), by `stop` (aborted, with what
it had) or by `lose` (without a usable response, though nobody asked). Every event answers which candidates to abort
now; each is named once.

1. The group is complete when no candidate runs that could still be kept; then, and only then, `kept` is defined, and it
   never changes. Aborted candidates may still be on their way out.
2. `kept` holds exactly `num_keep` candidates: what `darts.selection.select` gives for those that finished before they
   were asked to abort. An aborted candidate is never kept, even if it finished before the abort reached it.
3. Shortest-only (`num_long` = 0), `early_stop`:
   - `eager` (paper, "proactive early stopping"): once M valid candidates have finished, the others are aborted;
   - `exact` (our choice): only those are aborted that can no longer be among the M shortest, whatever they become, so
     the kept are those of a run without early stop;
   - `off`: the group waits for every candidate.
4. Dual-end, `long_wait`:
   - `all` (the paper): the group waits for every candidate;
   - `deadline` (our choice): the group is `ready` once M valid candidates have finished, and `deadline()` aborts the
     others. Whoever owns the batch calls it when every group is ready or complete.
5. `abandon()` (our choice): the rollout is over without this group. What runs is aborted; the group never becomes
   complete, and every later event is accepted and answers [].
"""

import math
from bisect import bisect_left, insort
from collections.abc import Collection

from darts.selection import select

EARLY_STOP = ("eager", "exact", "off")
LONG_WAIT = ("all", "deadline")


class CandidateGroup:
    """Records the candidates of one prompt; decides which are aborted and which are kept.

    Args:
        num_candidates: M'_i, candidates that were launched.
        num_keep: M, candidates that are trained on.
        num_long: L, how many of the kept are the longest; 0 is shortest-only.
        early_stop: what a shortest-only group aborts; see the module's contract.
        long_wait: what a dual-end group waits for; see the module's contract.

    Raises:
        ValueError: `num_keep` below 1, fewer candidates than that, `num_long` outside [0, num_keep), an unknown mode.

    Example:
        >>> group = CandidateGroup(3, num_keep=2, num_long=0, early_stop="eager")
        >>> group.finish(1, 40, truncated=False)
        []
        >>> group.finish(0, 60, truncated=False)
        [2]
        >>> group.kept
        [1, 0]
    """

    def __init__(
        self,
        num_candidates: int,
        num_keep: int,
        num_long: int,
        early_stop: str = "off",
        long_wait: str = "all",
    ) -> None:
        if num_keep < 1:
            raise ValueError(f"num_keep={num_keep}: must be at least 1.")
        if num_candidates < num_keep:
            raise ValueError(f"num_candidates={num_candidates}: must be at least num_keep={num_keep}.")
        if not 0 <= num_long < num_keep:
            raise ValueError(f"num_long={num_long}: must lie in [0, num_keep={num_keep}).")
        if early_stop not in EARLY_STOP:
            raise ValueError(f"early_stop={early_stop!r}: must be one of {', '.join(EARLY_STOP)}.")
        if long_wait not in LONG_WAIT:
            raise ValueError(f"long_wait={long_wait!r}: must be one of {', '.join(LONG_WAIT)}.")
        self.num_keep = num_keep
        self.num_long = num_long
        self.early_stop = early_stop
        self.long_wait = long_wait
        self._stops = num_long == 0 and early_stop != "off"
        self._exact = num_long == 0 and early_stop == "exact"
        self._lengths = [0] * num_candidates
        self._running = set(range(num_candidates))
        self._wanted = set(range(num_candidates))  # run, and were not asked to abort
        self._aborted: set[int] = set()  # asked to abort
        self._stopped: set[int] = set()
        self._lost: set[int] = set()
        self._truncated: set[int] = set()
        self._arrival: list[int] = []
        self._valid: list[tuple[int, int]] = []  # (length, index) of those that ended by themselves, sorted
        self._kept: list[int] | None = None
        self._abandoned = False

    def progress(self, index: int, length: int) -> list[int]:
        """Candidate `index` has `length` tokens so far. A report about one that has ended changes nothing.

        Raises:
            ValueError: an unknown candidate, or a negative length.
        """
        self._check(index, length, at_least=0)
        if index not in self._running or length <= self._lengths[index]:
            return []
        self._lengths[index] = length
        return self._decide([index]) if self._exact and index in self._wanted else []

    def finish(self, index: int, length: int, truncated: bool) -> list[int]:
        """Candidate `index` ended after `length` tokens (end token included); `truncated` at the length limit.

        Raises:
            ValueError: an unknown candidate, one that has ended already, or a length below 1.
        """
        self._check(index, length, at_least=1)
        self._end(index, length)
        self._arrival.append(index)
        if truncated:
            self._truncated.add(index)
        elif index not in self._aborted:
            insort(self._valid, (length, index))
        return self._decide(self._wanted)

    def stop(self, index: int, length: int) -> list[int]:
        """Candidate `index`, which was asked to abort, ended with `length` tokens.

        Raises:
            ValueError: an unknown candidate, one that has ended already or that nobody aborted, or a negative length.
        """
        self._check(index, length, at_least=0)
        if index not in self._aborted:
            raise ValueError(f"candidate {index}: stopped, but it was not asked to; report it by lose().")
        self._end(index, length)
        self._stopped.add(index)
        return []

    def lose(self, index: int, length: int) -> list[int]:
        """Candidate `index` ended with `length` tokens that cannot be used; the group goes on with the others.

        Raises:
            ValueError: an unknown candidate, one that has ended already, a negative length; or too few are left, and
                the group is of no more use.
        """
        self._check(index, length, at_least=0)
        self._end(index, length)
        self._lost.add(index)
        left = len(self._usable()) + len(self._wanted)
        if self._kept is None and not self._abandoned and left < self.num_keep:
            raise ValueError(f"{len(self._lost)} candidates were lost, {left} are left: {self.num_keep} are needed.")
        return self._decide(self._wanted)

    def deadline(self) -> list[int]:
        """A ready group waits no longer: what still runs is to be aborted.

        Raises:
            ValueError: the group is neither ready, nor complete, nor abandoned.
        """
        if self._kept is not None or self._abandoned:
            return []
        if not self.ready:
            raise ValueError(
                f"{len(self._valid)} valid candidates have finished (num_long={self.num_long}, "
                f"long_wait={self.long_wait}): the deadline falls for a dual-end group with num_keep={self.num_keep}."
            )
        return self._abort(sorted(self._wanted))

    def abandon(self) -> list[int]:
        """The rollout is over without this group: what still runs is to be aborted, nothing is ever kept.

        Nothing happens where the group is complete: what it keeps is kept.
        """
        if self._kept is not None or self._abandoned:
            return []
        self._abandoned = True
        losers = sorted(self._wanted)
        self._aborted.update(losers)
        self._wanted.clear()
        return losers

    @property
    def ready(self) -> bool:
        """Whether a deadline may fall: a dual-end group that does not wait for all, with M valid candidates."""
        waits = self.num_long > 0 and self.long_wait == "deadline"
        return waits and not self._abandoned and len(self._valid) >= self.num_keep

    @property
    def complete(self) -> bool:
        """Whether `kept` is decided."""
        return self._kept is not None

    @property
    def abandoned(self) -> bool:
        """Whether the group was given up before it was complete."""
        return self._abandoned

    @property
    def ended(self) -> bool:
        """Whether no candidate runs any more, aborted ones included."""
        return not self._running

    @property
    def lengths(self) -> list[int]:
        """Generated tokens by candidate, as far as known."""
        return list(self._lengths)

    @property
    def truncated(self) -> list[bool]:
        """Which candidates filled the response budget without ending."""
        return self._flags(self._truncated)

    @property
    def stopped(self) -> list[bool]:
        """Which candidates were aborted and did stop: their length is that of a part."""
        return self._flags(self._stopped)

    @property
    def lost(self) -> list[bool]:
        """Which candidates ended without a usable response."""
        return self._flags(self._lost)

    @property
    def arrival(self) -> list[int]:
        """Candidates in the order in which they finished; without stopped and lost ones."""
        return list(self._arrival)

    @property
    def kept(self) -> list[int]:
        """The kept candidates, ordered by length.

        Raises:
            RuntimeError: the group is not complete.
        """
        return list(self._decided())

    def keeps(self, index: int) -> bool:
        """Whether candidate `index` is kept.

        Raises:
            RuntimeError: the group is not complete.
        """
        return index in self._decided()

    def chance(self, index: int) -> float:
        """How likely candidate `index` is kept, in [0, 1] (our choice).

        1 is certain, unless the rollout ends without the group; so is 0, except that a truncated candidate may fill a
        group with too few valid ones.
        """
        if self._kept is not None:
            return float(index in self._kept)
        if self._abandoned or index in self._aborted | self._lost | self._truncated:
            return 0.0
        num_short = self.num_keep - self.num_long
        if index in self._running:
            places = max(num_short - len(self._valid), 0) + self.num_long
            return min(0.9, max(places, 0.5) / len(self._wanted))
        end = (self._lengths[index], index)
        shorter = bisect_left(self._valid, end)
        if shorter >= num_short and len(self._valid) - 1 - shorter >= self.num_long:
            return 0.0
        may_be_shorter = sum((self._lengths[other], other) < end for other in self._wanted)
        if shorter + may_be_shorter < num_short:
            return 1.0
        return 0.9 if shorter < num_short else max(self.num_long, 0.5) / (self.num_long + 1 + len(self._wanted))

    @property
    def num_valid(self) -> int:
        """Finished candidates that ended by themselves, before they were asked to abort."""
        return len(self._valid)

    def _check(self, index: int, length: int, at_least: int) -> None:
        if not 0 <= index < len(self._lengths):
            raise ValueError(f"candidate {index}: this group has candidates 0 to {len(self._lengths) - 1}.")
        if not at_least <= length < math.inf:
            raise ValueError(f"candidate {index}: length={length}; must be finite and at least {at_least}.")

    def _end(self, index: int, length: int) -> None:
        if index not in self._running:
            raise ValueError(f"candidate {index}: ended twice; each candidate ends once.")
        self._running.remove(index)
        self._wanted.discard(index)
        self._lengths[index] = length

    def _usable(self) -> list[int]:
        """Candidates that finished and were not asked to abort."""
        return sorted(set(self._arrival) - self._aborted)

    def _decided(self) -> list[int]:
        if self._kept is None:
            state = "abandoned" if self._abandoned else "not decided yet"
            raise RuntimeError(f"{len(self._arrival)} of {len(self._lengths)} candidates have finished; {state}.")
        return self._kept

    def _decide(self, changed: Collection[int]) -> list[int]:
        """Which of the `changed`, who all run, to abort; completes the group if nothing that it needs runs any more."""
        if self._kept is not None or self._abandoned:
            return []
        losers: list[int] = []
        if self._stops and changed and len(self._valid) >= self.num_keep:
            losers = sorted(changed)
            if self._exact:
                # One that has grown to this length ends there or later, and ties go to the lower index.
                last = self._valid[self.num_keep - 1]
                losers = [index for index in losers if (self._lengths[index], index) > last]
        return self._abort(losers)

    def _abort(self, losers: list[int]) -> list[int]:
        if losers:
            self._aborted.update(losers)
            self._wanted.difference_update(losers)
        if not self._wanted:
            self._complete()
        return losers

    def _complete(self) -> None:
        pool = self._usable()
        cut = [index in self._truncated for index in pool]
        chosen = select([self._lengths[index] for index in pool], self.num_keep, self.num_long, cut)
        self._kept = [pool[position] for position in chosen]

    def _flags(self, members: set[int]) -> list[bool]:
        return [index in members for index in range(len(self._lengths))]
