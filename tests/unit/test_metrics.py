"""Metrics of a rollout: counted by hand on a small pool; names as documented."""

import re
from pathlib import Path

import numpy as np
import pytest

from darts.metrics import METRICS, rollout_metrics
from darts.pool import CandidatePool

ROOT = Path(__file__).resolve().parents[2]


def pool(**changes):
    """Two prompts, M = 2: prompt 0 dual-end with 3 candidates, prompt 1 shortest-only with 3, one truncated."""
    columns = {
        "length": [10, 40, 20, 30, 30, 64],
        "state": list("dddddt"),
        "kept": [True, True, False, True, True, False],
        "arrival": [0, 2, 1, 1, 0, 2],
        "num_long": [1, 1, 1, 0, 0, 0],
        "saturated": [True, True, True, False, False, False],
        "reward": [1.0, 0.0, np.nan, 1.0, 1.0, np.nan],
        "weights_min": [7] * 6,
        "weights_max": [7] * 6,
        "prompt_tokens": [10] * 6,
        "cached_tokens": [0, 8, 8, 0, 8, 0],
        "chunks": [0, 2, 1, 1, 0, 4],
        "chunk_seconds": [0.0, 0.2, 0.1, 0.1, 0.0, 0.4],
        "ended_at": [1.0, 4.0, 2.0, 3.0, 3.0, 4.5],
        "stop_seconds": [np.nan] * 6,
        "tokens_after": [0] * 6,
    }
    return CandidatePool.of([3, 3], **(columns | changes))


def test_every_figure_by_hand():
    metrics = rollout_metrics(pool(), num_keep=2, seconds=2.0)
    expected = {
        "darts/candidates/launched": 6,
        "darts/candidates/finished": 5,
        "darts/candidates/truncated": 1,
        "darts/candidates/aborted": 0,
        "darts/candidates/lost": 0,
        "darts/candidates/cut": 0,
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
        "darts/group/cut_share": 0,
        "darts/group/filled": 0,
        "darts/group/no_valid": 0,
        "darts/group/returned": 0,
        "darts/group/mixed_reward_share": 0.5,
        "darts/selection/arrival_disagreement": 0,
        "darts/reward/kept_mean": 0.75,
        "darts/rollout/seconds": 2,
        "darts/rollout/tail_s": 0.5,
        "darts/rollout/weights_step": 7,
        "darts/rollout/prefix_cached_share": 24 / 60,
        "darts/early_stop/tokens_after": 0,
        "darts/streaming/chunks": 8,
        "darts/streaming/latency_s": 0.1,
    }
    assert metrics == pytest.approx(expected)


def test_aborted_candidates_count_with_what_they_had():
    """Prompt 1's third candidate was aborted before it began, its second never finished for another reason."""
    early = pool(
        length=[10, 40, 20, 30, 30, 0],
        state=list("ddxdda"),
        arrival=[0, 1, -1, 1, 0, -1],
        stop_seconds=[np.nan] * 5 + [0.25],
        tokens_after=[0] * 5 + [3],
    )
    metrics = rollout_metrics(early, 2, 1.0)
    assert metrics["darts/candidates/finished"] == 4
    assert (metrics["darts/candidates/aborted"], metrics["darts/candidates/lost"]) == (1, 1)
    assert metrics["darts/tokens/generated"] == 130
    assert metrics["darts/early_stop/tokens_after"] == 3
    assert metrics["darts/early_stop/stop_s_mean"] == metrics["darts/early_stop/stop_s_max"] == 0.25
    assert metrics["darts/selection/arrival_disagreement"] == 0


def test_cut_ones_are_kept_parts_and_no_more_aborted_than_filled():
    cut = pool(
        state=list("dcaddt"),
        kept=[True, True, False, True, False, True],
        arrival=[0, -1, -1, 1, 0, 2],
        stop_seconds=[np.nan, 0.1, 0.2, np.nan, np.nan, np.nan],
        num_long=1,
    )
    metrics = rollout_metrics(cut, 2, 1.0, "cut")
    assert [metrics[f"darts/candidates/{name}"] for name in ("finished", "aborted", "cut", "truncated")] == [3, 1, 1, 1]
    assert metrics["darts/group/cut_share"] == 0.25
    assert metrics["darts/group/filled"] == 0, "the long end may be what did not end"
    assert metrics["darts/selection/arrival_disagreement"] == 0.5, "of the second group another came first"


