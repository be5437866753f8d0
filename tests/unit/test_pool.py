"""Candidates as columns: what is not given is not known, and the same everywhere."""

import numpy as np
import pytest

from darts.pool import CandidatePool, State


def test_a_pool_from_budgets_and_what_is_known():
    pool = CandidatePool.of([2, 1, 3], length=[5, 6, 7, 8, 9, 1], state=list("dtaxdd"), kept=True, prompt_tokens=3)
    assert pool.prompt.tolist() == [0, 0, 1, 2, 2, 2]
    assert pool.candidate.tolist() == [0, 1, 0, 0, 1, 2]
    assert [pool.truncated.sum(), pool.aborted.sum(), pool.lost.sum(), pool.kept.sum()] == [1, 1, 1, 6]
    assert (pool.prompt_tokens.tolist(), pool.weights_min.tolist()) == ([3] * 6, [-1] * 6)
    assert np.isnan(pool.reward).all()
    assert np.isnan(pool.stop_seconds).all()
    assert pool.rows(np.array([5, 0])).length.tolist() == [1, 5]
    assert pool.rows(np.arange(6)[::-1]).sorted().length.tolist() == pool.length.tolist()


@pytest.mark.parametrize("columns", [{"lenght": 3}, {}, {"length": [1, 2, 3]}])
def test_columns_that_do_not_fit_are_refused(columns):
    with pytest.raises((TypeError, ValueError)):
        CandidatePool.of([2], **columns)


def test_the_letters_are_those_of_a_trace():
    assert [state.value for state in State if state.ended] == list("dtacx")
