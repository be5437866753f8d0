"""What a rollout will take: drawn lengths, the rules that cut them, and the cost model that turns them into seconds.

Contract: pure. Lengths are always drawn with the same seed, so totals of candidates are compared on the same draws, and
do not change from step to step by chance.

1. Lengths of a prompt are log-normal with its mean and std (our choice), at most the response limit.
2. What the groups stop is stopped where their rules say, counted in tokens: all candidates start together.
3. Candidates go to the engines in turns, in the order in which they are launched: as `darts.routing=balanced` does it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
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
OVERHEADS_APART = 24
"""Rollouts that say how it grows with the candidates (our choice)."""
LEAST_APART, APART = 3, 1.2
"""It takes so many rollouts with few candidates and as many with many, in the median this factor apart (our choice)."""
KV_SLACK = 0.1
"""A KV cache that differs by less is the same: vLLM measures the memory that is free at each start (our choice)."""
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
    return log_normal_lengths(mean, std, normal_draws, limit)


def log_normal_lengths(
    mean: NDArray[np.float64], std: NDArray[np.float64], normal_draws: NDArray[np.float64], limit: int
) -> NDArray[np.float64]:
    """Whole lengths in [1, limit] of draws of a standard normal, shape [..., num_prompts, most], by the moments of each
    prompt's lengths, shape [..., num_prompts]."""
    mean = np.maximum(mean, 1.0)[..., None]
    log_variance = np.log1p((std[..., None] / mean) ** 2)
    return np.clip(np.ceil(np.exp(np.log(mean) - log_variance / 2 + np.sqrt(log_variance) * normal_draws)), 1, limit)


def stopped_lengths(
    lengths: NDArray[np.float64], budgets: NDArray[np.int64], darts: DartsConfig, limit: int, harvest: int | None = None
) -> NDArray[np.float64]:
    """What is decoded of each length when groups stop what they do not need (`darts.group`).

    Args:
        lengths: shape [draws, num_prompts, most]; of each prompt, the first `budgets` run.
        budgets: M'_i.
        darts: the rules.
        limit: response length; a length of `limit` is that of a truncated response, which is not valid.
        harvest: the rollout goes on with the first so many groups that are settled; None: with all.

    Returns:
        The same shape; what does not run has 0.
    """
    return until(lengths, budgets, group_ends(lengths, budgets, darts, limit, harvest)[1])