def test_what_was_not_measured_is_absent():
    metrics = rollout_metrics(pool(chunks=[0] * 6, weights_min=[-1] * 6, weights_max=[-1] * 6), 2, 1.0)
    absent = {"darts/streaming/latency_s", "darts/rollout/weights_step", "darts/early_stop/stop_s_max"}
    assert not absent & set(metrics)


def test_pool_reward_only_where_all_were_scored():
    assert "darts/reward/pool_mean" not in rollout_metrics(pool(), 2, 1.0)
    stops = [np.nan] * 5 + [0.1]
    scored = rollout_metrics(pool(reward=[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], stop_seconds=stops), 2, 1.0)
    assert scored["darts/reward/pool_mean"] == 0.6, "the last was to be aborted: it is not scored, or by chance"
    planned = (
        "darts/allocation/",
        "darts/history/",
        "darts/latency/",
        "darts/overlap/",
        "darts/rollout/own_s",
        "darts/strategy/",
    )
    assert set(scored) == {name for name in METRICS if not name.startswith(planned)}
    unscored = rollout_metrics(pool(reward=[np.nan] * 6), 2, 1.0)
    assert not any(name.startswith("darts/reward/") for name in unscored)


def test_arrival_that_would_have_kept_others_is_counted():
    late_short = pool(arrival=[1, 2, 0, 2, 0, 1])
    assert rollout_metrics(late_short, 2, 1.0)["darts/selection/arrival_disagreement"] == 0.5


def test_groups_without_a_valid_candidate_are_counted():
    metrics = rollout_metrics(pool(state=list("dddttt")), 2, 1.0)
    assert (metrics["darts/group/no_valid"], metrics["darts/group/filled"]) == (1, 2)


def test_a_group_that_is_not_trained_on_is_counted_and_changes_no_share():
    """As a strategy that launches more prompts than it trains on leaves it."""
    kept = pool().kept & (pool().prompt == 0)
    metrics = rollout_metrics(pool(kept=kept), 2, 1.0)
    assert metrics["darts/group/returned"] == 1
    assert metrics["darts/candidates/kept"] == 2
    assert metrics["darts/tokens/generated"] == pool().length.sum()
    assert metrics["darts/group/mixed_reward_share"] in (0, 1)


def test_the_pool_of_a_plain_rollout():
    plain = CandidatePool.of(
        [2, 2], length=[3, 9, 4, 4], state=list("dtdd"), kept=True, reward=[1.0, 0.0, 1.0, 1.0], ended_at=7.0
    )
    assert plain.prompt.tolist() == [0, 0, 1, 1]
    assert plain.candidate.tolist() == [0, 1, 0, 1]
    metrics = rollout_metrics(plain, 2, 2.0)
    assert (metrics["darts/tokens/generated"], metrics["darts/tokens/dropped"]) == (20, 0)
    assert (metrics["darts/candidates/truncated"], metrics["darts/candidates/finished"]) == (1, 3)
    assert metrics["darts/reward/kept_mean"] == metrics["darts/reward/pool_mean"] == 0.75
    assert metrics["darts/group/mixed_reward_share"] == 0.5
    assert set(metrics) <= set(METRICS)


def test_pools_of_workers_join():
    joined = CandidatePool.concat([pool(), pool(prompt=[2, 2, 2, 3, 3, 3])])
    assert len(joined) == 12
    assert rollout_metrics(joined, 2, 1.0)["darts/candidates/kept"] == 8


@pytest.mark.parametrize(("candidates", "seconds", "message"), [(0, 1.0, "empty pool"), (6, 0.0, "seconds=0.0")])
def test_no_rollout_is_refused(candidates, seconds, message):
    with pytest.raises(ValueError, match=message):
        rollout_metrics(pool().rows(slice(candidates)), 2, seconds)


def test_the_documented_table_is_the_code():
    table = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(darts/[^`]+)` \| (.*) \|$", table, flags=re.M))
    assert rows == {name: f"{unit} | {reading}" for name, (unit, reading) in METRICS.items()}
