"""A small world in which a group's candidates grow, race with their abort, and get lost."""

import heapq
import itertools
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from darts.group import EARLY_STOP, LONG_WAIT, CandidateGroup, GroupRules
from darts.selection import LONG_END

EVERY_MODE = (*EARLY_STOP, *LONG_WAIT, "cut")


@dataclass(frozen=True)
class Candidate:
    length: int  # tokens at its end, unless an abort reaches it before
    truncated: bool = False
    lost: bool = False
    start: int = 0  # ticks before its first token
    pace: int = 1  # ticks per token; 0: all at once
    chunk: int = 1  # tokens between two reports
    latency: int = 0  # ticks that an abort takes to reach it
    held: tuple[int, int] = (-1, -1)  # from so many tokens to so many it is between two requests


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
    long_end: str = "finished"
    deadline_at: int | None = None  # tick at which a deadline falls, whether the group is ready or not

    @property
    def size(self):
        return len(self.candidates)

    @property
    def rules(self):
        names = ("num_keep", "num_long", "early_stop", "long_wait", "long_end")
        return GroupRules(**{name: getattr(self, name) for name in names})

    @property
    def cuts(self):
        """Whether a stopped candidate may be kept."""
        return self.num_long > 0 and self.long_wait in ("deadline", "none") and self.long_end == "cut"


class World:
    """Lives through a case and keeps its own books, from the events alone."""

    def __init__(self, case):
        self.case = case
        self.group = CandidateGroup(case.size, case.rules)
        self.running = set(range(case.size))
        self.reported = [0] * case.size
        self.asked = []  # to abort
        self.ended = {"finish": [], "stop": [], "lose": []}
        self.usable = []  # finished before they were asked to abort, or may be kept all the same
        self.held = set()  # between two requests
        self.deadline_fell = False

    @property
    def valid(self):
        return [index for index in self.usable if not self.case.candidates[index].truncated]

    @property
    def cut(self):
        """Those that were stopped with something to keep, or are about to be."""
        asked = self.running.intersection(self.asked).union(self.ended["stop"]) if self.case.cuts else ()
        return {index for index in asked if self.reported[index] and index not in self.held}

    @property
    def settled(self):
        """Whether M may be kept of what is there, were the group to stop now."""
        others = set(self.usable) - set(self.valid) if self.case.long_end != "finished" else set()
        if self.case.cuts:
            others |= {i for i in self.running - set(self.asked) if self.reported[i] and i not in self.held}
        return self.case.num_long > 0 and len(self.valid) + min(len(others), self.case.num_long) >= self.case.num_keep

    def live(self):
        """Feeds the events in order of time, ties at random; yields the name of each after it."""
        dice, events, patience = random.Random(self.case.seed), [], self.case.patience
        for index, it in enumerate(self.case.candidates):
            script = [(length, "progress", length) for length in range(it.chunk, it.length + 1, it.chunk)]
            script += [(it.length, "progress", 0)]  # was overtaken by later reports
            script += [(it.length, "lose" if it.lost else "finish", it.length)]
            script += [(it.length + 1, "progress", it.length + 1)]  # comes after the end
            script += [(tokens, "hold", begins) for tokens, begins in zip(it.held, (1, 0), strict=True) if tokens >= 0]
            script.sort(key=lambda event: event[0])
            ranks = sorted(dice.random() for _ in script)  # among simultaneous events
            for rank, (tokens, name, length) in zip(ranks, script, strict=True):
                heapq.heappush(events, (it.start + it.pace * tokens, rank, name, index, length))
        for when, name in ((self.case.abandoned_at, "abandon"), (self.case.deadline_at, "deadline")):
            if when is not None:
                heapq.heappush(events, (when, 0.5, name, None, 0))
        while events:
            time, _, name, index, length = heapq.heappop(events)
            if name in self.ended:
                if index not in self.running:
                    continue  # its end and its abort have raced
                if name == "lose" and self.case.cuts and index in self.asked:
                    continue  # what a server ends then was stopped
                if name == "stop":
                    known = self.reported[index]
                    length = dice.randint(known, max(known, self.case.candidates[index].length))
                self.running.remove(index)
                self.reported[index] = length
                self.ended[name].append(index)
                if name == "finish" and (index not in self.asked or self.case.cuts):
                    self.usable.append(index)
            elif name == "hold":
                if index not in self.running or index in self.asked:
                    continue  # nothing is opened or closed any more
                (self.held.add if length else self.held.discard)(index)
            elif index in self.running:
                self.reported[index] = max(length, self.reported[index])
            arguments = () if name in ("deadline", "abandon") else (index, length)
            arguments += (self.case.candidates[index].truncated,) if name == "finish" else ()
            self.deadline_fell |= name == "deadline"
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
        modes: of `EVERY_MODE`; `cut` are dual-end groups that may keep what they stop.
        one_clock: all start together and run at one speed.
        any_losses: so many that the group may be of no more use.
        abandoned: some time, possibly after its end.
    """
    timing = {}
    if not one_clock:
        few = st.integers(0, 6)
        held = st.tuples(st.integers(-1, 4), st.integers(2, 6)).filter(lambda span: span[0] < span[1])
        timing = {"start": few, "pace": st.integers(0, 3), "chunk": st.integers(1, 3), "latency": few, "held": held}

    @st.composite
    def cases(draw):
        mode = draw(st.sampled_from(modes))
        dual, cuts = mode not in EARLY_STOP, mode == "cut"
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
            long_wait=mode if dual and not cuts else draw(st.sampled_from(LONG_WAIT[1:] if cuts else LONG_WAIT)),
            long_end="cut" if cuts else draw(st.sampled_from(LONG_END if not dual or mode == "all" else LONG_END[:2])),
            deadline_at=draw(st.none() | st.integers(0, 20)),
            patience=draw(st.none() | st.integers(0, 12)),
            seed=draw(st.integers(0, 999)),
            abandoned_at=draw(st.integers(0, 30)) if abandoned else None,
        )

    return lambda test: settings(max_examples=3 * settings.default.max_examples)(given(cases())(test))


def brute_force(case, pool, cut=(), reported=()):
    """Of every way to choose from `pool` and what was cut, the shortest valid ones, and then the best long end; ties by
    index. `reported`: tokens of those that were cut."""
    length = [reported[index] if index in cut else it.length for index, it in enumerate(case.candidates)]
    truncated = [index for index in sorted(pool) if case.candidates[index].truncated]
    valid = sorted(set(pool) - set(truncated))

    def weight(chosen):
        return sum(length[index] for index in chosen), chosen

    num_short = min(case.num_keep - case.num_long, len(valid))
    short = min(itertools.combinations(valid, num_short), key=weight)
    last_short = max(((length[index], index) for index in short), default=(0, -1))

    def merit(index):
        if index in truncated:
            return 3000
        if index in cut:
            return 2000 if (length[index], index) > last_short else 0
        return 1000

    others = sorted(set(valid) - set(short)) + (sorted({*truncated, *cut}) if case.long_end != "finished" else [])
    num_long = min(case.num_long, len(others))
    ways = itertools.combinations(sorted(others), num_long)
    long = max(ways, key=lambda way: (sum(map(merit, way)), sum(length[index] for index in way), way))
    fill = [index for index in sorted({*truncated, *cut}) if index not in long]
    return {*short, *long, *fill[: case.num_keep - len(short) - num_long]}
