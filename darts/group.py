"""The candidates of one prompt as a state machine: lengths as they grow in, the decision out.

Contract: pure, no clock, no I/O and no randomness. The agent-loop worker that runs the candidates owns one
`CandidateGroup` per prompt, by the `GroupRules` that the settings make for its budget (`DartsConfig.group_rules`).

Every candidate has a `State`. It runs until it ends, once: by `finish` (by itself, or at the length limit), by `stop`
(aborted, with what it had) or by `lose` (without a usable response, though nobody asked). Every event answers which
candidates to abort now; each is named once.

1. The group is complete when no candidate runs that could still be kept; then, and only then, `kept` is defined, and it
   never changes. Aborted candidates that are not needed may still be on their way out.
2. `kept` holds exactly `num_keep` candidates: what `darts.selection.select` gives for those that finished before they
   were asked to abort. An aborted candidate is never kept, even if it finished before the abort reached it, but where
   the long end is cut (4): then one that so finished is as good as the others.
3. Shortest-only (`num_long` = 0), `early_stop`:
   - `eager` (paper, "proactive early stopping"): once M valid candidates have finished, the others are aborted;
   - `exact` (our choice): only those are aborted that can no longer be among the M shortest, whatever they become, so
     the kept are those of a run without early stop;
   - `off`: the group waits for every candidate.
4. Dual-end. The group is settled once M candidates are there that may be kept: valid ones, and as the long end, which
   are at most L, what `long_end` allows (our choice): `finished` (the paper) nothing else, `truncated` those at the
   length limit, `cut` also those that run and have a token. `long_wait`:
   - `all` (the paper): the group waits for every candidate;
   - `deadline` (our choice): `deadline()` says that the group waits no longer than until it is settled, and aborts then
     what runs. Whoever owns the batch calls it when enough groups are `ready`, which is settled before the deadline;
   - `none` (our choice): it never waits longer than that.
   With `cut` the group is complete when what was aborted has ended, and keeps the longest of it with what they have.
   One that is on `hold`, between two requests, has nothing to be stopped with: it is not counted, and not kept.
5. `abandon()` (our choice): the rollout is over without this group. What runs is aborted; the group never becomes
   complete, and every later event is accepted and answers [].
"""

import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from darts.pool import State
from darts.selection import LONG_END, check_counts, select

