"""What a rollout will take: drawn lengths, the rules that cut them, and the cost model that turns them into seconds.

Contract: pure. Lengths are always drawn with the same seed, so totals of candidates are compared on the same draws, and
do not change from step to step by chance.

1. Lengths of a prompt are log-normal with its mean and std (our choice), at most the response limit.
2. What the groups stop is stopped where their rules say, counted in tokens: all candidates start together.
3. Candidates go to the engines in turns, in the order in which they are launched: as `darts.routing=balanced` does it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.config import DartsConfig
from darts.group import num_due
from darts.history import are_amounts
from darts.latency import LatencyCurve, StepTimes, decode_seconds

REFINE_WEIGHT = 0.3
"""Weight of a new rollout in the refined curve (our choice)."""
OVERHEADS = 5
"""Rollouts over which the median of what decoding does not explain is taken: the first one may be slow (our choice)."""
LEAST_DRAWS = 16
"""A batch is drawn so often: with fewer draws the best total changes by chance (our choice)."""
DRAWN_CANDIDATES = 2048
"""A small batch is drawn more often, until there are so many candidates (our choice)."""


def draw_lengths(mean: NDArray[np.float64], std: NDArray[np.float64], most: int, limit: int) -> NDArray[np.float64]:
    """Lengths of `most` candidates of each prompt, in tokens.

    Args:
        mean: of each prompt's lengths, shape [num_prompts], at least one prompt.
        std: the same.
        most: candidates per prompt.
        limit: longest response.

    Returns:
        Whole numbers in [1, limit], shape [draws, num_prompts, most].
    """
    num_draws = max(LEAST_DRAWS, -(-DRAWN_CANDIDATES // (len(mean) * most)))
    normal_draws = np.random.default_rng(0).standard_normal((num_draws, len(mean), most))
    mean = np.maximum(mean, 1.0)[:, None]
    log_variance = np.log1p((std[:, None] / mean) ** 2)
    return np.clip(np.ceil(np.exp(np.log(mean) - log_variance / 2 + np.sqrt(log_variance) * normal_draws)), 1, limit)


def stopped_lengths(
    lengths: NDArray[np.float64], budgets: NDArray[np.int64], darts: DartsConfig, limit: int
) -> NDArray[np.float64]:
    """What is decoded of each length when groups stop what they do not need (`darts.group`).

    Args:
        lengths: shape [draws, num_prompts, most]; of each prompt, the first `budgets` run.
        budgets: M'_i.
        darts: the rules.
        limit: response length; a length of `limit` is that of a truncated response, which is not valid.

    Returns:
        The same shape; what does not run has 0.
    """
    return until(lengths, budgets, group_ends(lengths, budgets, darts, limit)[1])


def until(
    lengths: NDArray[np.float64], budgets: NDArray[np.int64], ends_at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What is decoded of each length where groups end after so many tokens; what does not run has 0."""
    is_launched = np.arange(lengths.shape[-1]) < budgets[:, None]
    return np.where(is_launched, np.minimum(lengths, ends_at[..., None]), 0.0)


