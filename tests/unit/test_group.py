"""The group's state machine against a small world in which candidates grow, race with their abort, and get lost."""

from dataclasses import replace

import pytest
from group_world import EVERY_MODE, World, brute_force, over

from darts.group import CandidateGroup, GroupRules
from darts.pool import State


@over(*EVERY_MODE)
def test_exactly_num_keep_are_kept_and_the_decision_stands(case):
    world, decided = World(case), None
    for _ in world.live():
        if world.group.complete:
            decided = decided or world.group.kept
            assert world.group.kept == decided
            assert {index for index in range(case.size) if world.group.keeps(index)} == set(decided)
    assert len(set(decided)) == len(decided) == case.num_keep
    assert decided == sorted(decided, key=lambda index: (world.reported[index], index))


@over(*EVERY_MODE)
def test_the_group_is_complete_when_none_runs_that_may_be_kept_and_ended_when_none_does(case):
    world = World(case)
    for _ in world.live():
        assert world.group.complete == (not world.running if case.cuts else world.running <= set(world.asked))
        assert world.group.ended == (not world.running)
    assert not world.running


@over(*EVERY_MODE)
def test_each_is_asked_to_abort_at_most_once_and_only_while_it_runs(case):
    world, before = World(case), 0
    for _ in world.live():
        assert set(world.asked[before:]) <= world.running
        before = len(world.asked)
    assert len(set(world.asked)) == before


@over(*EVERY_MODE)
def test_kept_are_the_best_of_those_that_finished_before_they_were_asked_to_abort(case):
    world = World(case)
    for _ in world.live():
        if world.group.complete:
            assert set(world.group.kept) == brute_force(case, world.usable, world.cut, world.reported)
            if not case.cuts:
                assert not set(world.group.kept) & set(world.asked)  # not even those that finished anyway
        assert world.group.num_valid == len(world.valid)


@over(*EVERY_MODE)
def test_how_each_ended_is_on_record_whatever_is_reported_later(case):
    world = World(case)
    for _ in world.live():
        assert (world.group.lengths, world.group.arrival) == (world.reported, world.ended["finish"])
        asked = [index in world.asked and index in world.running for index in range(case.size)]
        assert [state is State.ABORTING for state in world.group.states] == asked
        assert {index for index, state in enumerate(world.group.states) if not state.ended} == world.running
        how = dict.fromkeys(world.ended["stop"], State.STOPPED) | dict.fromkeys(world.ended["lose"], State.LOST)
        for index in world.ended["finish"]:
            how[index] = State.TRUNCATED if case.candidates[index].truncated else State.FINISHED
        if world.group.complete:
            how |= dict.fromkeys(
                set(world.ended["stop"]).intersection(world.group.kept if case.cuts else ()), State.CUT
            )
        assert {index: state for index, state in enumerate(world.group.states) if state.ended} == how


@over(*EVERY_MODE[:-1], any_losses=True)
def test_losses_are_an_error_at_once_when_too_few_are_left_and_only_then(case):
    world, error = World(case), None
    try:
        for _ in world.live():
            assert case.size - len(world.ended["lose"]) >= case.num_keep
    except ValueError as raised:
        error = str(raised)
    lost = len(world.ended["lose"])
    if error is not None:
        assert case.size - lost == case.num_keep - 1
        assert error == f"{lost} candidates were lost, {case.size - lost} are left: {case.num_keep} are needed."


@over("off", "all")
def test_without_early_stop_and_deadline_nothing_is_ever_aborted(case):
    assert not World(case).end().asked


@over("eager")
def test_eager_completes_at_the_finish_of_the_last_one_needed(case):
    world = World(case)
    for _ in world.live():
        enough = len(world.valid) >= case.num_keep
        assert world.group.complete == (enough or not world.running)
        assert enough or not world.asked
        assert not enough or set(world.group.kept) == set(world.valid[: case.num_keep])


@over("exact")
def test_exact_keeps_what_a_run_without_early_stop_keeps(case):
    world = World(case).end()
    needed = brute_force(case, [index for index, it in enumerate(case.candidates) if not it.lost])
    assert set(world.group.kept) == needed
    assert not set(world.asked) & needed
    assert world.group.kept == World(replace(case, early_stop="off")).end().group.kept


@over("exact")
def test_exact_aborts_as_soon_as_the_reports_prove_it_and_not_before(case):
    world = World(case)
    for _ in world.live():
        ranking = sorted((case.candidates[index].length, index) for index in world.valid)
        hopeless = set()
        if len(ranking) >= case.num_keep:
            last = ranking[case.num_keep - 1]
            hopeless = {index for index in world.running if (world.reported[index], index) > last}
        assert world.running & set(world.asked) == hopeless


