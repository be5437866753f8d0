"""How many candidates each prompt gets, and which worker runs them.

Contract: pure NumPy. Budgets are integers within [low, high] and sum to the total they were asked for; ties go to the
prompt with the lower index.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Utility(NamedTuple):
    """What a total of candidates is expected to bring; U = E - lambda T (paper, "adaptive redundancy allocation").

    Example: total=84, utility=0.11, gain=0.19, cost=0.08 for 8 prompts with 10.5 candidates in the mean.
    """

    total: int  # M_total, candidates of the batch
    utility: float  # U
    gain: float  # E, expected shaping
    cost: float  # T, time of the rollout over that of M candidates per prompt, minus 1


def allocate(weights: ArrayLike, total: int, low: int, high: int) -> NDArray[np.int64]:
    """The budgets that minimise sum(weights / budgets): paper, "variance-based adaptive redundancy allocation".

    The problem is separable and convex: the candidates beyond `low` go where the objective falls most, which is by
    w / (m (m + 1)) for the step from m to m + 1. So the largest of all these steps are taken, found by partition.

    Args:
        weights: w_i of each prompt, at least 0, shape [num_prompts]; only ratios matter.
        total: M_total, in [low x num_prompts, high x num_prompts].
        low: M_low, fewest candidates of a prompt.
        high: M_up, most candidates of a prompt.

    Returns:
        Budgets, shape [num_prompts].

    Raises:
        ValueError: weights that are negative or not finite, bounds out of order, or a total that they do not allow.

    Example:
        >>> allocate([1.0, 1.0, 4.0], total=30, low=8, high=16).tolist()
        [8, 8, 14]
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 1:
        raise ValueError(f"weights: shape {weights.shape}, must be one weight per prompt.")
    _check_bounds(low, high)
    bad_weights = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad_weights):
        raise ValueError(f"weights[{bad_weights[0]}]={weights[bad_weights[0]]}: must be finite and not negative.")
    least_total, most_total = low * len(weights), high * len(weights)
    if total != int(total):
        raise ValueError(f"total={total}: must be a whole number of candidates.")
    if not least_total <= total <= most_total:
        raise ValueError(
            f"total={total}: {len(weights)} prompts with low={low} and high={high} take {least_total} to {most_total} "
            "candidates."
        )
    num_extra = int(total) - least_total
    if num_extra == 0 or total == most_total:
        return np.full(len(weights), low if num_extra == 0 else high, dtype=np.int64)
    step_counts = np.arange(low, high)
    step_gains = weights[:, None] / (step_counts * (step_counts + 1))  # [num_prompts, high - low], each row falling
    smallest_taken = np.partition(step_gains.ravel(), step_gains.size - num_extra)[step_gains.size - num_extra]
    sure_steps = (step_gains > smallest_taken).sum(axis=1)
    tied_steps = (step_gains == smallest_taken).sum(axis=1)
    tied_places = num_extra - sure_steps.sum()
    return low + sure_steps + np.clip(tied_places - (np.cumsum(tied_steps) - tied_steps), 0, tied_steps)


def largest_total(weights: ArrayLike, low: int, high: int, *, most_saturated: float) -> int:
    """The largest total of which `allocate` gives at most this share of the prompts, rounded up, `high` candidates.

    Args:
        weights: w_i, shape [num_prompts].
        low: M_low.
        high: M_up.
        most_saturated: share of the prompts, in [0, 1].

    Raises:
        ValueError: as `allocate`, or a share outside [0, 1].

    Example:
        >>> largest_total([1.0, 1.0, 1.0, 9.0], 2, 4, most_saturated=0.25)
        13
    """
    if not 0 <= most_saturated <= 1:
        raise ValueError(f"most_saturated={most_saturated}: must lie in [0, 1].")
    num_prompts = len(np.asarray(weights))
    num_allowed = math.ceil(round(most_saturated * num_prompts, 6))
    least, most = low * num_prompts, high * num_prompts  # of `least` none is saturated, if `low` is below `high`
    if low == high or num_allowed >= num_prompts:
        return most
    while least < most:  # the saturated are never fewer with a larger total
        middle = (least + most + 1) // 2
        if (allocate(weights, middle, low, high) == high).sum() <= num_allowed:
            least = middle
        else:
            most = middle - 1
    return least


