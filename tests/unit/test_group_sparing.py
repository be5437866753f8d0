"""Losers that are kept by chance: what is kept estimates sums over all candidates, exactly and whatever they do."""

import random
from dataclasses import replace

import pytest
from group_world import World, over

from darts.group import EARLY_STOP, LONG_WAIT, CandidateGroup


def outcomes(case):
    """All that the draw can lead to: `(probability, world)`, with nobody spared last."""
    p, most = case.keep_probability, case.size - case.num_keep
    worlds = [(p, World(replace(case, draw=(number + 0.5) * p)).end()) for number in range(most)]
    return [*worlds, (1 - p * most, World(replace(case, draw=1 - (1 - p * most) / 2)).end())]


@over(*EARLY_STOP, sparing=True)
def test_the_expected_sum_over_the_kept_is_that_over_all_candidates(case):
    """For any values: Horvitz-Thompson. Lost ones have no value."""
    dice = random.Random(case.seed)
    values = [dice.uniform(-1, 1) for _ in range(case.size)]
    expected = counted = 0.0
    worlds = outcomes(case)
    for probability, world in worlds:
        rows = list(zip(world.group.kept, world.group.weights, strict=True))
        expected += probability * sum(weight * values[index] for index, weight in rows)
        counted += probability * sum(weight for _, weight in rows)
    known = [index for index in range(case.size) if not case.candidates[index].lost]
    assert expected == pytest.approx(sum(values[index] for index in known), abs=1e-9)
    assert counted == pytest.approx(len(known))
    assert len({world.group.population for _, world in worlds}) == 1
    assert len(known) <= worlds[0][1].group.population <= case.size


@over(*EARLY_STOP, sparing=True)
def test_without_its_weight_a_loser_would_count_less_than_once(case):
    """The check above can fail."""
    plain = World(replace(case, keep_probability=0.0)).end().group
    losers = [i for i in range(case.size) if i not in plain.kept and not case.candidates[i].lost]
    for loser in losers[:1]:
        hits = sum(probability for probability, world in outcomes(case) if loser in world.group.kept)
        assert hits == pytest.approx(case.keep_probability)
        assert hits < 1


@over(*EARLY_STOP, sparing=True)
def test_a_spared_loser_changes_its_own_fate_and_takes_the_place_of_the_longest_kept(case):
    plain = World(replace(case, keep_probability=0.0)).end()
    for _, world in outcomes(case):
        spared, rule = world.group.spared, plain.group.kept
        assert set(plain.asked) - set(world.asked) <= {*range(case.size)} - set(rule)
        if spared is None:
            fallback = set(plain.asked) - set(world.asked)
            assert len(fallback) <= 1
            assert all(case.candidates[index].lost for index in fallback)
            assert world.group.kept == rule
            last = 1 / (1 - case.keep_probability * (world.group.population - case.num_keep))
            assert world.group.weights == [1.0] * (case.num_keep - 1) + [0.0 if fallback else last]
        else:
            assert [index for index in plain.asked if index != spared] == world.asked
            kept = sorted([*rule[:-1], spared], key=lambda index: (case.candidates[index].length, index))
            assert world.group.kept == kept
            weights = [1 / case.keep_probability if index == spared else 1.0 for index in kept]
            assert world.group.weights == weights
        assert world.group.num_valid >= plain.group.num_valid


@over(*EARLY_STOP, sparing=True)
def test_the_group_waits_for_the_spared_one_and_for_nobody_else(case):
    world = World(case)
    for _ in world.live():
        assert world.group.complete == (world.running <= set(world.asked))
        spared = world.group.spared
        assert spared is None or spared not in world.asked
        if case.early_stop == "eager" and len(world.valid) >= case.num_keep:
            assert world.running - set(world.asked) <= {spared}
    if world.group.spared is not None:
        assert world.group.keeps(world.group.spared)


@over(*EARLY_STOP, sparing=True)
def test_chances_of_one_and_zero_are_certain_with_losers_spared_too(case):
    world, certain, hopeless = World(case), set(), set()
    for _ in world.live():
        for index in range(case.size):
            chance = world.group.chance(index)
            assert 0 <= chance <= 1
            if not world.group.complete:
                (certain if chance == 1 else hopeless if chance == 0 else set()).add(index)
    kept = set(world.group.kept)
    assert certain <= kept
    assert {index for index in kept & hopeless if not case.candidates[index].truncated} == set()