@over("eager", one_clock=True)
def test_eager_and_exact_agree_up_to_ties_where_all_start_together_at_one_speed(case):
    worlds = [World(replace(case, early_stop=early_stop)).end() for early_stop in ("eager", "exact")]
    eager, exact = [[case.candidates[index].length for index in world.group.kept] for world in worlds]
    assert eager == exact
    assert worlds[0].group.kept == worlds[1].group.kept or len({it.length for it in case.candidates}) < case.size


@over("cut", any_losses=True)
def test_losses_are_an_error_when_the_group_can_keep_too_few_of_what_was_cut_and_only_then(case):
    world, failed = World(case), False
    try:
        for _ in world.live():
            left = world.running - set(world.asked)
            assert len(world.usable) + len(left | world.cut) >= case.num_keep
    except ValueError:
        failed = True
    possible = set(world.usable) | (world.running - set(world.asked)) | world.cut
    assert failed == (not world.group.complete) == (len(possible) < case.num_keep)


@over(*EVERY_MODE)
def test_a_group_is_ready_while_it_waits_for_nothing_but_the_deadline(case):
    world = World(case)
    waits = case.num_long > 0 and case.long_wait == "deadline"
    for _ in world.live():
        decided = world.group.complete or (case.cuts and bool(world.asked))
        assert world.group.ready == (waits and not decided and not world.deadline_fell and world.settled)


@over("deadline", "none", "cut")
def test_a_dual_end_group_stops_when_it_is_settled_and_waits_no_longer(case):
    world = World(case)
    for _ in world.live():
        waits = case.long_wait == "deadline" and not world.deadline_fell
        if not world.asked:
            assert waits or not world.settled or not world.running
        else:
            assert not waits
            assert world.running <= set(world.asked)


@over("deadline", "none")
def test_what_runs_when_the_group_is_settled_is_aborted_and_the_best_that_finished_by_then_are_kept(case):
    world = World(case)
    for _ in world.live():
        if world.asked:
            assert set(world.asked) == world.running
            assert set(world.group.kept) == brute_force(case, world.usable)
            break


@over("cut")
def test_a_cut_group_keeps_k_that_ended_by_themselves_wherever_it_stopped_one(case):
    world = World(case).end()
    kept = set(world.group.kept)
    assert [i for i in range(case.size) if world.group.states[i] is State.CUT] == sorted(
        kept & set(world.ended["stop"])
    )
    if world.asked:
        assert len(kept & set(world.valid)) >= case.num_keep - case.num_long
        assert all(world.reported[index] > 0 for index in kept)
        assert not kept & world.held & set(world.ended["stop"]), "nothing to stop them with"


@over("all", "deadline", "none")
def test_truncated_ones_are_the_long_end_before_any_that_ended_where_the_rules_say_so(case):
    world = World(case).end()
    truncated = set(world.usable) - set(world.valid)
    kept = truncated & set(world.group.kept)
    if case.long_end != "finished":
        assert len(kept) >= min(case.num_long, len(truncated))
    elif len(world.valid) >= case.num_keep:
        assert not kept


def test_a_cut_group_by_hand():
    rules = GroupRules(num_keep=3, num_long=1, long_wait="deadline", long_end="cut")
    group = CandidateGroup(5, rules)
    assert group.finish(0, 10, truncated=False) == []
    assert group.finish(1, 12, truncated=False) == []
    assert not group.ready, "nobody that runs has a token yet"
    group.progress(2, 8)
    assert group.ready
    group.hold(2, True)
    assert not group.ready, "it has nothing to be stopped with"
    assert group.deadline() == []
    group.hold(3, True)
    group.progress(3, 40)
    assert group.progress(4, 9) == [2, 3, 4]
    assert not group.complete, "how long they are is not known yet"
    group.stop(3, 50)
    group.stop(2, 20)
    group.stop(4, 18)
    assert group.kept == [0, 1, 4], "the longest, but for those on hold"
    assert group.states[2:] == [State.STOPPED, State.STOPPED, State.CUT]


def test_a_cut_group_prefers_one_that_ended_over_one_that_started_late():
    group = CandidateGroup(4, GroupRules(num_keep=3, num_long=1, long_wait="none", long_end="cut"))
    assert group.finish(0, 10, truncated=False) + group.progress(3, 2) == []
    assert group.finish(1, 12, truncated=False) == [2, 3]
    group.finish(2, 14, truncated=False)  # before its abort arrived
    group.stop(3, 3)
    assert group.kept == [0, 1, 2]


