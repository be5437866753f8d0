"""What a rollout did, in numbers: the pool of candidates in, the metrics `darts/<area>/<name>` out.

Contract: pure NumPy. `METRICS` is the one list of names with unit and reading; `docs/metrics.md` repeats it (a test
compares them) and `rollout_metrics` gives exactly these, except that those about rewards are absent without rewards.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darts.selection import select

METRICS: dict[str, tuple[str, str]] = {
    "darts/candidates/launched": ("count", "requests sent for training prompts: the sum of M'_i"),
    "darts/candidates/finished": ("count", "of them, those that ended by themselves"),
    "darts/candidates/truncated": ("count", "of them, those that filled the response budget without ending"),
    "darts/candidates/kept": ("count", "rows that are trained on: M x prompts"),
    "darts/candidates/dropped": ("count", "launched, not kept: what redundancy costs"),
    "darts/candidates/per_prompt": ("count", "mean M'_i"),
    "darts/tokens/generated": ("tokens", "decoded for training prompts, kept or not"),
    "darts/tokens/kept": ("tokens", "of them, those that are trained on"),
    "darts/tokens/dropped": ("tokens", "of them, those thrown away"),
    "darts/tokens/useful_per_s": ("tokens/s", "kept tokens per second of rollout; the throughput that counts"),
    "darts/length/pool_mean": ("tokens", "mean response length of all candidates: the policy's own distribution"),
    "darts/length/pool_p99": ("tokens", "99th percentile of the same: the tail that DARTS shapes"),
    "darts/length/pool_max": ("tokens", "longest candidate; it ends a dual-end rollout"),
    "darts/length/kept_mean": ("tokens", "mean length of the kept; below pool_mean, selection is length-biased"),
    "darts/length/kept_max": ("tokens", "longest kept response"),
    "darts/group/max_over_mean": ("ratio", "longest over mean length within a group, mean over groups; 1 is no tail"),
    "darts/group/max_over_median": ("ratio", "longest over median length within a group, median over groups"),
    "darts/group/saturated_share": (
        "share",
        "groups with a budget at M_up; about 5 % in the paper",
    ),
    "darts/group/shortest_only_share": ("share", "groups without a long response: the saturated, or as the mode says"),
    "darts/group/filled": ("count", "truncated candidates that filled a group; 0 unless the limit is too tight"),
    "darts/group/no_valid": ("count", "groups in which every candidate was truncated; 0 unless the limit is too tight"),
    "darts/group/mixed_reward_share": ("share", "groups whose kept rewards differ; only these teach GRPO anything"),
    "darts/selection/arrival_disagreement": (
        "share",
        "groups in which choosing by order of arrival would have kept other candidates than choosing by length",
    ),
    "darts/reward/kept_mean": ("reward", "mean reward of the kept"),
    "darts/reward/pool_mean": ("reward", "mean reward of all candidates (with darts.reward.pool); compare with kept"),
    "darts/rollout/seconds": ("s", "from the first request sent to the last group decided and scored"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePool:
    """All candidates that one rollout launched, one entry each; shape [num_candidates] throughout.

    Example: prompt=[0, 0, 1, 1], candidate=[0, 1, 0, 1], length=[12, 80, 40, 33], arrival=[0, 1, 1, 0], ...
    """

    prompt: NDArray[np.int64]  # position of the prompt in the batch
    candidate: NDArray[np.int64]  # number of the candidate within its prompt
    length: NDArray[np.int64]  # generated tokens, end token included
    truncated: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    arrival: NDArray[np.int64]  # 0 for the first to finish within its prompt
    num_long: NDArray[np.int64]  # L of the candidate's prompt; 0 where it is shortest-only
    saturated: NDArray[np.bool_]  # whether the prompt's budget is M_up
    reward: NDArray[np.float64]  # NaN where the candidate was not scored

    def __len__(self) -> int:
        return len(self.prompt)

    @staticmethod
    def concat(pools: list["CandidatePool"]) -> "CandidatePool":
        """Joins pools whose `prompt` already count over the whole batch."""
        return CandidatePool(
            **{
                name: np.concatenate([getattr(pool, name) for pool in pools])
                for name in CandidatePool.__dataclass_fields__
            }
        )


def rollout_metrics(pool: CandidatePool, num_keep: int, seconds: float) -> dict[str, float]:
    """The metrics of one rollout; keys as in `METRICS`.

    Args:
        pool: every launched candidate; not empty.
        num_keep: M.
        seconds: duration of the rollout.

    Raises:
        ValueError: an empty pool, or a duration that is not above 0.
    """
    if len(pool) == 0:
        raise ValueError("empty pool: a rollout has at least one candidate.")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0.")
    kept, length = pool.kept, pool.length
    groups = [np.flatnonzero(pool.prompt == prompt) for prompt in np.unique(pool.prompt)]
    metrics = {
        "darts/candidates/launched": len(pool),
        "darts/candidates/finished": (~pool.truncated).sum(),
        "darts/candidates/truncated": pool.truncated.sum(),
        "darts/candidates/kept": kept.sum(),
        "darts/candidates/dropped": (~kept).sum(),
        "darts/candidates/per_prompt": len(pool) / len(groups),
        "darts/tokens/generated": length.sum(),
        "darts/tokens/kept": length[kept].sum(),
        "darts/tokens/dropped": length[~kept].sum(),
        "darts/tokens/useful_per_s": length[kept].sum() / seconds,
        "darts/length/pool_mean": length.mean(),
        "darts/length/pool_p99": np.percentile(length, 99),
        "darts/length/pool_max": length.max(),
        "darts/length/kept_mean": length[kept].mean(),
        "darts/length/kept_max": length[kept].max(),
        "darts/group/max_over_mean": np.mean([length[rows].max() / length[rows].mean() for rows in groups]),
        "darts/group/max_over_median": np.median([length[rows].max() / np.median(length[rows]) for rows in groups]),
        "darts/group/saturated_share": np.mean([pool.saturated[rows[0]] for rows in groups]),
        "darts/group/shortest_only_share": np.mean([pool.num_long[rows[0]] == 0 for rows in groups]),
        "darts/group/filled": (kept & pool.truncated).sum(),
        "darts/group/no_valid": sum(pool.truncated[rows].all() for rows in groups),
        "darts/selection/arrival_disagreement": np.mean([_arrival_disagrees(pool, rows, num_keep) for rows in groups]),
        "darts/rollout/seconds": seconds,
    }
    if not np.isnan(pool.reward[kept]).any():
        metrics["darts/reward/kept_mean"] = pool.reward[kept].mean()
        metrics["darts/group/mixed_reward_share"] = np.mean(
            [np.ptp(pool.reward[rows[kept[rows]]]) > 0 for rows in groups]
        )
    if not np.isnan(pool.reward).any():
        metrics["darts/reward/pool_mean"] = pool.reward.mean()
    return {name: float(value) for name, value in metrics.items()}


def _arrival_disagrees(pool: CandidatePool, rows: NDArray[np.int64], num_keep: int) -> bool:
    """Whether selecting by rank of arrival keeps another set than the one that was kept."""
    by_arrival = select(pool.arrival[rows].tolist(), num_keep, int(pool.num_long[rows[0]]), pool.truncated[rows])
    return set(rows[by_arrival].tolist()) != set(rows[pool.kept[rows]].tolist())
