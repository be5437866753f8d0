"""Metrics of a rollout: counted by hand on a small pool; names as documented."""

import re
from pathlib import Path

import numpy as np
import pytest

from darts.metrics import METRICS, CandidatePool, rollout_metrics

ROOT = Path(__file__).resolve().parents[2]


def pool(**changes):
    """Two prompts, M = 2: prompt 0 dual-end with 3 candidates, prompt 1 shortest-only with 3, one truncated."""
    columns = {
        "prompt": [0, 0, 0, 1, 1, 1],
        "candidate": [0, 1, 2, 0, 1, 2],
        "length": [10, 40, 20, 30, 30, 64],
        "truncated": [False, False, False, False, False, True],
        "kept": [True, True, False, True, True, False],
        "arrival": [0, 2, 1, 1, 0, 2],
        "num_long": [1, 1, 1, 0, 0, 0],
        "saturated": [True, True, True, False, False, False],
        "reward": [1.0, 0.0, np.nan, 1.0, 1.0, np.nan],
    }
    return CandidatePool(**{name: np.array(value) for name, value in (columns | changes).items()})


def test_every_figure_by_hand():
    metrics = rollout_metrics(pool(), num_keep=2, seconds=2.0)
    expected = {
        "darts/candidates/launched": 6,
        "darts/candidates/finished": 5,
        "darts/candidates/truncated": 1,
        "darts/candidates/kept": 4,
        "darts/candidates/dropped": 2,
        "darts/candidates/per_prompt": 3,
        "darts/tokens/generated": 194,
        "darts/tokens/kept": 110,
        "darts/tokens/dropped": 84,
        "darts/tokens/useful_per_s": 55,
        "darts/length/pool_mean": 194 / 6,
        "darts/length/pool_p99": np.percentile([10, 40, 20, 30, 30, 64], 99),
        "darts/length/pool_max": 64,
        "darts/length/kept_mean": 27.5,
        "darts/length/kept_max": 40,
        "darts/group/max_over_mean": (40 * 3 / 70 + 64 * 3 / 124) / 2,
        "darts/group/max_over_median": (2 + 64 / 30) / 2,
        "darts/group/saturated_share": 0.5,
        "darts/group/shortest_only_share": 0.5,
        "darts/group/filled": 0,
        "darts/group/no_valid": 0,
        "darts/group/mixed_reward_share": 0.5,
        "darts/selection/arrival_disagreement": 0,
        "darts/reward/kept_mean": 0.75,
        "darts/rollout/seconds": 2,
    }
    assert metrics == pytest.approx(expected)


def test_pool_reward_only_where_all_were_scored():
    assert "darts/reward/pool_mean" not in rollout_metrics(pool(), 2, 1.0)
    scored = rollout_metrics(pool(reward=[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), 2, 1.0)
    assert scored["darts/reward/pool_mean"] == 0.5
    assert set(scored) == set(METRICS)
    unscored = rollout_metrics(pool(reward=[np.nan] * 6), 2, 1.0)
    assert not any(name.startswith("darts/reward/") for name in unscored)


def test_arrival_that_would_have_kept_others_is_counted():
    late_short = pool(arrival=[1, 2, 0, 2, 0, 1])
    assert rollout_metrics(late_short, 2, 1.0)["darts/selection/arrival_disagreement"] == 0.5


def test_groups_without_a_valid_candidate_are_counted():
    metrics = rollout_metrics(pool(truncated=[False, False, False, True, True, True]), 2, 1.0)
    assert (metrics["darts/group/no_valid"], metrics["darts/group/filled"]) == (1, 2)


def test_pools_of_workers_join():
    joined = CandidatePool.concat([pool(), pool(prompt=[2, 2, 2, 3, 3, 3])])
    assert len(joined) == 12
    assert rollout_metrics(joined, 2, 1.0)["darts/candidates/kept"] == 8


@pytest.mark.parametrize(("candidates", "seconds", "message"), [(0, 1.0, "empty pool"), (6, 0.0, "seconds=0.0")])
def test_no_rollout_is_refused(candidates, seconds, message):
    empty = CandidatePool(**{name: getattr(pool(), name)[:candidates] for name in CandidatePool.__dataclass_fields__})
    with pytest.raises(ValueError, match=message):
        rollout_metrics(empty, 2, seconds)


def test_the_documented_table_is_the_code():
    table = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(darts/[^`]+)` \| (.*) \|$", table, flags=re.M))
    assert rows == {name: f"{unit} | {reading}" for name, (unit, reading) in METRICS.items()}
