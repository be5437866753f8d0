"""What is decided before a rollout, and learnt from it: budgets, predicted seconds, length history, cost model.

Contract: pure, without a clock; prompts' keys in, a `Plan` out; what the candidates became in, metrics out.

1. `plan` changes nothing; `observe` is called once after each rollout that was planned and ended. All that both
   depend on besides the settings and the engines is in `state_dict`: a planner that loads it plans what the saved one
   would have.
2. Prompts of the same key share a history: their candidates count as one observation.
3. The utility's T takes every candidate to its end (our reading of the paper), and is a moving mean over the batches;
   `predicted_s` follows the groups' rules.
4. Without a cost model nothing is predicted, and the mean number of candidates is `allocation.fallback_mean`. So it is
   in the warm-up, whose budgets are uniform.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.allocation import (
    Utility,
    allocate,
    contiguous_parts,
    largest_total,
    optimal_total,
    rounded_total,
    spread_parts,
)
from darts.censoring import LengthModel
from darts.choice import choose
from darts.config import DartsConfig
from darts.forecast import CostModel, draw_lengths, engine_slots, stopped_lengths
from darts.history import LengthHistory, StopCorrection, are_amounts
from darts.latency import StepTimes
from darts.pool import CandidatePool
from darts.strategy import Choice

STATE_VERSION = 2
MOST_SATURATED = 0.1
"""Share of the prompts that the utility may saturate (our choice; some 5 % in the paper): of the others alone a long
response is kept."""
TIME_WEIGHT = 0.1
"""Weight of a new batch in the moving means of relative rollout times and of prompt tokens (our choice): the slowest
engine is decided by a few draws of the longest responses, and the best total shall not jump with them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A rollout before it runs; arrays have one entry per prompt."""

    keys: list[str]
    budgets: NDArray[np.int64]  # M'_i
    std: NDArray[np.float64]  # predicted; 0 where nothing was ever observed
    known: NDArray[np.bool_]  # the prompt itself was observed before
    mean: NDArray[np.float64]  # predicted mean length; 0 where nothing was ever observed
    adaptive: bool
    utility: Utility | None = None  # None without a cost model
    times: tuple[float, ...] = ()  # moving mean of seconds with M_low to M_up candidates over base_s; with a utility
    base_s: float | None = None  # expected seconds with M candidates per prompt, all run to their end
    predicted_s: float | None = None  # expected seconds of this rollout

    @property
    def launch_order(self) -> NDArray[np.int64]:
        """Positions of the prompts, in the order in which their candidates are launched."""
        return launch_order(self.budgets, self.mean, self.adaptive)

    @property
    def priorities(self) -> NDArray[np.int64]:
        """How many candidates are launched before each prompt's first; its second has one more, and so on.

        With vLLM's `scheduling_policy=priority` lower ones leave the queue first, so it has this order although several
        workers launch at once.
        """
        order = self.launch_order
        priorities = np.empty(len(order), dtype=np.int64)
        priorities[order] = np.cumsum(self.budgets[order]) - self.budgets[order]
        return priorities

    def parts(self, num_parts: int) -> list[NDArray[np.int64]]:
        """Positions of the prompts of each worker, in the order of launch."""
        if self.adaptive:
            return spread_parts(self.budgets * self.mean, num_parts)
        return contiguous_parts(self.budgets, num_parts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """A rollout after it ran."""

    plan: Plan
    pool: CandidatePool  # every launched candidate, sorted by prompt
    observed_std: NDArray[np.float64]  # of each prompt's lengths, corrected for censoring
    metrics: dict[str, float]  # `darts.metrics.METRICS`
    uids: list[str] = field(default_factory=list)  # of the prompts; a uid is of one step alone
    began: float = 0.0  # `time.time()`
    ended: float = 0.0


@dataclass(kw_only=True, eq=False)
class RolloutPlanner:
    """Plans rollouts, and learns from them."""

    ema_weight: InitVar[float]  # of a new observation in a prompt's history
    response_length: int  # longest response, tokens
    num_engines: int = 1  # that share a rollout
    max_running: int | None = None  # `max_num_seqs` of an engine; None: no limit
    kv_tokens: int | None = None  # for which an engine's KV cache has room; None: no limit
    cost: CostModel | None = None
    steps: int = 0  # rollouts observed
    prompt_tokens: float = 0.0  # that a candidate adds to the KV cache: moving mean of those it did not find there

    def __post_init__(self, ema_weight: float) -> None:
        self.history = LengthHistory(ema_weight)
        self.lengths = LengthModel()
        self.correction = StopCorrection()
        self._times: tuple[float, ...] = ()  # of the last plan with a utility
        self._time_bounds: tuple[int, int] | None = None  # M_low and M_up of these times

    def use_cost_model(self, cost: CostModel | None) -> None:
        """From now on seconds are by this cost model; relative times that another one gave are forgotten."""
        if cost is not self.cost:
            self._times, self._time_bounds = (), None
        self.cost = cost
        self.kv_tokens = None if cost is None or cost.engines is None else cost.engines.kv_tokens

    def slots(self, lengths: NDArray[Any]) -> int | None:
        """Sequences of such lengths that an engine runs at once (`darts.forecast.engine_slots`); None: no limit."""
        return engine_slots(np.asarray(lengths, np.float64), self.max_running, self.kv_tokens, self.prompt_tokens)

    def choose(self, num_prompts: int, darts: DartsConfig) -> Choice | None:
        """The numbers of candidates and spare prompts that make rollouts fastest; None while too little is known."""
        mean, std = self.history.recent_moments()
        if self.cost is None or not len(mean):
            return None
        return choose(self._seconds, mean, std, darts, num_prompts, self.response_length)

    def plan(self, keys: Sequence[str], darts: DartsConfig, harvest: int | None = None) -> Plan:
        """Budgets for a batch, in its order; `harvest` as in `darts.forecast.stopped_lengths`."""
        allocation, group_size = darts.allocation, darts.group_size
        std = np.array([self.history.std(key) for key in keys], dtype=np.float64)
        mean = np.array([self.history.mean(key) for key in keys], dtype=np.float64)
        adaptive = allocation.mode == "adaptive" and self.steps >= allocation.warmup_steps and bool(std.any())
        lengths = None
        if self.cost is not None and mean.any():
            lengths = draw_lengths(mean, std, max(allocation.high, group_size), self.response_length)
        base_s = predicted_s = None
        if lengths is not None:
            base_s = self._to_the_end(lengths, np.full(len(keys), group_size), mean, adaptive)
        utility, relative_times = None, ()
        if allocation.mode == "off":
            budgets = np.full(len(keys), group_size)
        else:
            weights = std / std.mean() if adaptive else np.ones(len(keys))
            total_budget = rounded_total(len(keys), allocation.fallback_mean)
            if adaptive and lengths is not None:
                relative_times = self._relative_times(weights, lengths, mean, base_s, darts)
                utility = self._utility(weights, relative_times, darts)
                total_budget = utility.total
            budgets = allocate(weights, total_budget, allocation.low, allocation.high)
        if lengths is not None:
            decoded_lengths = stopped_lengths(lengths, budgets, darts, self.response_length, harvest)
            start_order = launch_order(budgets, mean, adaptive)
            predicted_s = self._seconds(decoded_lengths[:, start_order])
        return Plan(
            keys=list(keys),
            budgets=budgets,
            std=std,
            known=np.array([key in self.history for key in keys], dtype=bool),
            mean=mean,
            adaptive=adaptive,
            utility=utility,
            times=relative_times,
            base_s=base_s,
            predicted_s=predicted_s,
        )

    def observe(
        self, plan: Plan, darts: DartsConfig, pool: CandidatePool, seconds: float, step_times: StepTimes
    ) -> tuple[NDArray[np.float64], dict[str, float]]:
        """Learns from a rollout.

        Args:
            plan: what was planned.
            darts: the settings it was planned with.
            pool: every launched candidate, sorted by prompt.
            seconds: how long it took.
            step_times: what the engines' chunks showed meanwhile.

        Returns:
            The std of each prompt's lengths as observed, corrected for censoring, shape [num_prompts]; and metrics.
        """
        groups = np.split(np.arange(len(pool)), np.cumsum(plan.budgets)[:-1])
        self._learn_prompts(pool)
        observed_std, stop_correction = self._learn_lengths(plan.keys, groups, pool, darts)
        metrics = plan_metrics(plan, observed_std, seconds) | {
            "darts/history/prompts": len(self.history),
            "darts/history/std_mean": self.history.dataset_std,
            "darts/history/length_mean": self.history.dataset_mean,
            "darts/history/stop_correction": stop_correction,
        }
        if self.cost is not None and darts.latency.refine:
            decoded_lengths = pool.length[np.concatenate([groups[prompt] for prompt in plan.launch_order])]
            num_slots = self.slots(decoded_lengths)
            self.cost.refine(decoded_lengths, seconds, step_times, self.num_engines, num_slots)
            metrics["darts/latency/overhead_s"] = self.cost.overhead_s(len(pool))
            if num_slots is not None:
                metrics["darts/latency/slots"] = num_slots
            if step_times:
                metrics["darts/latency/running_most"] = step_times.points()[-1][0]
        self.steps += 1
        if plan.times:
            self._times, self._time_bounds = plan.times, (darts.allocation.low, darts.allocation.high)
        return observed_std, {name: float(value) for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that later plans depend on, for JSON."""
        cost = None if self.cost is None else self.cost.state_dict()
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "history": self.history.state_dict(),
            "lengths": self.lengths.state_dict(),
            "correction": self.correction.state_dict(),
            "cost": cost,
            "prompt_tokens": self.prompt_tokens,
            "times": self._time_bounds and {"bounds": list(self._time_bounds), "means": list(self._times)},
        }

    def load_state_dict(self, state: Any) -> None:
        """Goes on where `state_dict` was called; all or nothing.

        Raises:
            ValueError: not a state of this version; the message says what is wrong.
        """
        if not isinstance(state, dict):
            raise ValueError(f"state={state!r:.80}: must be a mapping.")
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"version={state.get('version')!r}: must be {STATE_VERSION}.")
        steps = state.get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"steps={steps!r}: must be an integer that is not negative.")
        cost = None if state.get("cost") is None else CostModel.from_state(state["cost"])
        prompt_tokens = state.get("prompt_tokens")
        if not are_amounts([prompt_tokens]):
            raise ValueError(f"prompt_tokens={prompt_tokens!r:.80}: must be finite and not negative.")
        time_bounds, times = _times_of(state.get("times"))
        lengths, correction = LengthModel(), StopCorrection()
        lengths.load_state_dict(state.get("lengths"))
        correction.load_state_dict(state.get("correction"))
        self.history.load_state_dict(state.get("history"))
        self.steps, self.lengths, self.correction = steps, lengths, correction
        self.prompt_tokens = float(prompt_tokens)
        self.use_cost_model(cost)
        self._time_bounds, self._times = time_bounds, times

    def _to_the_end(
        self, lengths: NDArray[np.float64], budgets: NDArray[np.int64], mean: NDArray[np.float64], adaptive: bool
    ) -> float:
        """Seconds if every candidate runs to its end."""
        is_launched = np.arange(lengths.shape[-1]) < budgets[:, None]
        order = launch_order(budgets, mean, adaptive)
        return self._seconds(np.where(is_launched, lengths, 0.0)[:, order])

    def _seconds(self, launched: NDArray[np.float64]) -> float:
        """Seconds of a rollout that decodes so much, shape [draws, num_prompts, most], in the order of launch."""
        return self.cost.seconds(launched, self.num_engines, self.slots(launched))

    def _relative_times(
        self,
        weights: NDArray[np.float64],
        lengths: NDArray[np.float64],
        mean: NDArray[np.float64],
        base_s: float,
        darts: DartsConfig,
    ) -> tuple[float, ...]:
        """Seconds with M_low, ..., M_up candidates in the mean over `base_s`: moving mean over batches."""
        low, high, num_prompts = darts.allocation.low, darts.allocation.high, len(weights)
        new_times = [
            self._to_the_end(lengths, allocate(weights, each * num_prompts, low, high), mean, True) / base_s
            for each in range(low, high + 1)
        ]
        if not self._times or self._time_bounds != (low, high):  # the first, or other bounds than before
            return tuple(new_times)
        return tuple(old + TIME_WEIGHT * (now - old) for old, now in zip(self._times, new_times, strict=True))

    def _utility(self, weights: NDArray[np.float64], times: tuple[float, ...], darts: DartsConfig) -> Utility:
        """What the total brings that the settings ask for, or the best one at which not too many are saturated."""
        allocation, num_prompts = darts.allocation, len(weights)
        low, high = allocation.low, allocation.high

        def utility_of(total: int | None) -> Utility:
            return optimal_total(
                num_prompts,
                low,
                high,
                seconds=times,
                base_seconds=1.0,
                group_size=darts.group_size,
                variation=self.history.dataset_std / self.history.dataset_mean,
                cost_weight=allocation.cost_weight,
                total=total,
            )

        if allocation.mean_candidates != "utility":
            return utility_of(rounded_total(num_prompts, allocation.fallback_mean))
        best = utility_of(None)
        most_total = largest_total(weights, low, high, most_saturated=MOST_SATURATED)
        return best if best.total <= most_total else utility_of(most_total)

    def _learn_prompts(self, pool: CandidatePool) -> None:
        """Updates what the prompt of a candidate adds to the KV cache, where the pool says it."""
        has_prompt = (pool.prompt_tokens > 0) & (pool.length > 0)  # of one that never started nothing is known
        if has_prompt.any():
            own_tokens = float((pool.prompt_tokens - pool.cached_tokens)[has_prompt].mean())
            weight = TIME_WEIGHT if self.prompt_tokens else 1.0
            self.prompt_tokens += weight * (own_tokens - self.prompt_tokens)

    def _learn_lengths(
        self, keys: list[str], groups: list[NDArray[np.int64]], pool: CandidatePool, darts: DartsConfig
    ) -> tuple[NDArray[np.float64], float]:
        """Updates the history; returns the std of each prompt's lengths, and the mean factor of the stopped ones.

        Nothing is learnt from a prompt whose candidates were all aborted, as a rollout's harvest may do: how long they
        were says when others were complete.
        """
        aborted, censored = pool.aborted | pool.cut, pool.censored
        has_returned = any(not pool.kept[group].any() for group in groups)  # a harvest ended the others
        # 1. The observations: a prompt's groups are one. Full are those that no rule might have ended.
        parts_by_key: dict[str, list[NDArray[np.int64]]] = {}
        full_groups = []
        for key, group in zip(keys, groups, strict=True):
            parts_by_key.setdefault(key, []).append(group)
            rules = darts.group_rules(len(group))
            may_be_ended = has_returned or rules.stops_when_settled or rules.awaits_deadline
            if not (may_be_ended or censored[group].any()):
                full_groups.append(pool.length[group])
        rows_by_key = {key: np.concatenate(key_parts) for key, key_parts in parts_by_key.items()}
        seen_keys = [key for key, key_rows in rows_by_key.items() if not aborted[key_rows].all()]
        observations = [(pool.length[rows_by_key[key]], censored[rows_by_key[key]]) for key in seen_keys]
        # 2. Their moments, by the model of lengths and by what it misses at the depth where they were stopped.
        means, stds = self.lengths.observe(observations)
        self.correction.learn(full_groups, self.lengths)
        depths = np.array([1 - flags.mean() for _, flags in observations])
        mean_factors, std_factors = self.correction.factors(depths)
        # No response is longer than the limit, so none of their moments is larger than those of lengths up to it.
        limit = float(self.response_length)
        means = np.minimum(means * mean_factors, limit)
        stds = np.minimum(stds * std_factors, np.sqrt(means * (limit - means)))
        moments = zip(means.tolist(), stds.tolist(), strict=True)
        observed_std = {key: self.history.std(key) for key in rows_by_key}
        for key, observation, key_moments in zip(seen_keys, observations, moments, strict=True):
            observed_std[key] = self.history.update(key, *observation, key_moments)
        was_stopped = depths < 1
        stop_correction = float(std_factors[was_stopped].mean()) if was_stopped.any() else 1.0
        return np.array([observed_std[key] for key in keys]), stop_correction