EARLY_STOP = ("eager", "exact", "off")
LONG_WAIT = ("all", "deadline", "none")
DUE_SHARE = 0.95
"""Share of the groups that are settled when a deadline falls (our choice)."""
LIKELY = 0.9
"""Chance of a candidate that is kept unless the others surprise (our choice)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRules:
    """What a group keeps, stops and waits for.

    Raises:
        ValueError: `num_keep` below 1, `num_long` outside [0, num_keep), an unknown mode.

    Example:
        >>> GroupRules(num_keep=8, num_long=1, long_wait="deadline").awaits_deadline
        True
    """

    num_keep: int  # M, candidates that are trained on
    num_long: int = 0  # L, how many of the kept are the longest; 0 is shortest-only
    early_stop: str = "off"  # what a shortest-only group aborts; see the module's contract
    long_wait: str = "all"  # what a dual-end group waits for; see the module's contract
    long_end: str = "finished"  # what the longest of a dual-end group may be; see the module's contract

    def __post_init__(self) -> None:
        check_counts(self.num_keep, self.num_long)
        for name, modes in (("early_stop", EARLY_STOP), ("long_wait", LONG_WAIT), ("long_end", LONG_END)):
            if (mode := getattr(self, name)) not in modes:
                raise ValueError(f"{name}={mode!r}: must be one of {', '.join(modes)}.")

    @property
    def stops_early(self) -> bool:
        """Whether candidates are aborted once M valid ones have finished."""
        return self.num_long == 0 and self.early_stop != "off"

    @property
    def stops_when_settled(self) -> bool:
        """Whether candidates are aborted as soon as enough are there, whatever the other groups do."""
        return self.stops_early or (self.num_long > 0 and self.long_wait == "none")

    @property
    def follows_growth(self) -> bool:
        """Whether a report of progress may decide something."""
        return self.num_long == 0 and self.early_stop == "exact"

    @property
    def awaits_deadline(self) -> bool:
        """Whether the group may be `ready` before it is complete."""
        return self.num_long > 0 and self.long_wait == "deadline"

    @property
    def cuts(self) -> bool:
        """Whether candidates that were aborted may be kept with what they have."""
        return self.num_long > 0 and self.long_wait != "all" and self.long_end == "cut"


def num_due(num_groups: int) -> int:
    """How many groups of a batch must be settled for a deadline to fall: all but a few, so that no hard prompt holds up
    the others (our choice). Those that are not go on until they are.

    Example:
        >>> num_due(512), num_due(8), num_due(1)
        (486, 7, 1)
    """
    return max(min(num_groups - 1, math.floor(DUE_SHARE * num_groups)), 1)


class CandidateGroup:
    """Records the candidates of one prompt; decides which are aborted and which are kept.

    Args:
        num_candidates: M'_i, candidates that were launched.
        rules: what is kept, stopped and waited for.

    Raises:
        ValueError: fewer candidates than `rules.num_keep`.

    Example:
        >>> group = CandidateGroup(3, GroupRules(num_keep=2, early_stop="eager"))
        >>> group.finish(1, 40, truncated=False)
        []
        >>> group.finish(0, 60, truncated=False)
        [2]
        >>> group.kept
        [1, 0]
    """

    def __init__(self, num_candidates: int, rules: GroupRules) -> None:
        if num_candidates < rules.num_keep:
            raise ValueError(f"num_candidates={num_candidates}: must be at least num_keep={rules.num_keep}.")
        self.rules = rules
        # These four are for reading, and change as the group does.
        self.states = [State.RUNNING] * num_candidates  # what each candidate does, or how it ended
        self.lengths = [0] * num_candidates  # generated tokens by candidate, as far as known
        self.arrival: list[int] = []  # candidates in the order in which they finished; without stopped and lost ones
        self.on_hold = [False] * num_candidates  # whether a candidate is between two requests, see `hold`
        # (length, index), sorted, of those that ended by themselves before they were asked to abort, or may be kept all
        # the same. Where they may not nobody is asked before the group is settled, so a truncated one that comes later
        # never fills it.
        self._valid: list[tuple[int, int]] = []
        self._kept: list[int] | None = None
        self._waits = rules.num_long > 0 and rules.long_wait != "none"  # for more than to be settled
        self.abandoned = False
        """Whether the group was given up before it was complete."""

    def progress(self, index: int, length: int) -> list[int]:
        """Candidate `index` has `length` tokens so far. A report about one that has ended changes nothing.

        Raises:
            ValueError: an unknown candidate, or a negative length.
        """
        self._check(index, length, at_least=0)
        if self.states[index].ended or length <= self.lengths[index]:
            return []
        is_first, self.lengths[index] = self.lengths[index] == 0, length
        is_running = self.states[index] is State.RUNNING
        decides = self.rules.follows_growth or (is_first and self.rules.cuts)
        return self._decide(index) if is_running and decides else []

    def hold(self, index: int, held: bool, length: int | None = None) -> list[int]:
        """Candidate `index` is between two requests, or, with `held` false, has begun the next one.

        Args:
            index: of the candidate.
            held: whether it has no request.
            length: tokens that it has left, where those of a request were given up; None: all that are known.

        Raises:
            ValueError: an unknown candidate, or a negative length.
        """
        self._check(index, length or 0, at_least=0)
        self.on_hold[index] = held
        self.lengths[index] = self.lengths[index] if length is None else length
        return self._decide() if self.rules.cuts and not held else []

    def finish(self, index: int, length: int, truncated: bool) -> list[int]:
        """Candidate `index` ended after `length` tokens (end token included); `truncated` at the length limit.

        Raises:
            ValueError: an unknown candidate, one that has ended already, or a length below 1.
        """
        self._check(index, length, at_least=1, running=True)
        if not truncated and (self.rules.cuts or self.states[index] is State.RUNNING):
            insort(self._valid, (length, index))
        self.arrival.append(index)
        self.states[index], self.lengths[index] = State.TRUNCATED if truncated else State.FINISHED, length
        return self._decide()

    def stop(self, index: int, length: int) -> list[int]:
        """Candidate `index`, which was asked to abort, ended with `length` tokens.

        Raises:
            ValueError: an unknown candidate, one that has ended already or that nobody aborted, or a negative length.
        """
        self._check(index, length, at_least=0, running=True)
        if self.states[index] is not State.ABORTING:
            raise ValueError(f"candidate {index}: stopped, but it was not asked to; report it by lose().")
        self.states[index], self.lengths[index] = State.STOPPED, length
        return self._decide()

    def lose(self, index: int, length: int) -> list[int]:
        """Candidate `index` ended with `length` tokens that cannot be used; the group goes on with the others.

        Raises:
            ValueError: an unknown candidate, one that has ended already, a negative length; or too few are left, and
                the group is of no more use.
        """
        self._check(index, length, at_least=0, running=True)
        num_lost = len(self._all(State.LOST)) + 1
        still_possible = {*self._all(State.TRUNCATED, State.RUNNING), *(self._cut if self.rules.cuts else ())}
        num_left = len(self._valid) + len(still_possible - {index})
        if not self._decided and num_left < self.rules.num_keep:
            raise ValueError(f"{num_lost} candidates were lost, {num_left} are left: {self.rules.num_keep} are needed.")
        self.states[index], self.lengths[index] = State.LOST, length
        return self._decide()

    def deadline(self) -> list[int]:
        """A dual-end group waits no longer than until it is settled: what runs then is to be aborted."""
        self._waits &= not self.rules.awaits_deadline
        return self._decide()

    def abandon(self) -> list[int]:
        """The rollout is over without this group: what runs is to be aborted. A complete one keeps what it has."""
        if self._decided:
            return []
        self.abandoned = True
        return self._abort(self._all(State.RUNNING))

    @property
    def settled(self) -> bool:
        """Whether a dual-end group has M candidates that may be kept."""
        num_long, long_end = self.rules.num_long, self.rules.long_end
        num_others = 0 if long_end == "finished" else len(self._all(State.TRUNCATED))
        if self.rules.cuts:
            num_others += sum(self._can_be_cut(index) for index in self._all(State.RUNNING))
        return num_long > 0 and len(self._valid) + min(num_long, num_others) >= self.rules.num_keep

    @property
    def ready(self) -> bool:
        """Whether the group waits for nothing but the deadline."""
        return self._waits and self.rules.awaits_deadline and not self._decided and self.settled

    @property
    def complete(self) -> bool:
        """Whether `kept` is decided."""
        return self._kept is not None

    @property
    def ended(self) -> bool:
        """Whether no candidate runs any more, aborted ones included."""
        return all(state.ended for state in self.states)

    @property
    def kept(self) -> list[int]:
        """The kept candidates, ordered by length; a `RuntimeError` where the group is not complete."""
        if self._kept is None:
            phase = "abandoned" if self.abandoned else "not decided yet"
            raise RuntimeError(f"{len(self.arrival)} of {len(self.lengths)} candidates have finished; {phase}.")
        return list(self._kept)

    def keeps(self, index: int) -> bool:
        """Whether candidate `index` is kept; a `RuntimeError` where the group is not complete."""
        return index in self.kept

    def chance(self, index: int) -> float:
        """How likely candidate `index` is kept, in [0, 1] (our choice).

        1 is certain, unless the rollout ends without the group; so is 0, except that a truncated candidate may fill a
        group with too few valid ones.
        """
        num_long, num_short = self.rules.num_long, self.rules.num_keep - self.rules.num_long
        own_end, num_valid = (self.lengths[index], index), len(self._valid)
        num_shorter, num_longer = bisect_left(self._valid, own_end), num_valid - bisect_right(self._valid, own_end)
        running, cut = self._all(State.RUNNING), self._cut if self.rules.cuts else []
        may_be_valid = running + (self._all(State.ABORTING) if self.rules.cuts else [])
        may_be_shorter = sum((self.lengths[other], other) < own_end for other in may_be_valid)
        num_longer_cut = sum((self.lengths[other], other) > own_end for other in cut)
        open_places = max(num_short - num_valid, 0) + num_long
        takes_truncated = num_long > 0 and self.rules.long_end != "finished"
        chance_table = (  # what holds of it, and how likely it is kept then; the first row that holds counts
            (self.complete, float(index in (self._kept or ()))),
            (self.abandoned, 0.0),
            (self.states[index] is State.RUNNING, min(LIKELY, max(open_places, 0.5) / max(len(running), 1))),
            (index in cut and num_longer_cut < num_long, LIKELY),
            (index in cut or index in may_be_valid, (1 - LIKELY) / 2),  # the row of those that run stands above
            (takes_truncated and self.states[index] is State.TRUNCATED, LIKELY),
            (num_shorter + num_longer == num_valid, 0.0),  # is not valid: aborted, lost or truncated
            (num_shorter >= num_short and num_longer >= num_long, 0.0),
            (num_shorter + may_be_shorter < num_short, 1.0),
            (num_shorter < num_short, LIKELY),
            (True, max(num_long, 0.5) / (num_long + 1 + len(running) + len(cut))),  # may be among the longest
        )
        return next(chance for row_holds, chance in chance_table if row_holds)

    @property
    def num_valid(self) -> int:
        """Finished candidates that ended by themselves, before they were asked to abort."""
        return len(self._valid)

    @property
    def _decided(self) -> bool:
        return self._kept is not None or self.abandoned

    @property
    def _cut(self) -> list[int]:
        """Those that were stopped, or are about to be, and have something to be kept."""
        return [index for index in self._all(State.ABORTING, State.STOPPED) if self._can_be_cut(index)]

    def _can_be_cut(self, index: int) -> bool:
        return self.lengths[index] > 0 and not self.on_hold[index]

    def _all(self, *states: State) -> list[int]:
        return [index for index, state in enumerate(self.states) if state in states]

    def _check(self, index: int, length: int, at_least: int, running: bool = False) -> None:
        if not 0 <= index < len(self.lengths):
            raise ValueError(f"candidate {index}: this group has candidates 0 to {len(self.lengths) - 1}.")
        if not at_least <= length < math.inf:
            raise ValueError(f"candidate {index}: length={length}; must be finite and at least {at_least}.")
        if running and self.states[index].ended:
            raise ValueError(f"candidate {index}: ended twice; each candidate ends once.")

    def _decide(self, grown: int | None = None) -> list[int]:
        """Which of those that run to abort; completes the group if nothing that it needs runs any more.

        Where one has `grown` and nobody has ended, nothing has changed for the others.
        """
        if self._decided:
            return []
        losers: list[int] = []
        if self.rules.stops_early and len(self._valid) >= self.rules.num_keep:
            # One that has grown to this length ends there or later, and ties go to the lower index.
            last_needed = self._valid[self.rules.num_keep - 1]
            is_exact = self.rules.follows_growth
            running = self._all(State.RUNNING) if grown is None else [grown]
            losers = [index for index in running if not is_exact or (self.lengths[index], index) > last_needed]
        elif not self._waits and self.settled:
            losers = self._all(State.RUNNING)
        return self._abort(losers)

    def _abort(self, losers: list[int]) -> list[int]:
        for index in losers:
            self.states[index] = State.ABORTING
        awaited_states = (State.RUNNING, State.ABORTING) if self.rules.cuts else (State.RUNNING,)
        if not self.abandoned and not self._all(*awaited_states):
            self._choose()
        return losers

    def _choose(self) -> None:
        """Decides who is kept."""
        cut = self._cut if self.rules.cuts else []
        usable_candidates = sorted([index for _, index in self._valid] + self._all(State.TRUNCATED) + cut)
        chosen_positions = select(
            [self.lengths[index] for index in usable_candidates],
            self.rules.num_keep,
            self.rules.num_long,
            [self.states[index] is State.TRUNCATED for index in usable_candidates],
            long_end=self.rules.long_end,
            cut=[index in cut for index in usable_candidates],
        )
        self._kept = [usable_candidates[position] for position in chosen_positions]
        for index in set(cut).intersection(self._kept):
            self.states[index] = State.CUT
