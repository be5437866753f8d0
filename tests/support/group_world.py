"""A small world in which a group's candidates grow, race with their abort, and get lost."""

import heapq
import itertools
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from darts.group import EARLY_STOP, LONG_WAIT, CandidateGroup, GroupRules

EVERY_MODE = EARLY_STOP + LONG_WAIT


@dataclass(frozen=True)
class Candidate:
    length: int  # tokens at its end, unless an abort reaches it before
    truncated: bool = False
    lost: bool = False
    start: int = 0  # ticks before its first token
    pace: int = 1  # ticks per token; 0: all at once
    chunk: int = 1  # tokens between two reports
    latency: int = 0  # ticks that an abort takes to reach it


@dataclass(frozen=True)
class Case:
    candidates: tuple[Candidate, ...]
    num_keep: int
    num_long: int
    early_stop: str
    long_wait: str
    patience: int | None  # ticks from ready to the deadline; None: it never falls
    seed: int  # order of simultaneous events, lengths at which aborted candidates stop
    abandoned_at: int | None = None  # tick

    @property
    def size(self):
        return len(self.candidates)

    @property
    def rules(self):
        return GroupRules(
            num_keep=self.num_keep, num_long=self.num_long, early_stop=self.early_stop, long_wait=self.long_wait
        )


class World:
    """Lives through a case and keeps its own books, from the events alone."""

    def __init__(self, case):
        self.case = case
        self.group = CandidateGroup(case.size, case.rules)
        self.running = set(range(case.size))
        self.reported = [0] * case.size
        self.asked = []  # to abort
        self.ended = {"finish": [], "stop": [], "lose": []}
        self.usable = []  # finished before they were asked to abort

    @property
    def valid(self):
        return [index for index in self.usable if not self.case.candidates[index].truncated]

    def live(self):
        """Feeds the events in order of time, ties at random; yields the name of each after it."""
        dice, events, patience = random.Random(self.case.seed), [], self.case.patience
        for index, it in enumerate(self.case.candidates):
            script = [(length, "progress", length) for length in range(it.chunk, it.length + 1, it.chunk)]
            script += [(it.length, "progress", 0)]  # was overtaken by later reports
            script += [(it.length, "lose" if it.lost else "finish", it.length)]
            script += [(it.length + 1, "progress", it.length + 1)]  # comes after the end
            ranks = sorted(dice.random() for _ in script)  # among simultaneous events
            for rank, (tokens, name, length) in zip(ranks, script, strict=True):
                heapq.heappush(events, (it.start + it.pace * tokens, rank, name, index, length))
        if self.case.abandoned_at is not None:
            heapq.heappush(events, (self.case.abandoned_at, 0.5, "abandon", None, 0))
        while events:
            time, _, name, index, length = heapq.heappop(events)
            if name in self.ended:
                if index not in self.running:
                    continue  # its end and its abort have raced
                if name == "stop":
                    length = dice.randint(self.reported[index], self.case.candidates[index].length)
                self.running.remove(index)
                self.reported[index] = length
                self.ended[name].append(index)
                if name == "finish" and index not in self.asked:
                    self.usable.append(index)
            elif index in self.running:
                self.reported[index] = max(length, self.reported[index])
            arguments = () if name in ("deadline", "abandon") else (index, length)
            arguments += (self.case.candidates[index].truncated,) if name == "finish" else ()
            for loser in getattr(self.group, name)(*arguments):
                self.asked.append(loser)
                arrives = time + self.case.candidates[loser].latency
                heapq.heappush(events, (arrives, dice.random(), "stop", loser, 0))
            if self.group.ready and patience is not None:
                heapq.heappush(events, (time + patience, dice.random(), "deadline", None, 0))
                patience = None
            yield name

    def end(self):
        for _ in self.live():
            pass
        return self


def over(*modes, one_clock=False, any_losses=False, abandoned=False):
    """Runs a test for cases in these modes; the setting of the other kind of group is drawn, and must not matter.

    Args:
        modes: of `EVERY_MODE`.
        one_clock: all start together and run at one speed.
        any_losses: so many that the group may be of no more use.
        abandoned: some time, possibly after its end.
    """
    timing = {}
    if not one_clock:
        few = st.integers(0, 6)
        timing = {"start": few, "pace": st.integers(0, 3), "chunk": st.integers(1, 3), "latency": few}

    @st.composite
    def cases(draw):
        mode = draw(st.sampled_from(modes))
        dual = mode in LONG_WAIT
        num_keep = draw(st.integers(2 if dual else 1, 4))
        size = draw(st.integers(num_keep, 7))
        lengths = draw(st.lists(st.integers(1, 6), min_size=size, max_size=size))
        truncated = draw(st.lists(st.sampled_from([False] * 4 + [True]), min_size=size, max_size=size))
        lost = draw(st.sets(st.integers(0, size - 1), max_size=size if any_losses else size - num_keep))
        times = draw(st.lists(st.fixed_dictionaries(timing), min_size=size, max_size=size))
        return Case(
            tuple(Candidate(lengths[i], truncated[i], i in lost, **times[i]) for i in range(size)),
            num_keep,
            num_long=draw(st.integers(1, num_keep - 1)) if dual else 0,
            early_stop=draw(st.sampled_from(EARLY_STOP)) if dual else mode,
            long_wait=mode if dual else draw(st.sampled_from(LONG_WAIT)),
            patience=draw(st.none() | st.integers(0, 12)),
            seed=draw(st.integers(0, 999)),
            abandoned_at=draw(st.integers(0, 30)) if abandoned else None,
        )

    return lambda test: settings(max_examples=300)(given(cases())(test))


def brute_force(case, pool):
    """Of every way to choose from `pool`, the shortest and the longest by their sum; ties by index."""

    def weight(some):
        return sum(case.candidates[index].length for index in some), some

    cut = [index for index in sorted(pool) if case.candidates[index].truncated]
    valid = sorted(set(pool) - set(cut))
    if len(valid) < case.num_keep:
        return {*valid, *cut[: case.num_keep - len(valid)]}
    short = min(itertools.combinations(valid, case.num_keep - case.num_long), key=weight)
    return {*short, *max(itertools.combinations(valid, case.num_long), key=weight)}