def _times_of(state: Any) -> tuple[tuple[int, int] | None, tuple[float, ...]]:
    """M_low and M_up, and the moving means of relative times from the one to the other; a `ValueError` if not so."""
    if state is None:
        return None, ()
    bounds, means = (state.get("bounds"), state.get("means")) if isinstance(state, dict) else (None, None)
    if not are_amounts(bounds) or not are_amounts(means) or len(bounds) != 2 or len(means) != bounds[1] - bounds[0] + 1:
        rule = "must be null, or bounds [M_low, M_up] and a mean for each number from M_low to M_up."
        raise ValueError(f"times={state!r:.80}: {rule}")
    return (int(bounds[0]), int(bounds[1])), tuple(means)


def launch_order(budgets: NDArray[np.int64], mean: NDArray[np.float64], adaptive: bool) -> NDArray[np.int64]:
    """Positions of the prompts in the order in which their candidates are launched.

    From the heaviest to the lightest by expected tokens; in the batch's order where budgets are uniform.
    """
    return np.argsort(-budgets * mean, kind="stable") if adaptive else np.arange(len(budgets))


def plan_metrics(plan: Plan, observed: NDArray[np.float64], seconds: float) -> dict[str, float]:
    """What was planned, beside what came out."""
    budgets = plan.budgets
    metrics: dict[str, float] = {
        "darts/allocation/total": budgets.sum(),
        "darts/allocation/budget_min": budgets.min(),
        "darts/allocation/budget_median": np.median(budgets),
        "darts/allocation/budget_max": budgets.max(),
        "darts/history/known_share": plan.known.mean(),
    }
    is_known = plan.known
    if is_known.sum() >= 3 and np.ptp(plan.std[is_known]) > 0 and np.ptp(observed[is_known]) > 0:
        metrics["darts/history/std_correlation"] = np.corrcoef(plan.std[is_known], observed[is_known])[0, 1]
    if plan.utility is not None:
        metrics |= {
            "darts/allocation/utility": plan.utility.utility,
            "darts/allocation/gain": plan.utility.gain,
            "darts/allocation/time_cost": plan.utility.cost,
        }
    if plan.base_s is not None and plan.predicted_s is not None:
        metrics |= {
            "darts/latency/predicted_s": plan.predicted_s,
            "darts/latency/predicted_over_measured": plan.predicted_s / seconds,
            "darts/allocation/time_cost_measured": seconds / plan.base_s - 1,
        }
    return metrics
