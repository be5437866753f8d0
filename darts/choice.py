"""How many candidates and spare prompts make rollouts fastest: a small grid, by the cost model (`plan`, in settings).

Contract: pure; moments of recent prompts and a function that gives a rollout's seconds in, one `Choice` out. All here
is our choice. Draws have a fixed seed, so that choices do not change by chance.

1. A batch is drawn from the recent prompts; lengths as in `darts.forecast`. With spare prompts a round ends with the
   first `num_prompts` settled groups; those that came late make rounds of their own, whose time is in the mean.
2. No option generates more than `MOST_TOKENS` times the tokens of plain verl.
3. Of options within `ALIKE` of the fastest the one that generates the fewest tokens is taken.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from darts.config import PLANNED, DartsConfig
from darts.forecast import group_ends, log_normal_lengths, until
from darts.strategy import SPARES, Choice, times

CANDIDATES = (1.0, 1.01, 1.25, 1.5)
"""Candidates that are compared, as a multiple of M, rounded up: 8, 9, 10 and 12 of 8."""
BATCHES = 8
"""So many batches are drawn."""
MOST_TOKENS = 1.25
ALIKE = 0.01

Seconds = Callable[[NDArray[np.float64]], float]
"""Decoded tokens, shape [draws, num_prompts, most], to the seconds of a rollout, mean over the draws."""


def options_of(darts: DartsConfig) -> list[tuple[int, float]]:
    """What is compared: the grid, where the settings do not give a number."""
    allocation, spare_prompts = darts.allocation, darts.spare_prompts
    counts: Sequence[int] = [darts.group_size if allocation.mode == "off" else math.ceil(allocation.fallback_mean)]
    if allocation.mode != "off" and allocation.mean_candidates == PLANNED:
        counts = sorted({times(darts.group_size, factor) for factor in CANDIDATES})
        counts = [count for count in counts if allocation.low <= count <= allocation.high] or [allocation.low]
    spares = SPARES if spare_prompts == PLANNED else (float(spare_prompts),)
    return [(count, spare) for count in counts for spare in spares]


def choose(
    seconds: Seconds,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    darts: DartsConfig,
    num_prompts: int,
    response_length: int,
) -> Choice:
    """The fastest option.

    Args:
        seconds: of a rollout.
        mean: of recent prompts' lengths in tokens, shape [num_recent], at least one.
        std: the same.
        darts: the rules.
        num_prompts: that a step trains on.
        response_length: longest response.
    """
    plain_tokens = float(np.minimum(mean, response_length).mean()) * darts.group_size * num_prompts
    option_seconds: dict[tuple[int, float], float] = {}
    option_tokens: dict[tuple[int, float], float] = {}
    for count, spare in options_of(darts):
        step_s, step_tokens = _step(seconds, mean, std, darts, num_prompts, response_length, count, spare)
        option_seconds[count, spare], option_tokens[count, spare] = step_s, step_tokens / plain_tokens
    frugal = [option for option, tokens in option_tokens.items() if tokens <= MOST_TOKENS]
    frugal = frugal or [min(option_tokens, key=lambda option: option_tokens[option])]
    fastest_s = min(option_seconds[option] for option in frugal)
    alike = [option for option in frugal if option_seconds[option] <= (1 + ALIKE) * fastest_s]
    count, spare = min(alike, key=lambda option: option_tokens[option])
    return Choice(candidates=count, spare_prompts=spare, seconds=option_seconds, tokens=option_tokens)


def _step(
    seconds: Seconds,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    darts: DartsConfig,
    num_prompts: int,
    limit: int,
    count: int,
    spare: float,
) -> tuple[float, float]:
    """Expected seconds and tokens of a step's rollout, those of late prompts' rounds included."""
    rng = np.random.default_rng(0)
    low, high = min(darts.allocation.low, count), max(darts.allocation.high, count)
    allocation = replace(darts.allocation, mode="uniform", mean_candidates=float(count), low=low, high=high)
    rules = replace(darts, allocation=allocation)

    def run(prompts: NDArray[np.int64], harvest: int | None) -> tuple[float, float, NDArray[np.int64]]:
        """A round of `prompts`, shape [draws, launched]: seconds, tokens, and who came late."""
        num_launched = prompts.shape[1]
        lengths = log_normal_lengths(mean[prompts], std[prompts], rng.standard_normal((*prompts.shape, count)), limit)
        budgets = np.full(num_launched, count)
        settled_at, ends_at = group_ends(lengths, budgets, rules, limit, harvest)
        decoded = until(lengths, budgets, ends_at)
        late_places = np.argsort(settled_at, axis=1, kind="stable")[:, num_launched if harvest is None else harvest :]
        late_prompts = np.take_along_axis(prompts, late_places, axis=1)
        return seconds(decoded), float(decoded.sum()) / len(prompts), late_prompts

    num_spare = times(num_prompts, spare)
    prompts = rng.integers(0, len(mean), (BATCHES, num_prompts + num_spare))
    round_s, round_tokens, late_prompts = run(prompts, num_prompts if num_spare else None)
    if not num_spare:
        return round_s, round_tokens
    own_s, own_tokens, _ = run(rng.choice(late_prompts.ravel(), (BATCHES, num_prompts)), None)
    # After num_prompts / num_spare rounds those that came late make one of their own.
    weights = np.array([num_prompts, num_spare]) / (num_prompts + num_spare)
    return float(weights @ [round_s, own_s]), float(weights @ [round_tokens, own_tokens])