def group_ends(
    lengths: NDArray[np.float64], budgets: NDArray[np.int64], darts: DartsConfig, limit: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """When groups are settled, and when what runs of them is stopped, in tokens; arguments as `stopped_lengths`.

    Returns:
        Both of shape [draws, num_prompts].
    """
    # 1. The rules of each group: of how many valid ones it may be decided, and whether it stops then, or by a deadline.
    rules_of_budget = {budget: darts.group_rules(budget) for budget in set(budgets.tolist())}
    group_rules = [rules_of_budget[budget] for budget in budgets.tolist()]
    # 2. When so many valid ones have ended (inf: never), and when all have.
    is_launched = np.arange(lengths.shape[-1]) < budgets[:, None]
    valid_lengths = np.sort(np.where(is_launched & (lengths < limit), lengths, np.inf), axis=-1)
    last_end = np.where(is_launched, lengths, 0.0).max(axis=-1)
    least_valid = np.array([each.num_keep - (each.num_long if each.cuts else 0) for each in group_rules])
    enough_valid = np.take_along_axis(
        valid_lengths, np.broadcast_to(least_valid[:, None] - 1, (*last_end.shape, 1)), axis=-1
    )[..., 0]
    stops_at_once, awaits_deadline = np.array(
        [(each.stops_when_settled, each.awaits_deadline) for each in group_rules]
    ).T
    settled_at = np.where(stops_at_once | awaits_deadline, np.minimum(enough_valid, last_end), last_end)
    # 3. A deadline falls when enough groups are settled; the others end when they are.
    deadline = np.partition(settled_at, num_due(len(budgets)) - 1, axis=-1)[..., num_due(len(budgets)) - 1, None]
    ends_at = np.where(awaits_deadline, np.minimum(last_end, np.maximum(settled_at, deadline)), settled_at)
    return settled_at, ends_at


def _deal(launched: NDArray[np.float64], num_engines: int) -> NDArray[np.float64]:
    """Deals sequences out to engines one by one: shape [draws, launched] -> [draws, num_engines, most of an engine].

    An engine with one fewer has one of 0 tokens in the end.
    """
    num_draws, num_launched = launched.shape
    most_sequences = -(-num_launched // num_engines)
    dealt_tokens = np.zeros((num_draws, most_sequences * num_engines))
    dealt_tokens[:, :num_launched] = launched
    return dealt_tokens.reshape(num_draws, most_sequences, num_engines).swapaxes(1, 2)


@dataclass(eq=False)
class CostModel:
    """Seconds of a rollout: the slowest engine's decoding, and what every rollout takes besides (paper, cost model).

    The latter (prefill, agent loops, scoring) is 0 until `refine` has seen rollouts (our choice).
    """

    curve: LatencyCurve  # PTL of one engine
    source: str  # says where the curve comes from
    overheads: Sequence[float] = ()  # seconds of the last rollouts that decoding does not explain

    @property
    def overhead_s(self) -> float:
        """Seconds that a rollout takes besides decoding: the median of the last ones."""
        return statistics.median(self.overheads) if self.overheads else 0.0

    def seconds(self, lengths: NDArray[np.float64], num_engines: int, max_running: int | None) -> float:
        """Mean over the draws, with what a rollout takes besides decoding.

        Args:
            lengths: decoded tokens in the order of launch, shape [draws, num_prompts, most]; those of 0 do not run.
            num_engines: that share the rollout.
            max_running: sequences that an engine runs at once; None: no limit.
        """
        drawn_lengths = lengths.reshape(len(lengths), -1)
        is_launched = drawn_lengths > 0
        if (is_launched == is_launched[0]).all():  # as many of each prompt in all draws: at once, for speed
            launched_lengths = [drawn_lengths[:, is_launched[0]]]
        else:
            launched_lengths = [draw[draw > 0][None] for draw in drawn_lengths]
        engine_tokens = [_deal(draws, num_engines) for draws in launched_lengths]
        slowest_seconds = [decode_seconds(tokens, self.curve, max_running).max(axis=1) for tokens in engine_tokens]
        return float(np.mean(slowest_seconds)) + self.overhead_s

    def refine(
        self,
        decoded: NDArray[np.int64],
        seconds: float,
        step_times: StepTimes,
        num_engines: int,
        max_running: int | None,
    ) -> None:
        """Follows what a rollout showed.

        Args:
            decoded: tokens of each candidate in the order of launch, shape [num_candidates].
            seconds: of the rollout.
            step_times: what its engines' chunks showed.
            num_engines: as of `seconds`, and `max_running`.
        """
        self.curve = self.curve.refined(step_times, REFINE_WEIGHT, max_running)
        explained_s = self.seconds(decoded[None, None].astype(np.float64), num_engines, max_running) - self.overhead_s
        self.overheads = [*self.overheads, max(seconds - explained_s, 0.0)][-OVERHEADS:]

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"curve": self.curve.to_dict(), "source": self.source, "overheads": list(self.overheads)}

    @classmethod
    def from_state(cls, state: Any) -> "CostModel":
        """The model that `state_dict` gave; a `ValueError` says what is wrong with something else."""
        if not isinstance(state, dict) or set(state) != {"curve", "source", "overheads"}:
            raise ValueError(f"cost model={state!r:.80}: must have curve, source and overheads.")
        source, overheads = state["source"], state["overheads"]
        if not isinstance(source, str):
            raise ValueError(f"source={source!r}: must be a text.")
        if not are_amounts(overheads):
            raise ValueError(f"overheads={overheads!r:.80}: must be finite numbers that are not negative.")
        return cls(LatencyCurve.from_dict(state["curve"]), source, overheads[-OVERHEADS:])
