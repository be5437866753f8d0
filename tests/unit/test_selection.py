"""Which candidates are kept: the invariant "the K shortest and L longest valid by length", against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts.selection import select


@st.composite
def groups(draw):
    size = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    truncated = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    num_keep = draw(st.integers(1, size))
    num_long = draw(st.integers(0, num_keep - 1))
    return lengths, num_keep, num_long, truncated


@given(groups())
def test_kept_are_the_shortest_and_the_longest_valid(group):
    """Every way to choose K + L valid candidates is compared: none has shorter short ones or longer long ones."""
    lengths, num_keep, num_long, truncated = group
    kept = select(lengths, num_keep, num_long, truncated)
    assert len(kept) == len(set(kept)) == num_keep
    assert kept == sorted(kept, key=lambda index: (lengths[index], index))
    valid = [index for index in range(len(lengths)) if not truncated[index]]
    if len(valid) < num_keep:
        cut = [index for index in range(len(lengths)) if truncated[index]]
        assert set(kept) == set(valid) | set(cut[: num_keep - len(valid)])
        return
    assert set(kept) <= set(valid)
    num_short = num_keep - num_long
    short = [lengths[index] for index in kept[:num_short]]
    long = [lengths[index] for index in kept[num_short:]]
    best_short = min(sorted(lengths[i] for i in some) for some in itertools.combinations(valid, num_short))
    best_long = max(
        sorted((lengths[i] for i in some), reverse=True) for some in itertools.combinations(valid, num_long)
    )
    assert sorted(short) == best_short
    assert sorted(long, reverse=True) == best_long


@given(groups(), st.randoms())
def test_lengths_decide_and_the_order_of_candidates_does_not(group, random):
    lengths, num_keep, num_long, _ = group
    order = list(range(len(lengths)))
    random.shuffle(order)
    kept = sorted(lengths[index] for index in select(lengths, num_keep, num_long))
    shuffled = [lengths[index] for index in order]
    assert kept == sorted(shuffled[index] for index in select(shuffled, num_keep, num_long))


def test_ties_go_to_the_lower_index():
    assert select([5, 5, 5, 5], num_keep=2, num_long=0) == [0, 1]
    assert select([5, 5, 5, 5], num_keep=2, num_long=1) == [0, 3]


def test_truncated_candidates_fill_by_lowest_index_not_by_length():
    assert select([9, 7, 8, 1], num_keep=2, num_long=1, truncated=[True, True, True, False]) == [3, 0]


def test_a_truncated_candidate_is_never_chosen_as_the_longest():
    assert select([1, 2, 3, 99], num_keep=2, num_long=1, truncated=[False, False, False, True]) == [0, 2]


def test_keeping_all_keeps_all():
    assert sorted(select([3, 1, 2], num_keep=3, num_long=1)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [1, 2], "num_keep": 3, "num_long": 0}, "2 candidates, num_keep=3"),
        ({"lengths": [], "num_keep": 1, "num_long": 0}, "0 candidates, num_keep=1"),
        ({"lengths": [1, 2], "num_keep": 0, "num_long": 0}, "num_keep=0"),
        ({"lengths": [1, 2], "num_keep": 2, "num_long": 2}, r"num_long=2: must lie in \[0, num_keep=2\)"),
        ({"lengths": [1, 2], "num_keep": 2, "num_long": -1}, "num_long=-1"),
        ({"lengths": [1, -2], "num_keep": 2, "num_long": 0}, r"lengths\[1\]=-2"),
        ({"lengths": [1, float("nan")], "num_keep": 2, "num_long": 0}, r"lengths\[1\]=nan"),
        ({"lengths": [float("inf"), 1], "num_keep": 2, "num_long": 0}, r"lengths\[0\]=inf"),
        ({"lengths": [1, 2], "num_keep": 1, "num_long": 0, "truncated": [True]}, "1 truncation flags for 2 lengths"),
    ],
)
def test_nonsense_is_refused_with_name_value_and_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**arguments)
