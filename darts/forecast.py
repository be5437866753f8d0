"""What a rollout will take: drawn lengths, the rules that cut them, and the cost model that turns them into seconds.

Contract: pure. Lengths are always drawn with the same seed, so totals of candidates are compared on the same draws, and
do not change from step to step by chance.

1. Lengths of a prompt are log-normal with its mean and std (our choice), at most the response limit.
2. What the groups stop is stopped where their rules say, counted in tokens: all candidates start together.
3. Candidates go to the engines in turns, in the order in which they are launched: as `darts.routing=balanced` does it.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.config import DartsConfig
from darts.latency import LatencyCurve, StepTimes

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
    draws = max(LEAST_DRAWS, -(-DRAWN_CANDIDATES // (len(mean) * most)))
    normal = np.random.default_rng(0).standard_normal((draws, len(mean), most))
    mean = np.maximum(mean, 1.0)[:, None]
    variance = np.log1p((std[:, None] / mean) ** 2)
    return np.clip(np.ceil(np.exp(np.log(mean) - variance / 2 + np.sqrt(variance) * normal)), 1, limit)


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
    size, early = darts.group_size, darts.early_stop != "off"
    runs = np.arange(lengths.shape[-1]) < budgets[:, None]
    valid = np.where(runs & (lengths < limit), lengths, np.inf)
    enough = np.partition(valid, size - 1, axis=-1)[..., size - 1]  # when M valid ones have ended; inf: never
    last = np.where(runs, lengths, 0.0).max(axis=-1)
    shortest_only = np.array([darts.num_long_for(int(budget)) == 0 for budget in budgets], dtype=bool)
    ends = np.where(shortest_only & early, np.minimum(enough, last), last)
    if darts.selection.long_wait == "deadline":
        settled = np.where(shortest_only, ends, np.minimum(enough, last))
        ends = np.where(shortest_only, ends, np.minimum(ends, settled.max(axis=-1, keepdims=True)))
    return np.where(runs, np.minimum(lengths, ends[..., None]), 0.0)


class CostModel:
    """Seconds of a rollout: the slowest engine's decoding, and what every rollout takes besides (paper, cost model).

    The latter (prefill, agent loops, scoring) is 0 until `refine` has seen rollouts (our choice).

    Args:
        curve: PTL of one engine.
        source: says where the curve comes from.
        overheads: seconds of the last rollouts that decoding does not explain.
    """

    def __init__(self, curve: LatencyCurve, source: str, overheads: Sequence[float] = ()) -> None:
        self.curve = curve
        self.source = source
        self._overheads = list(overheads)[-OVERHEADS:]

    @property
    def overhead_s(self) -> float:
        """Seconds that a rollout takes besides decoding: the median of the last ones."""
        return statistics.median(self._overheads) if self._overheads else 0.0

    def seconds(self, lengths: NDArray[np.float64], num_engines: int, max_running: int | None) -> float:
        """Mean over the draws, with what a rollout takes besides decoding.

        Args:
            lengths: decoded tokens in the order of launch, shape [draws, num_prompts, most]; those of 0 do not run.
            num_engines: that share the rollout.
            max_running: sequences that an engine runs at once; None: no limit.
        """
        draws = lengths.reshape(len(lengths), -1)
        runs = draws > 0
        if (runs == runs[0]).all():  # as many of each prompt in all draws: at once, for speed
            return float(self._slowest(draws[:, runs[0]], num_engines, max_running).mean()) + self.overhead_s
        slowest = [self._slowest(draw[draw > 0][None], num_engines, max_running)[0] for draw in draws]
        return float(np.mean(slowest)) + self.overhead_s

    def _slowest(self, launched: NDArray[np.float64], num_engines: int, max_running: int | None) -> NDArray[np.float64]:
        """As `darts.latency.makespan` for each draw; shape [draws, launched] -> [draws]."""
        count = launched.shape[1]
        deepest = -(-count // num_engines)
        if max_running is not None and deepest > max_running:
            engines = range(num_engines)
            return np.array(
                [max(self._queued(draw[engine::num_engines], max_running) for engine in engines) for draw in launched]
            )
        tokens = np.zeros((len(launched), deepest * num_engines))  # an engine with one fewer has one of 0 tokens
        tokens[:, :count] = launched
        return self._together(tokens.reshape(len(launched), deepest, num_engines).swapaxes(1, 2)).max(axis=1)

    def _together(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of sequences that start together: shape [..., sequences] -> [...]."""
        step_seconds = self.curve(np.arange(tokens.shape[-1], -1, -1))
        # sum_j (l_j - l_(j-1)) p_j = sum_j l_j (p_j - p_(j+1))
        return np.sort(tokens, axis=-1) @ -np.diff(step_seconds)

    def _queued(self, tokens: NDArray[np.float64], slots: int) -> float:
        """Seconds of an engine whose sequences wait for a free slot in their order.

        As many are taken from the queue at once as start before the first of them ends.
        """
        free, waited, queue = np.sort(tokens[:slots]), 0.0, tokens[slots:]
        while len(queue):
            ends = free[: len(queue)] + queue[: len(free)]
            late = free[1 : len(ends)] > np.minimum.accumulate(ends)[:-1]
            count = int(np.argmax(late)) + 1 if late.any() else len(ends)
            waited = float(free[count - 1])
            free, queue = np.sort(np.concatenate([free[count:], ends[:count]])), queue[count:]
        return waited * self.curve(slots) + float(self._together(free - waited))

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
            num_engines: as of `seconds`.
            max_running: as of `seconds`.
        """
        self.curve = self.curve.refined(step_times, REFINE_WEIGHT, max_running)
        explained = self.seconds(decoded[None, None].astype(np.float64), num_engines, max_running) - self.overhead_s
        self._overheads = [*self._overheads, max(seconds - explained, 0.0)][-OVERHEADS:]

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"curve": self.curve.to_dict(), "source": self.source, "overheads": list(self._overheads)}

    @classmethod
    def from_state(cls, state: Any) -> "CostModel":
        """What `state_dict` gave.

        Raises:
            ValueError: something else; the message says what is wrong.
        """
        if not isinstance(state, dict) or set(state) != {"curve", "source", "overheads"}:
            raise ValueError(f"cost model={state!r:.80}: must have curve, source and overheads.")
        source, overheads = state["source"], state["overheads"]
        if not isinstance(source, str):
            raise ValueError(f"source={source!r}: must be a text.")
        if not (isinstance(overheads, list) and all(_is_seconds(overhead) for overhead in overheads)):
            raise ValueError(f"overheads={overheads!r:.80}: must be finite numbers that are not negative.")
        return cls(LatencyCurve.from_dict(state["curve"]), source, overheads)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value)) and value >= 0