def optimal_total(
    num_prompts: int,
    low: int,
    high: int,
    *,
    seconds: Sequence[float],
    base_seconds: float,
    group_size: int,
    variation: float,
    cost_weight: float = 1.0,
    total: int | None = None,
) -> Utility:
    """The total that maximises U(m) = E(m) - lambda T(m) over the mean m of candidates per prompt (paper, section 2).

    E(m) = variation x (1 - M / m) and T(m) = seconds(m) / base_seconds - 1 are our choice; seconds(m) is linear between
    whole m. So U is concave between whole m, and the best whole total lies next to its stationary point or at an end:
    exact, whatever the number of prompts. Ties go to the smaller total.

    Args:
        num_prompts: prompts in the batch.
        low: M_low.
        high: M_up.
        seconds: expected rollout time with m = low, low + 1, ..., high candidates for every prompt.
        base_seconds: the same with M candidates.
        group_size: M.
        variation: sigma_D / mean length, the dataset-level std of response length over its mean.
        cost_weight: lambda.
        total: whose utility is asked for; None: the best.

    Raises:
        ValueError: a negative or non-finite number, bounds out of order, a total outside them, or another number of
            seconds than of means.

    Example:
        >>> optimal_total(4, 8, 10, seconds=[2.0, 2.0, 3.0], base_seconds=2.0, group_size=8, variation=0.5).total
        36
    """
    if num_prompts < 0:
        raise ValueError(f"num_prompts={num_prompts}: must not be negative.")
    _check_bounds(low, high)
    if len(seconds) != high - low + 1:
        raise ValueError(f"seconds: {len(seconds)} values, must be {high - low + 1}, one for each of {low} to {high}.")
    if not (np.isfinite(base_seconds) and base_seconds > 0):
        raise ValueError(f"base_seconds={base_seconds}: must be finite and above 0.")
    amounts = (*(("seconds", value) for value in seconds), ("variation", variation), ("cost_weight", cost_weight))
    for name, value in amounts:
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: must be finite and not negative.")
    if total is not None and not low * num_prompts <= total <= high * num_prompts:
        raise ValueError(f"total={total}: must lie in [{low * num_prompts}, {high * num_prompts}].")
    if num_prompts == 0:
        return Utility(0, 0.0, 0.0, 0.0)
    if total is not None:
        totals = np.array([total])
    else:
        cost_slopes = cost_weight * np.diff(seconds) / base_seconds
        starts = np.arange(low, high)  # of the intervals between whole means
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            stationary_means = np.where(cost_slopes > 0, np.sqrt(variation * group_size / cost_slopes), starts + 1)
        inner_totals = np.clip(stationary_means, starts, starts + 1) * num_prompts
        whole_totals = np.arange(low, high + 1) * num_prompts
        totals = np.unique(np.concatenate([whole_totals, np.floor(inner_totals), np.ceil(inner_totals)]))
    means = totals / num_prompts
    gains = variation * (1 - group_size / means)
    costs = np.interp(means, np.arange(low, high + 1), seconds) / base_seconds - 1
    best_index = int(np.argmax(gains - cost_weight * costs))
    best_gain, best_cost = float(gains[best_index]), float(costs[best_index])
    return Utility(int(totals[best_index]), best_gain - cost_weight * best_cost, best_gain, best_cost)


def rounded_total(num_prompts: int, mean: float) -> int:
    """round(mean x prompts), half up.

    With equal weights `allocate` then gives the first prompts of a batch one candidate more than the others, where it
    does not divide: a mean of 10.5 is 11 for half of them and 10 for half. The order is the sampler's: nobody's favour.
    """
    return int(np.floor(mean * num_prompts + 0.5))


def contiguous_parts(budgets: NDArray[np.int64], num_parts: int) -> list[NDArray[np.int64]]:
    """Splits the prompts, in their order, into at most `num_parts` parts of about equally many candidates.

    A group is never split. The budgets are M'_i, shape [num_prompts]; a part is the positions of its prompts, and there
    is none without a prompt. A `ValueError` where fewer than one part is asked for.
    """
    _check_parts(num_parts)
    if len(budgets) == 0:
        return []
    group_middles = np.cumsum(budgets) - budgets / 2
    part_of_prompt = np.minimum((group_middles * num_parts / budgets.sum()).astype(np.int64), num_parts - 1)
    return np.split(np.arange(len(budgets)), np.flatnonzero(np.diff(part_of_prompt)) + 1)


def spread_parts(work: ArrayLike, num_parts: int) -> list[NDArray[np.int64]]:
    """Splits the prompts into parts of about equal work, each from the heaviest to the lightest (our choice).

    Longest processing time first: each prompt, from the heaviest, goes to the part with the least work. So heavy
    prompts are spread over the parts, and started first. `work` is each prompt's expected work, at least 0, shape
    [num_prompts]; parts and errors are as of `contiguous_parts`, and work that is negative or not finite is one.
    """
    _check_parts(num_parts)
    work = np.asarray(work, dtype=np.float64)
    if not (np.isfinite(work) & (work >= 0)).all():
        raise ValueError(f"work={work[~(np.isfinite(work) & (work >= 0))][0]}: must be finite and not negative.")
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    part_loads = [(0.0, 0, part) for part in range(num_parts)]  # work, prompts, part
    for prompt in np.argsort(-work, kind="stable").tolist():
        part_load, prompts, part = heapq.heappop(part_loads)
        parts[part].append(prompt)
        heapq.heappush(part_loads, (part_load + work[prompt], prompts + 1, part))
    return [np.array(part, dtype=np.int64) for part in parts if part]


def _check_bounds(low: int, high: int) -> None:
    if not 1 <= low <= high:
        raise ValueError(f"low={low}, high={high}: must satisfy 1 <= low <= high.")


def _check_parts(num_parts: int) -> None:
    if num_parts < 1:
        raise ValueError(f"num_parts={num_parts}: must be at least 1.")
