"""What a rollout did, in numbers: the pool of candidates in, the metrics `darts/<area>/<name>` out.

Contract: pure NumPy. `METRICS` is the one list of names with unit and reading; `docs/metrics.md` repeats it (a test
compares them); `rollout_metrics` and `darts.planning` give them. A metric is absent where nothing was measured:
rewards, the time of stops, the latency of chunks, the weights' step, and forecasts without a cost model.
"""

import numpy as np
from numpy.typing import NDArray

from darts.pool import CandidatePool
from darts.selection import select

METRICS: dict[str, tuple[str, str]] = {
    "darts/allocation/total": ("count", "M_total, candidates of the batch"),
    "darts/allocation/budget_min": ("count", "smallest M'_i of the batch; every prompt's budget is in the trace"),
    "darts/allocation/budget_median": ("count", "median M'_i"),
    "darts/allocation/budget_max": ("count", "largest M'_i; see also darts/group/saturated_share"),
    "darts/allocation/utility": ("", "U = E - lambda T of the total, before generation; the three need a cost model"),
    "darts/allocation/gain": ("", "E, expected shaping: sigma_D / mean length x (1 - M / mean M'_i)"),
    "darts/allocation/time_cost": ("", "T, expected: seconds over those with M candidates, minus 1; no early stop"),
    "darts/allocation/time_cost_measured": ("", "the same with the seconds measured; lower where early stop helps"),
    "darts/history/prompts": ("count", "prompts with a length history"),
    "darts/history/known_share": ("share", "prompts of the batch that were seen before; the others take the mean"),
    "darts/history/std_mean": ("tokens", "sigma_D: std of response length within a prompt, mean of recent prompts"),
    "darts/history/length_mean": ("tokens", "mean response length of recent prompts, corrected for what was stopped"),
    "darts/history/stop_correction": (
        "ratio",
        "of the std of groups that no rule ends to its estimate had they been stopped as deep as others were",
    ),
    "darts/history/std_correlation": ("", "of predicted with observed std, seen prompts; near 0 budgets are a lottery"),
    "darts/latency/predicted_s": ("s", "rollout seconds expected before generation; needs a cost model"),
    "darts/latency/predicted_over_measured": ("ratio", "the same over darts/rollout/seconds; 1 is a perfect forecast"),
    "darts/latency/overhead_s": ("s", "what a rollout of so many candidates takes besides decoding, by the cost model"),
    "darts/latency/slots": ("count", "sequences that an engine runs at once: max_num_seqs, or what its KV cache holds"),
    "darts/latency/running_most": ("count", "sequences that an engine did run at its fullest, by its own count"),
    "darts/candidates/launched": ("count", "requests sent for training prompts: the sum of M'_i"),
    "darts/candidates/finished": ("count", "of them, those that ended by themselves"),
    "darts/candidates/truncated": ("count", "of them, those that filled the response budget without ending"),
    "darts/candidates/aborted": ("count", "of them, those that early stop or the deadline ended before their end"),
    "darts/candidates/cut": ("count", "of them, those that were ended so and are kept as the long end"),
    "darts/candidates/lost": ("count", "of them, those a server ended unasked or without a token; 0 in a healthy run"),
    "darts/candidates/kept": ("count", "rows that are trained on: M x prompts"),
    "darts/candidates/dropped": ("count", "launched, not kept: what redundancy costs"),
    "darts/candidates/per_prompt": ("count", "mean M'_i"),
    "darts/tokens/generated": ("tokens", "decoded for training prompts, kept or not"),
    "darts/tokens/kept": ("tokens", "of them, those that are trained on"),
    "darts/tokens/dropped": ("tokens", "of them, those thrown away"),
    "darts/tokens/useful_per_s": ("tokens/s", "kept tokens per second of rollout; the throughput that counts"),
    "darts/length/pool_mean": (
        "tokens",
        "mean length of all, aborted ones with what they had: the policy's own if none is aborted, else below it",
    ),
    "darts/length/pool_p99": ("tokens", "its 99th percentile, a lower bound where some are aborted: what DARTS shapes"),
    "darts/length/pool_max": ("tokens", "longest candidate, a lower bound where some are aborted"),
    "darts/length/kept_mean": ("tokens", "mean length of the kept; below pool_mean, selection is length-biased"),
    "darts/length/kept_max": ("tokens", "longest kept response"),
    "darts/group/max_over_mean": ("ratio", "longest over mean length within a group, mean over groups; 1 is no tail"),
    "darts/group/max_over_median": ("ratio", "longest over median length within a group, median over groups"),
    "darts/group/saturated_share": ("share", "groups with a budget at M_up; about 5 % in the paper"),
    "darts/group/shortest_only_share": ("share", "groups without a long response: the saturated, or as the mode says"),
    "darts/group/cut_share": ("share", "rows that are trained on with a part, since they were cut; L / M at most"),
    "darts/group/filled": ("count", "truncated candidates that filled a group; 0 unless the limit is too tight"),
    "darts/group/no_valid": ("count", "groups in which every candidate was truncated; 0 unless the limit is too tight"),
    "darts/group/returned": (
        "count",
        "groups launched and not trained on: they come again (spare prompts, tail_batching, sorted)",
    ),
    "darts/group/mixed_reward_share": ("share", "groups whose kept rewards differ; only these teach GRPO anything"),
    "darts/selection/arrival_disagreement": ("share", "groups of which order of arrival would have kept others"),
    "darts/reward/kept_mean": ("reward", "mean reward of the kept"),
    "darts/reward/pool_mean": (
        "reward",
        "mean reward of all that nobody aborted (with darts.reward.pool); compare with kept_mean",
    ),
    "darts/rollout/seconds": ("s", "from the batch at the manager to the last group decided and scored"),
    "darts/rollout/own_s": ("s", "planning before the rollout, sorting and learning after it: DARTS's own work"),
    "darts/rollout/tail_s": ("s", "last finish of a kept one to the last request's end; near 0 if losers are aborted"),
    "darts/rollout/weights_step": ("step", "training step of the weights that made the kept; one, or the step fails"),
    "darts/rollout/prefix_cached_share": ("share", "prompt tokens that the servers had in their prefix cache"),
    "darts/early_stop/tokens_after": (
        "tokens",
        "decoded after the decision to abort, by each request's own speed; up to 3 % of the generated",
    ),
    "darts/early_stop/stop_s_mean": ("s", "from the decision to abort to the answer of the server, mean over aborted"),
    "darts/early_stop/stop_s_max": ("s", "the same, slowest; seconds here are a server or network in trouble"),
    "darts/streaming/chunks": ("count", "reports of growth from the servers"),
    "darts/streaming/latency_s": ("s", "a chunk's last token to its arrival at the group, mean; by both hosts' clocks"),
    "darts/strategy/queue": ("count", "prompts that wait to come again (spare prompts, tail_batching, sorted)"),
    "darts/strategy/late": ("count", "prompts that this step launched and did not train on"),
    "darts/strategy/late_times_most": ("count", "how often one prompt came late, at most; 1 with spare prompts"),
    "darts/strategy/waiting_share": ("share", "prompts that were drawn from the data and never trained on so far"),
    "darts/strategy/trained_over_drawn": (
        "ratio",
        "mean length of the prompts trained on so far over that of those drawn; below 1 while slow ones wait",
    ),
    "darts/overlap/hidden_s": ("s", "the actor computed log-probs while generation ran; by the clock of its ranks"),
    "darts/overlap/exposed_s": ("s", "the trainer waited for log-probs after generation, of the reference too"),
    "darts/overlap/hidden_share": ("share", "hidden over hidden and exposed seconds; near 1 where overlap pays"),
    "darts/overlap/calls": ("count", "forwards of the actor for them"),
    "darts/overlap/tokens_forwarded": ("tokens", "of prompts and responses, in those calls"),
    "darts/overlap/tokens_twice": ("tokens", "of them, those of sequences that began again; 0 in a healthy run"),
    "darts/overlap/tokens_wasted": ("tokens", "response tokens of candidates that were not kept"),
    "darts/overlap/forwarded_per_kept": ("ratio", "tokens forwarded per kept response token; prompts count too"),
    "darts/overlap/in_rollout_share": ("share", "kept tokens whose log-probs were there when generation ended"),
    "darts/overlap/before_end_share": ("share", "kept tokens computed when their response ended; 0 in mode sequence"),
    "darts/overlap/late_rows": ("count", "kept rows that verl computed after generation; 0 in a healthy run"),
    "darts/overlap/cache_peak_gib": ("GiB", "keys and values of prefixes on the fullest rank, the forward's included"),
}


