"""The candidates of one prompt as a state machine: lengths as they grow in, the decision out.

Contract: pure, no clock, no I/O and no randomness. The agent-loop worker that runs the candidates owns one
`CandidateGroup` per prompt.

Every candidate runs until it ends, once: by `finish` (by itself, or at the length limit), by `stop` (aborted, with what
it had) or by `lose` (without a usable response, though nobody asked). Every event answers which candidates to abort
now; each is named once.

1. The group is complete when no candidate runs that could still be kept; then, and only then, `kept` is defined, and it
   never changes. Aborted candidates may still be on their way out.
2. `kept` holds exactly `num_keep` candidates: what `darts.selection.select` gives for those that finished before they
   were asked to abort, but for one of rule 6. An aborted candidate is never kept, even if it finished before the abort
   reached it.
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
6. `keep_probability` p > 0 (our choice, beyond the paper; shortest-only groups): whom rule 3 drops may be kept by
   chance, so that sums over all candidates can be estimated without bias from the kept.
   - The losers are the candidates that rule 3 drops, but for those that get lost before. They are numbered from 0: who
     is to be aborted, when that is decided; who has finished, at the end; both by index. The one with the number
     floor(draw / p) is spared, if it exists: it runs to its end, the group waits for it, and it is kept, truncated or
     not, in the place of the longest that the rule chose. Nothing else changes: what a spared candidate does has no
     influence on who is dropped. So with R losers each is spared with probability p, and none with 1 - p R.
   - `weights` are the inverse probabilities to be kept (Horvitz-Thompson): 1 / p of a spared one; else 1 / (1 - p R) of
     the longest that the rule chose; 1 of the others, which are kept whatever is drawn. So for any f the expectation of
     sum(weight x f) over the kept, as `draw` varies, is sum(f) over all `population` = M + R candidates: exactly, in
     every mode, whatever the candidates do, filled groups included. Only f must not depend on `draw`; nor must it
     depend on `draw` whether the group is abandoned, which a rollout that ends with its first prompts does not grant.
   - A spared candidate that gets lost has no f. The longest is kept after all, with weight 0, since the other draws
     count it once already: the sum is that over the candidates that do not get lost when they run to their end.
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
        keep_probability: p, chance of a loser of a shortest-only group to be kept; 0: none is. See the contract.
        draw: uniform in [0, 1), drawn by the caller for this group alone; without p it does not matter.

    Raises:
        ValueError: `num_keep` below 1, fewer candidates than that, `num_long` outside [0, num_keep), an unknown mode,
            p negative or not below 1 over the number of candidates that are not kept, or `draw` outside [0, 1).

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
        keep_probability: float = 0.0,
        draw: float = 0.0,
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
        most = num_candidates - num_keep
        if not (0 <= keep_probability < math.inf and keep_probability * most < 1):
            raise ValueError(
                f"keep_probability={keep_probability}: must be at least 0, and below 1 in all over the {most} "
                "candidates that are not kept."
            )
        if not 0 <= draw < 1:
            raise ValueError(f"draw={draw}: must lie in [0, 1).")
        self.num_keep = num_keep
        self.num_long = num_long
        self.early_stop = early_stop
        self.long_wait = long_wait
        self.keep_probability = 0.0 if num_long else keep_probability
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
        self._weights: list[float] = []  # of the kept
        self._abandoned = False
        # Who gets this number is spared; nobody gets one of M' - M or above.
        self._lucky = int(min(draw / keep_probability, most)) if self.keep_probability else most
        self._losers = 0  # numbered so far
        self._spared: int | None = None

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

    @property
    def weights(self) -> list[float]:
        """How many candidates each of the kept stands for, in the order of `kept`; 1 each without p.

        Raises:
            RuntimeError: the group is not complete.
        """
        self._decided()
        return list(self._weights)

    @property
    def population(self) -> int:
        """How many candidates the weights add up to in expectation: M, and with p the losers besides.

        It does not depend on `draw`.

        Raises:
            RuntimeError: the group is not complete.
        """
        self._decided()
        return self.num_keep + self._losers

    @property
    def spared(self) -> int | None:
        """The loser that is kept by chance, or is to be as soon as it ends; None if there is none, or it got lost."""
        return None if self._spared in self._lost else self._spared

    def chance(self, index: int) -> float:
        """How likely candidate `index` is kept, in [0, 1] (our choice).

        1 is certain, unless the rollout ends without the group; so is 0, except that a truncated candidate may fill a
        group with too few valid ones.
        """
        if self._kept is not None:
            return float(index in self._kept)
        if self._abandoned or index in self._aborted or index in self._lost:
            return 0.0
        if index == self._spared:
            return 0.9  # it may get lost
        # With p, a loser may take the last place.
        last_open = self._spared is not None or self._lucky < self._most_losers()
        luck = min(0.9, 1 / self._most_losers()) if last_open and self._spared is None else 0.0
        if index in self._truncated:
            return luck
        num_short = self.num_keep - self.num_long
        if index in self._running:
            places = max(num_short - len(self._valid), 0) + self.num_long
            return min(0.9, max(places, 0.5) / len(self._wanted))
        end = (self._lengths[index], index)
        shorter = bisect_left(self._valid, end)
        if shorter >= num_short and len(self._valid) - 1 - shorter >= self.num_long:
            return luck
        may_be_shorter = sum((self._lengths[other], other) < end for other in self._wanted if other != self._spared)
        if shorter + may_be_shorter < num_short - last_open and not (last_open and len(self._valid) < num_short):
            return 1.0  # one of a group that may be filled could be the longest
        if last_open and shorter == num_short - 1:
            return max(luck, 0.1)
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

    def _most_losers(self) -> int:
        """Losers that are still possible, with those that there are."""
        return len(self._lengths) - self.num_keep - len(self._lost - self._aborted)

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
            if self.keep_probability:
                losers = self._without_spared(losers)
        return self._abort(losers)

    def _without_spared(self, losers: list[int]) -> list[int]:
        """Numbers losers that are not numbered yet, and leaves out the one that is spared."""
        losers = [index for index in losers if index != self._spared]
        place = self._lucky - self._losers
        self._losers += len(losers)
        if 0 <= place < len(losers):
            self._spared = losers.pop(place)
        return losers

    def _abort(self, losers: list[int]) -> list[int]:
        if losers:
            self._aborted.update(losers)
            self._wanted.difference_update(losers)
        if not self._wanted:
            self._complete()
        return losers

    def _complete(self) -> None:
        pool = [index for index in self._usable() if index != self._spared]
        cut = [index in self._truncated for index in pool]
        chosen = select([self._lengths[index] for index in pool], self.num_keep, self.num_long, cut)
        kept = [pool[position] for position in chosen]
        weights = [1.0] * self.num_keep
        if self.keep_probability:
            self._without_spared(sorted(set(pool).difference(kept)))
            if self._spared is None:
                weights[-1] = 1 / (1 - self.keep_probability * self._losers)
            elif self._spared in self._lost:
                weights[-1] = 0.0
            else:
                kept[-1], weights[-1] = self._spared, 1 / self.keep_probability
            by_length = sorted(range(self.num_keep), key=lambda place: (self._lengths[kept[place]], kept[place]))
            kept, weights = [kept[place] for place in by_length], [weights[place] for place in by_length]
        self._kept, self._weights = kept, weights

    def _flags(self, members: set[int]) -> list[bool]:
        return [index in members for index in range(len(self._lengths))]
