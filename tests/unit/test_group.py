"""The group's state machine: finishes in any order, exactly M kept, decided once and only at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts.group import CandidateGroup
from darts.selection import select


@st.composite
def finishes(draw):
    size = draw(st.integers(2, 10))
    order = draw(st.permutations(range(size)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
    truncated = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    num_keep = draw(st.integers(1, size))
    return order, lengths, truncated, num_keep, draw(st.integers(0, num_keep - 1))


@given(finishes())
def test_any_order_of_arrival_keeps_what_the_lengths_say(case):
    order, lengths, truncated, num_keep, num_long = case
    group = CandidateGroup(len(order), num_keep, num_long)
    for index in order:
        assert not group.complete
        with pytest.raises(RuntimeError, match="not decided yet"):
            _ = group.kept
        group.finish(index, lengths[index], truncated[index])
    assert group.complete
    assert group.kept == select(lengths, num_keep, num_long, truncated)
    assert group.arrival == list(order)
    assert group.num_valid == truncated.count(False)


def test_each_candidate_finishes_once():
    group = CandidateGroup(3, 2, 1)
    group.finish(1, 5, False)
    with pytest.raises(ValueError, match="candidate 1: finished twice"):
        group.finish(1, 6, False)


@pytest.mark.parametrize(("index", "length"), [(-1, 5), (3, 5), (0, 0), (0, -1)])
def test_impossible_finishes_are_refused(index, length):
    with pytest.raises(ValueError, match=f"candidate {index}"):
        CandidateGroup(3, 2, 1).finish(index, length, False)


@pytest.mark.parametrize(("candidates", "keep", "long"), [(1, 2, 0), (4, 2, 2), (4, 2, -1)])
def test_impossible_groups_are_refused(candidates, keep, long):
    with pytest.raises(ValueError, match="num_"):
        CandidateGroup(candidates, keep, long)