def test_a_scenario_by_hand():
    group = CandidateGroup(6, GroupRules(num_keep=2, early_stop="exact"))
    with pytest.raises(RuntimeError, match="0 of 6 candidates have finished; not decided yet"):
        group.keeps(0)
    assert group.progress(4, 9) == []
    assert group.finish(5, 8, truncated=True) == []
    assert group.finish(3, 6, truncated=False) == []
    assert group.lose(2, 1) == []
    assert group.progress(1, 5) == []
    assert group.progress(1, 4) == []
    assert group.finish(0, 7, truncated=False) == [4]  # 1 can still end before 7
    assert group.finish(4, 2, truncated=False) == []  # the abort came too late, and even if it had been shorter
    assert not group.complete
    assert group.progress(1, 7) == [1]  # ends at 7 or later, and a tie would be 0's
    assert group.kept == [3, 0]
    assert not group.ended
    assert group.stop(1, 8) == []
    assert group.ended
    assert group.lengths == [7, 8, 1, 6, 2, 8]
    assert group.states == [State.FINISHED, State.STOPPED, State.LOST, *[State.FINISHED] * 2, State.TRUNCATED]
    assert group.arrival == [5, 3, 0, 4]
    assert group.num_valid == 2


@pytest.mark.parametrize(
    ("event", "arguments", "message"),
    [
        ("progress", (-1, 5), "candidate -1: this group has candidates 0 to 3"),
        ("finish", (4, 5, False), "candidate 4: this group"),
        ("stop", (4, 5), "candidate 4: this group"),
        ("lose", (-1, 5), "candidate -1: this group"),
        ("progress", (3, -1), "candidate 3: length=-1; must be finite and at least 0"),
        ("finish", (3, 0, False), "candidate 3: length=0; must be finite and at least 1"),
        ("finish", (3, float("nan"), False), "candidate 3: length=nan"),
        ("stop", (2, float("inf")), "candidate 2: length=inf"),
        ("lose", (3, -1), "candidate 3: length=-1"),
        ("finish", (0, 6, True), "candidate 0: ended twice"),
        ("stop", (1, 6), "candidate 1: ended twice"),
        ("lose", (0, 6), "candidate 0: ended twice"),
        ("stop", (3, 6), r"candidate 3: stopped, but it was not asked to; report it by lose\(\)"),
        ("hold", (4, True), "candidate 4: this group"),
    ],
)
def test_impossible_reports_are_refused_and_change_nothing(event, arguments, message):
    group = CandidateGroup(4, GroupRules(num_keep=1, early_stop="exact", long_wait="deadline"))
    group.finish(0, 5, False)
    assert group.progress(1, 6) + group.progress(2, 6) == [1, 2]
    group.stop(1, 6)
    with pytest.raises(ValueError, match=message):
        getattr(group, event)(*arguments)
    assert (group.lengths, group.arrival, State.LOST in group.states) == ([5, 6, 6, 0], [0], False)
    assert group.progress(3, 6) == [3]


@pytest.mark.parametrize(
    ("size", "rules", "message"),
    [
        (4, {"num_keep": 0}, "num_keep=0: must be at least 1"),
        (1, {}, "num_candidates=1: must be at least num_keep=2"),
        (4, {"num_long": 2}, r"num_long=2: must lie in \[0, num_keep=2\)"),
        (4, {"num_long": -1}, "num_long=-1: must lie in"),
        (4, {"early_stop": "fast"}, "early_stop='fast': must be one of eager, exact, off"),
        (4, {"num_long": 1, "long_wait": "long"}, "long_wait='long': must be one of all, deadline, none"),
        (4, {"long_end": "short"}, "long_end='short': must be one of finished, truncated, cut"),
    ],
)
def test_impossible_groups_are_refused(size, rules, message):
    with pytest.raises(ValueError, match=message):
        CandidateGroup(size, GroupRules(**({"num_keep": 2} | rules)))


@over(*EVERY_MODE)
def test_a_chance_of_one_is_kept_and_of_zero_only_fills(case):
    world, certain, hopeless = World(case), set(), set()
    for _ in world.live():
        for index in range(case.size):
            chance = world.group.chance(index)
            assert 0 <= chance <= 1
            if chance == 1 and not world.group.complete:
                certain.add(index)
            if chance == 0:
                hopeless.add(index)
    kept = set(world.group.kept)
    assert certain <= kept
    assert {index for index in kept & hopeless if not case.candidates[index].truncated} == set()
    assert {index for index in range(case.size) if world.group.chance(index)} == kept


def test_who_finished_early_is_likelier_kept_than_who_runs():
    group = CandidateGroup(6, GroupRules(num_keep=3, early_stop="eager"))
    group.finish(0, 5, truncated=False)
    assert group.chance(0) > group.chance(1) > 0
    group.finish(1, 9, truncated=False)
    assert group.chance(1) > group.chance(2)
    dual = CandidateGroup(4, GroupRules(num_keep=3, num_long=1))
    for index, length in enumerate((5, 6, 7)):
        dual.finish(index, length, truncated=False)
    dual.progress(3, 8)
    assert [dual.chance(0), dual.chance(1)] == [1, 1]
    assert dual.chance(2) < dual.chance(3)