def until(
    lengths: NDArray[np.float64], budgets: NDArray[np.int64], ends_at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What is decoded of each length where groups end after so many tokens; what does not run has 0."""
    is_launched = np.arange(lengths.shape[-1]) < budgets[:, None]
    return np.where(is_launched, np.minimum(lengths, ends_at[..., None]), 0.0)


def group_ends(
    lengths: NDArray[np.float64], budgets: NDArray[np.int64], darts: DartsConfig, limit: int, harvest: int | None = None
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
    # 3. A deadline falls when enough groups are settled; the others end when they are, or with a harvest at once.
    num_needed = num_due(len(budgets)) if harvest is None else harvest
    deadline = np.partition(settled_at, num_needed - 1, axis=-1)[..., num_needed - 1, None]
    ends_at = np.where(awaits_deadline, np.minimum(last_end, np.maximum(settled_at, deadline)), settled_at)
    return settled_at, ends_at if harvest is None else np.minimum(ends_at, deadline)


def _deal(launched: NDArray[np.float64], num_engines: int) -> NDArray[np.float64]:
    """Deals sequences out to engines one by one: shape [draws, launched] -> [draws, num_engines, most of an engine].

    An engine with one fewer has one of 0 tokens in the end.
    """
    num_draws, num_launched = launched.shape
    most_sequences = -(-num_launched // num_engines)
    dealt_tokens = np.zeros((num_draws, most_sequences * num_engines))
    dealt_tokens[:, :num_launched] = launched
    return dealt_tokens.reshape(num_draws, most_sequences, num_engines).swapaxes(1, 2)


def engine_slots(
    lengths: NDArray[np.float64], max_running: int | None, kv_tokens: int | None, prompt_tokens: float = 0.0
) -> int | None:
    """Sequences that an engine runs at once: `max_num_seqs`, or as many as its KV cache has room for.

    A running sequence holds its prompt and what it has decoded. The latter is E[l^2] / (2 E[l]) in the mean (our
    choice): whoever looks at a busy engine finds a sequence of length l with a chance that grows with l, and half done.

    Args:
        lengths: decoded tokens of sequences, any shape; those of 0 do not run.
        max_running: `max_num_seqs`; None: no limit.
        kv_tokens: tokens for which the engine's KV cache has room; None: no limit.
        prompt_tokens: that a sequence holds and shares with no other, in the mean.

    Returns:
        At least 1; None: no limit.
    """
    total_tokens = float(lengths.sum())
    if kv_tokens is None or total_tokens == 0:
        return max_running
    held_tokens = prompt_tokens + float(np.square(lengths).sum()) / (2 * total_tokens)
    kv_slots = max(int(kv_tokens / held_tokens), 1)
    return kv_slots if max_running is None else min(kv_slots, max_running)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEngines:
    """The engines that a cost model is of.

    Example: `MeasuredEngines(model="9f2c", device="NVIDIA H100 80GB HBM3", tensor_parallel=4, engines=8,
    max_num_seqs=512, kv_tokens=400_000)`.
    """

    model: str  # as `darts.checks.model.model_id` gives it
    device: str
    tensor_parallel: int
    engines: int  # that share a rollout
    max_num_seqs: int
    kv_tokens: int | None  # for which the KV cache of an engine has room; None: not known, or no limit

    def differences(self, other: "MeasuredEngines") -> list[str]:
        """What makes these engines others, e.g. `["engines 8 instead of 4"]`; empty: a cost model fits both."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        here, there = pairs["kv_tokens"]
        if here and there and abs(here - there) <= KV_SLACK * max(here, there):
            del pairs["kv_tokens"]
        return [f"{name} {here} instead of {there}" for name, (here, there) in pairs.items() if here != there]

    @classmethod
    def from_state(cls, state: Any) -> "MeasuredEngines":
        """The engines that `dataclasses.asdict` described; a `ValueError` for anything else."""
        names = [each.name for each in fields(cls)]
        if not isinstance(state, dict) or set(state) != set(names):
            raise ValueError(f"engines={state!r:.200}: must have {', '.join(names)}.")
        for name, value in state.items():
            kind, rule = (str, "a text") if name in ("model", "device") else (int, "an integer")
            if type(value) is not kind and (name, value) != ("kv_tokens", None):
                raise ValueError(f"engines.{name}={value!r:.80}: must be {rule}.")
        return cls(**state)


@dataclass(eq=False)
class CostModel:
    """Seconds of a rollout: the slowest engine's decoding, and what every rollout takes besides (paper, cost model).

    The latter (prefill, agent loops, scoring) is a line a + b n in the number of candidates (our choice): 0 until
    `refine` has seen rollouts; then b n, the median of the last ones per candidate, for candidates that look free would
    all be launched; and with a constant part once enough rollouts with few and with many candidates tell it apart.
    """

    curve: LatencyCurve  # PTL of one engine
    source: str  # says where the curve comes from
    overheads: Sequence[tuple[float, float]] = ()  # of the last rollouts: candidates, seconds decoding does not explain
    engines: MeasuredEngines | None = None  # that all this is of; None: not said

    @property
    def overhead_line(self) -> tuple[float, float]:
        """Seconds of a rollout besides decoding: those that it takes anyway, and those of each candidate."""
        if not self.overheads:
            return 0.0, 0.0
        counts, seconds = np.array(self.overheads, dtype=np.float64).T
        per_candidate_s = float(np.median((seconds / counts)[-OVERHEADS:]))
        has_many = counts > (counts.min() + counts.max()) / 2
        if LEAST_APART <= has_many.sum() <= len(counts) - LEAST_APART:
            few, many = float(np.median(counts[~has_many])), float(np.median(counts[has_many]))
            if many >= APART * few:
                growth_s = float(np.median(seconds[has_many]) - np.median(seconds[~has_many]))
                per_candidate_s = min(max(growth_s / (many - few), 0.0), per_candidate_s)
        constant_s = float(np.median((seconds - per_candidate_s * counts)[-OVERHEADS:]))
        return max(constant_s, 0.0), per_candidate_s

    def overhead_s(self, num_candidates: float) -> float:
        """Seconds that a rollout of so many candidates takes besides decoding."""
        constant_s, per_candidate_s = self.overhead_line
        return constant_s + per_candidate_s * num_candidates

    def seconds(self, lengths: NDArray[np.float64], num_engines: int, max_running: int | None) -> float:
        """Mean over the draws, with what a rollout takes besides decoding.

        Args:
            lengths: decoded tokens in the order of launch, shape [draws, num_prompts, most]; those of 0 do not run.
            num_engines: that share the rollout.
            max_running: sequences that an engine runs at once (`engine_slots`); None: no limit.
        """
        num_candidates = np.count_nonzero(lengths) / len(lengths)
        return self._decoding_s(lengths, num_engines, max_running) + self.overhead_s(num_candidates)

    def _decoding_s(self, lengths: NDArray[np.float64], num_engines: int, max_running: int | None) -> float:
        drawn_lengths = lengths.reshape(len(lengths), -1)
        is_launched = drawn_lengths > 0
        if (is_launched == is_launched[0]).all():  # as many of each prompt in all draws: at once, for speed
            launched_lengths = [drawn_lengths[:, is_launched[0]]]
        else:
            launched_lengths = [draw[draw > 0][None] for draw in drawn_lengths]
        engine_tokens = [_deal(draws, num_engines) for draws in launched_lengths]
        slowest_seconds = [decode_seconds(tokens, self.curve, max_running).max(axis=1) for tokens in engine_tokens]
        return float(np.mean(slowest_seconds))

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
            step_times: what its engines' chunks showed, by the sequences that the engines ran.
            num_engines: as of `seconds`, and `max_running`.
        """
        self.curve = self.curve.refined(step_times, REFINE_WEIGHT)
        explained_s = self._decoding_s(decoded[None, None].astype(np.float64), num_engines, max_running)
        unexplained = (len(decoded), max(seconds - explained_s, 0.0))
        self.overheads = [*self.overheads, unexplained][-OVERHEADS_APART:]

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "curve": self.curve.to_dict(),
            "source": self.source,
            "overheads": [list(pair) for pair in self.overheads],
            "engines": None if self.engines is None else asdict(self.engines),
        }

    @classmethod
    def from_state(cls, state: Any) -> "CostModel":
        """The model that `state_dict` gave; a `ValueError` says what is wrong with something else."""
        if not isinstance(state, dict) or set(state) != {"curve", "source", "overheads", "engines"}:
            raise ValueError(f"cost model={state!r:.80}: must have curve, source, overheads and engines.")
        source, overheads, engines = state["source"], state["overheads"], state["engines"]
        if not isinstance(source, str):
            raise ValueError(f"source={source!r}: must be a text.")
        if not isinstance(overheads, list) or not all(are_amounts(p) and len(p) == 2 and p[0] >= 1 for p in overheads):
            raise ValueError(f"overheads={overheads!r:.80}: must be pairs of candidates, at least 1, and seconds.")
        return cls(
            LatencyCurve.from_dict(state["curve"]),
            source,
            [(count, seconds) for count, seconds in overheads[-OVERHEADS_APART:]],
            None if engines is None else MeasuredEngines.from_state(engines),
        )