def rollout_metrics(pool: CandidatePool, num_keep: int, seconds: float, long_end: str = "finished") -> dict[str, float]:
    """The metrics of one rollout; keys as in `METRICS`.

    Args:
        pool: every launched candidate; not empty.
        num_keep: M.
        seconds: duration of the rollout.
        long_end: what the longest may be, as in `darts.selection`.

    Raises:
        ValueError: an empty pool, or a duration that is not above 0.
    """
    if len(pool) == 0:
        raise ValueError("empty pool: a rollout has at least one candidate.")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0.")
    is_kept, length, truncated, aborted, lost = pool.kept, pool.length, pool.truncated, pool.aborted, pool.lost
    length_or_1 = np.maximum(length, 1)  # one that was aborted before it began has none
    is_invalid, cut = truncated | lost, pool.cut
    groups = [np.flatnonzero(pool.prompt == prompt) for prompt in np.unique(pool.prompt)]
    trained_groups = [rows for rows in groups if is_kept[rows].any()]
    metrics = {
        "darts/candidates/launched": len(pool),
        "darts/candidates/finished": (~pool.censored).sum(),
        "darts/candidates/truncated": truncated.sum(),
        "darts/candidates/aborted": aborted.sum(),
        "darts/candidates/cut": cut.sum(),
        "darts/candidates/lost": lost.sum(),
        "darts/candidates/kept": is_kept.sum(),
        "darts/candidates/dropped": (~is_kept).sum(),
        "darts/candidates/per_prompt": len(pool) / len(groups),
        "darts/tokens/generated": length.sum(),
        "darts/tokens/kept": length[is_kept].sum(),
        "darts/tokens/dropped": length[~is_kept].sum(),
        "darts/tokens/useful_per_s": length[is_kept].sum() / seconds,
        "darts/length/pool_mean": length.mean(),
        "darts/length/pool_p99": np.percentile(length, 99),
        "darts/length/pool_max": length.max(),
        "darts/length/kept_mean": length[is_kept].mean(),
        "darts/length/kept_max": length[is_kept].max(),
        "darts/group/max_over_mean": np.mean([length_or_1[rows].max() / length_or_1[rows].mean() for rows in groups]),
        "darts/group/max_over_median": np.median(
            [length_or_1[rows].max() / np.median(length_or_1[rows]) for rows in groups]
        ),
        "darts/group/saturated_share": np.mean([pool.saturated[rows[0]] for rows in groups]),
        "darts/group/shortest_only_share": np.mean([pool.num_long[rows[0]] == 0 for rows in groups]),
        "darts/group/cut_share": cut[is_kept].mean(),
        "darts/group/filled": sum(
            max(0, (is_kept & pool.censored)[rows].sum() - (pool.num_long[rows[0]] if long_end != "finished" else 0))
            for rows in groups
        ),
        "darts/group/no_valid": sum(is_invalid[rows].all() for rows in groups),
        "darts/group/returned": len(groups) - len(trained_groups),
        "darts/selection/arrival_disagreement": np.mean(
            [_arrival_disagrees(pool, rows, num_keep, long_end) for rows in trained_groups]
        ),
        "darts/rollout/seconds": seconds,
        "darts/rollout/tail_s": pool.ended_at.max() - pool.ended_at[is_kept].max(),
        "darts/rollout/prefix_cached_share": pool.cached_tokens.sum() / max(pool.prompt_tokens.sum(), 1),
        "darts/early_stop/tokens_after": pool.tokens_after.sum(),
        "darts/streaming/chunks": pool.chunks.sum(),
    }
    if (pool.weights_max[is_kept] >= 0).all():
        metrics["darts/rollout/weights_step"] = pool.weights_max[is_kept].max()
    if pool.chunks.any():
        metrics["darts/streaming/latency_s"] = pool.chunk_seconds.sum() / pool.chunks.sum()
    stop_seconds = pool.stop_seconds[~np.isnan(pool.stop_seconds)]
    if len(stop_seconds):
        metrics["darts/early_stop/stop_s_mean"] = stop_seconds.mean()
        metrics["darts/early_stop/stop_s_max"] = stop_seconds.max()
    if not np.isnan(pool.reward[is_kept]).any():
        metrics["darts/reward/kept_mean"] = pool.reward[is_kept].mean()
        metrics["darts/group/mixed_reward_share"] = np.mean(
            [np.ptp(pool.reward[rows[is_kept[rows]]]) > 0 for rows in trained_groups]
        )
    ended_rewards = pool.reward[np.isnan(pool.stop_seconds) & ~aborted & ~cut & ~lost]
    if not np.isnan(ended_rewards).any():
        metrics["darts/reward/pool_mean"] = ended_rewards.mean()
    return {name: float(value) for name, value in metrics.items()}


def _arrival_disagrees(pool: CandidatePool, rows: NDArray[np.int64], num_keep: int, long_end: str) -> bool:
    """Whether selecting by rank of arrival, among those that were chosen from, keeps another set than was kept."""
    # One that ended before its abort arrived was not chosen from, unless it is kept; one that was cut came last.
    is_late = ~np.isnan(pool.stop_seconds[rows])
    rows = rows[pool.kept[rows] | ((pool.arrival[rows] >= 0) & ~is_late)]
    arrival = np.where(pool.arrival[rows] >= 0, pool.arrival[rows], len(pool))
    by_arrival = select(
        arrival.tolist(),
        num_keep,
        int(pool.num_long[rows[0]]),
        pool.truncated[rows],
        long_end=long_end,
        cut=pool.cut[rows],
    )
    return set(rows[by_arrival].tolist()) != set(rows[pool.kept[rows]].tolist())