@over(*EARLY_STOP, sparing=True, abandoned=True, any_losses=True)
def test_an_abandoned_group_spares_nobody(case):
    world, gone = World(case), False
    try:
        for name in world.live():
            gone = gone or (name == "abandon" and not world.group.complete)
            assert not gone or world.running <= set(world.asked)
    except ValueError:
        assert not gone
    assert len(set(world.asked)) == len(world.asked)


@over(*LONG_WAIT, sparing=True)
def test_dual_end_groups_spare_nobody(case):
    with_p, without = World(case).end(), World(replace(case, keep_probability=0.0)).end()
    assert (with_p.group.kept, with_p.asked) == (without.group.kept, without.asked)
    assert with_p.group.weights == [1.0] * case.num_keep
    assert with_p.group.population == case.num_keep


def test_a_scenario_by_hand():
    def group(draw):
        return CandidateGroup(5, num_keep=2, num_long=0, early_stop="eager", keep_probability=0.25, draw=draw)

    spares = group(0.3)  # the loser with number 1
    assert spares.finish(3, 9, truncated=False) == []
    assert spares.finish(1, 20, truncated=True) == []
    assert spares.spared is None
    assert spares.finish(0, 7, truncated=False) == [2]  # of 2 and 4; 1, who has finished, would have number 2
    assert spares.spared == 4
    assert not spares.complete
    assert (spares.chance(0), spares.chance(1), spares.chance(2), spares.chance(4)) == (1.0, 0.0, 0.0, 0.9)
    assert 0 < spares.chance(3) < 0.5, "only if 4 gets lost"
    assert spares.progress(4, 30) == []
    assert spares.finish(4, 40, truncated=True) == []
    assert (spares.kept, spares.weights, spares.population) == ([0, 4], [1.0, 4.0], 5)
    assert spares.num_valid == 2

    nobody = group(0.75)
    nobody.finish(3, 9, truncated=False)
    assert nobody.finish(0, 7, truncated=False) == [1, 2, 4]
    assert (nobody.kept, nobody.weights, nobody.spared) == ([0, 3], [1.0, 4.0], None)

    loses = group(0.0)
    loses.finish(3, 9, truncated=False)
    assert loses.finish(0, 7, truncated=False) == [2, 4]
    assert loses.spared == 1
    assert loses.lose(1, 5) == []
    assert (loses.kept, loses.weights, loses.spared) == ([0, 3], [1.0, 0.0], None)


def test_who_was_lost_before_is_no_loser():
    group = CandidateGroup(4, num_keep=2, num_long=0, early_stop="eager", keep_probability=0.25, draw=0.1)
    group.lose(2, 1)
    group.finish(0, 5, truncated=False)
    assert group.finish(1, 6, truncated=False) == []
    assert group.spared == 3
    assert group.finish(3, 2, truncated=False) == []
    assert (group.kept, group.weights, group.population) == ([3, 0], [4.0, 1.0], 3)
    assert group.num_valid == 3


@pytest.mark.parametrize(
    ("p", "draw", "message"),
    [
        (-0.1, 0.0, "keep_probability=-0.1: must be at least 0"),
        (0.25, 0.0, "keep_probability=0.25: .* below 1 in all over the 4 candidates that are not kept"),
        (float("nan"), 0.0, "keep_probability=nan"),
        (0.1, 1.0, r"draw=1.0: must lie in \[0, 1\)"),
        (0.1, float("nan"), "draw=nan"),
    ],
)
def test_impossible_probabilities_are_refused(p, draw, message):
    with pytest.raises(ValueError, match=message):
        CandidateGroup(6, 2, 0, keep_probability=p, draw=draw)


def test_a_tiny_probability_spares_nobody_it_does_not_draw():
    group = CandidateGroup(3, 2, 0, early_stop="eager", keep_probability=1e-320, draw=0.5)
    group.finish(0, 5, truncated=False)
    assert group.finish(1, 5, truncated=False) == [2]
    assert group.weights == [1.0, 1.0]