# --- a rollout that ends without the group ---------------------------------------------------------------------------


@over(*EVERY_MODE, any_losses=True, abandoned=True)
def test_an_abandoned_group_aborts_what_runs_and_keeps_nothing(case):
    world, gone = World(case), False
    try:
        for name in world.live():
            if name == "abandon" and not world.group.complete:
                assert world.running <= set(world.asked)
                asked, gone = len(world.asked), True
            assert world.group.abandoned == gone
            if gone:
                assert len(world.asked) == len(set(world.asked)) == asked, "each once, and none later"
                assert (world.group.complete, world.group.ready) == (False, False)
                assert world.group.abandon() == world.group.deadline() == []
                assert not world.group.ready
                assert [world.group.chance(index) for index in range(case.size)] == [0] * case.size
                with pytest.raises(RuntimeError, match="candidates have finished; abandoned"):
                    world.group.keeps(0)
    except ValueError:  # too many were lost
        assert not gone, "which does not matter any more"
    else:
        assert world.group.ended
        assert world.group.complete == (not gone)


@over(*EVERY_MODE, abandoned=True)
def test_to_abandon_a_complete_group_does_nothing(case):
    world = World(replace(case, abandoned_at=None)).end()
    later = World(replace(case, abandoned_at=10**6)).end()
    assert (later.group.kept, later.asked) == (world.group.kept, world.asked)
    assert not later.group.abandoned


# --- the same, reckoned anew after every event -----------------------------------------------------------------------


class Plainly:
    """What a group answers, from the list of all events and by the words of its contract."""

    def __init__(self, case):
        self.case, self.length, self.fate, self.asked, self.kept = case, [0] * case.size, {}, set(), None
        self.held, self.waits = set(), case.num_long > 0 and case.long_wait != "none"

    def event(self, name, index=None, length=0, truncated=False):
        if name == "deadline":
            self.waits = self.waits and case_waits_for_all(self.case)
        elif name == "hold":
            (self.held.add if length else self.held.discard)(index)
        elif index in self.fate:
            return []  # a late report
        else:
            self.length[index] = max(self.length[index], length) if name == "progress" else length
        if name not in ("progress", "deadline", "hold"):
            late = index in self.asked and not self.case.cuts
            self.fate[index] = name if name != "finish" else "late" if late else "cut" if truncated else "valid"
        return self.decide(self.losers())

    def of(self, *fates):
        return [index for index in range(self.case.size) if self.fate.get(index) in fates]

    def runs(self):
        return [index for index in range(self.case.size) if index not in self.fate and index not in self.asked]

    def to_cut(self, indices):
        return {i for i in indices if self.case.cuts and self.length[i] and i not in self.held}

    def losers(self):
        valid, size = sorted((self.length[index], index) for index in self.of("valid")), self.case.num_keep
        if self.case.num_long:
            others = {*(self.of("cut") if self.case.long_end != "finished" else ()), *self.to_cut(self.runs())}
            is_settled = len(valid) + min(len(others), self.case.num_long) >= size
            return self.runs() if is_settled and not self.waits else []
        if self.case.early_stop == "off" or len(valid) < size:
            return []
        if self.case.early_stop == "eager":
            return self.runs()
        return [index for index in self.runs() if (self.length[index], index) > valid[size - 1]]

    def decide(self, losers):
        if self.kept is not None:
            return []
        self.asked |= set(losers)
        open_ones = self.asked - set(self.fate) if self.case.cuts else set()
        if not self.runs() and not open_ones:
            cut = self.to_cut(self.of("stop"))
            best = brute_force(self.case, self.of("valid", "cut"), cut, self.length)
            self.kept = sorted(best, key=lambda index: (self.length[index], index))
        return losers


def case_waits_for_all(case):
    """Whether no deadline may fall."""
    return case.long_wait == "all"


@over(*EVERY_MODE)
def test_every_answer_is_that_of_the_contract_reckoned_anew(case):
    world, plainly = World(case), Plainly(case)
    told = []
    for name in ("progress", "finish", "stop", "lose", "deadline", "hold"):
        act = getattr(world.group, name)

        def tell(*arguments, name=name, act=act):
            answer = act(*arguments)
            told.append((answer, plainly.event(name, *arguments), world.group.complete, plainly.kept))
            return answer

        setattr(world.group, name, tell)
    for _ in world.live():
        answer, expected, complete, kept = told[-1]
        assert answer == expected
        assert complete == (kept is not None)
        assert not complete or world.group.kept == kept
