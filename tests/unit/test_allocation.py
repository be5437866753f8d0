"""Budgets sum to the total within their bounds; parts hold whole groups, in order, balanced."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts.allocation import contiguous_parts, uniform_budgets


@given(st.integers(0, 300), st.integers(1, 16), st.integers(0, 16), st.floats(0, 1))
def test_budgets_sum_to_the_total_within_bounds(num_prompts, low, width, share):
    high = low + width
    mean = low + share * width
    budgets = uniform_budgets(num_prompts, mean, low, high)
    assert len(budgets) == num_prompts
    assert budgets.sum() == np.floor(mean * num_prompts + 0.5)
    if num_prompts:
        assert low <= budgets.min() <= budgets.max() <= high
        assert budgets.max() - budgets.min() <= 1


def test_half_a_candidate_gives_half_of_the_prompts_one_more():
    assert uniform_budgets(8, 10.5, 8, 16).tolist() == [11, 11, 11, 11, 10, 10, 10, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 8, 8, 16), "num_prompts=-1"), ((4, 7.9, 8, 16), "mean=7.9"), ((4, 17, 8, 16), "mean=17"),
     ((4, 8, 9, 8), "low=9, high=8"), ((4, float("nan"), 8, 16), "mean=nan"), ((4, 1, 0, 2), "low=0")],
)  # fmt: skip
def test_impossible_budgets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniform_budgets(*arguments)


@given(st.lists(st.integers(1, 16), max_size=60), st.integers(1, 70))
def test_parts_hold_every_prompt_once_in_order_and_are_balanced(budgets, num_parts):
    budgets = np.array(budgets, dtype=np.int64)
    parts = contiguous_parts(budgets, num_parts)
    assert len(parts) <= num_parts
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(budgets)))
    assert all(part.stop > part.start for part in parts)
    for part in parts:
        assert budgets[part].sum() <= budgets.sum() / num_parts + budgets.max()


def test_equal_prompts_split_equally():
    parts = contiguous_parts(np.full(256, 12), 8)
    assert [part.stop - part.start for part in parts] == [32] * 8


def test_no_part_is_refused():
    with pytest.raises(ValueError, match="num_parts=0"):
        contiguous_parts(np.array([1]), 0)
