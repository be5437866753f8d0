"""How long responses would have become that were stopped: a model of lengths that the rollouts themselves fit.

Contract: pure Python and NumPy. An observation is the lengths of a prompt's launched candidates and which of them are
right-censored. All of it is our choice.

1. The lengths of a prompt follow a generalised gamma distribution: with `tail` 0 it is the log-normal, with 1 the gamma
   distribution, and with more its upper end is lighter still. Which tail it is, and how spread prompts are, is a matter
   of the workload: one group does not show it, the groups of a rollout together do. `LengthModel` pools them: it keeps
   how likely each population of prompts has made what was seen, and forgets within some ten rollouts. No
   group has to run to its end.
2. A group's moments are expected ones, given what is known of it: over its location, its shape and its unseen lengths.
   The location has the prior with which the expectation of a scale family's mean, or variance, is unbiased wherever the
   location is: flat on its logarithm, divided by the mean, or by its square. So it is neither too long nor too short in
   the mean over many groups, at whatever depth they are stopped.
3. That holds for stops that depend on the group alone. One moment for all prompts stops the longest at less depth, and
   they would count as longer still; so how long the prompts of the last rollouts were is a prior, too, somewhat wider.
4. Estimates are finite, not negative, and scale with the lengths of all groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Observation = tuple[ArrayLike, ArrayLike]
"""Generated tokens of all launched candidates, and which of them are censored; both of shape [num_candidates]."""

TAILS = (0.0, 0.5, 1.0, 2.0)  # 0 log-normal, 1 gamma; the larger, the lighter above and the heavier below
TAIL_PRIOR = (0.0, -10.0, 0.0, -10.0)  # logs: the two well-known ones, unless others are clearly more likely
SPREADS = np.geomspace(0.04, 1.6, 32)  # std of the logarithm, nearly
TAIL_GUESS = (-2.0, -2.0, 0.0, 0.0)  # logs, of a workload of which no other group is known
TYPICAL_SPREAD, SPREAD_FOLDS = 0.15, 0.45  # what its typical spread is, and the std of the logarithm of that
GUESS_GROUPS = 16.0  # the guess counts half when so many groups are known
CENTERS = np.geomspace(SPREADS[0], SPREADS[-1], 3 * len(SPREADS) - 2)  # typical spreads of populations
SPREAD_WIDTHS = (0.06, 0.2, 0.45)  # std of log spread among the prompts of a population
MEMORY = 0.8  # weight of all earlier rollouts against a new one, in what is known of the population
CENTER_WEIGHT = 0.3  # of a new rollout in how long the responses to its prompts are
CENTER_ROOM = 2.0  # by which the variance among prompts is taken as more, so that they are not pulled together
CENTER_PRIOR = 1.0  # so many prompts with that variance of logarithms are always among them
MAX_SURPRISE = 10.0  # log-likelihood that one group may take from a population
MAX_STRETCH = 16.0  # no mean is more than this many times the longest length seen, and no std more than half as many
LEAST_GROWTH = 1e-9  # log of a censored length over its bound, at least
SHORTEST = 1e-3  # of the longest length; shorter ones count as that in likelihoods
LEARNED_GROUPS = 256  # at most so many groups of a rollout are learnt from
MIN_SHARE = 1e-6  # of a shape in a population; rarer ones are left out
CHUNK_CELLS = 100_000  # worked on at once
"""A cell is a bound x a shape x a location; more of them do not fit a processor's cache."""


@dataclass(frozen=True, eq=False)
class ShapeTables:
    """Every tail with every spread, shape [num_shapes], and functions of the standardised log length, tabulated.

    The density of w = (log length - location) / spread is proportional to exp((q w - e^(q w) + 1) / q^2) with
    q = tail x spread, and to exp(-w^2 / 2) where that is 0.
    """

    start: float = -24.0
    step: float = 0.02
    size: int = 3000

    @cached_property
    def tail(self) -> NDArray[np.float64]:
        """The tail of each shape."""
        return np.repeat(TAILS, len(SPREADS))

    @cached_property
    def spread(self) -> NDArray[np.float64]:
        """The spread of each shape."""
        return np.tile(SPREADS, len(TAILS))

    @cached_property
    def populations(self) -> NDArray[np.float64]:
        """Shares of the spreads in each population, shape [num_populations, num_spreads]."""
        log_spreads = np.log(SPREADS)
        folds = [(log_spreads - center) / width for width in SPREAD_WIDTHS for center in np.log(CENTERS)]
        shares = np.exp(-0.5 * np.square(folds))
        return shares / shares.sum(axis=1, keepdims=True)

    @cached_property
    def prior(self) -> NDArray[np.float64]:
        """The log of how likely each tail and population are, whatever was seen: [num_tails, num_populations]."""
        return np.repeat(np.array(TAIL_PRIOR)[:, None], len(SPREAD_WIDTHS) * len(CENTERS), axis=1)

    @cached_property
    def guess(self) -> NDArray[np.float64]:
        """What the prior has besides as long as little was seen."""
        folds = np.log(CENTERS / TYPICAL_SPREAD) / SPREAD_FOLDS
        return np.array(TAIL_GUESS)[:, None] - 0.5 * np.tile(folds**2, len(SPREAD_WIDTHS))

    @cached_property
    def _log_density(self) -> NDArray[np.float64]:
        places = self.start + self.step * np.arange(self.size)
        skew = (self.tail * self.spread)[:, None]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            log_density = np.where(skew > 0, (skew * places - np.expm1(skew * places)) / skew**2, -(places**2) / 2)
        log_density = np.maximum(log_density, -1e250)
        return log_density - np.log(self.step * np.exp(log_density).sum(axis=1, keepdims=True))

    @cached_property
    def log_peak(self) -> NDArray[np.float64]:
        """The log density at w = 0."""
        return self._log_density[:, round(-self.start / self.step)]

    @cached_property
    def log_mean(self) -> NDArray[np.float64]:
        """The log of the mean length over e^location."""
        return self._tail_integrals(1)[:, 0]

    @cached_property
    def log_survival(self) -> NDArray[np.float64]:
        """The log of the chance to exceed each w, shape [num_shapes, size]."""
        return self._tail_integrals(0)

    @cached_property
    def log_power(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logs of the first two moments of a length that exceeds each w, over the length at w and its square."""
        places = self.start + self.step * np.arange(self.size)
        bounds = self.spread[:, None] * places
        first, second = (self._tail_integrals(n) - self.log_survival - n * bounds for n in (1, 2))
        # Where the difference of two huge numbers says nothing, no length exceeds its bound by much.
        first, second = (np.where(self.log_survival > -1e9, np.maximum(each, 0.0), 0.0) for each in (first, second))
        return first, second

    def _tail_integrals(self, power: int) -> NDArray[np.float64]:
        """The log of the integral of length^power x density from each w on; at the last w that of one step more."""
        places = self.start + self.step * np.arange(self.size)
        log_values = self._log_density + power * self.spread[:, None] * places
        # Within a step the logarithm is straight: exact in far tails, where the density falls by much in a step.
        slopes = np.diff(log_values, axis=1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            widths = np.where(np.abs(slopes) < 1e-6, 1 + slopes / 2, np.expm1(slopes) / slopes)
            pieces = log_values[:, :-1] + np.log(self.step * np.maximum(widths, 1e-300))
        pieces = np.concatenate([pieces, pieces[:, -1:]], axis=1)
        return np.logaddexp.accumulate(pieces[:, ::-1], axis=1)[:, ::-1]

    def lookup(
        self, table: NDArray[np.float64], shapes: NDArray[np.int64], places: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The values of a table, linear between its points and beyond its ends; shapes broadcasts to places."""
        steps = (places - self.start) / self.step
        lower = np.clip(steps, 0, self.size - 2).astype(np.int64)
        steps -= lower
        lower += self.size * shapes
        flat_table = table.ravel()
        values = flat_table[lower]
        lower += 1
        return values + steps * (flat_table[lower] - values)


SHAPES = ShapeTables()


class _GroupColumns:
    """Censored groups as flat columns. Lengths are over the longest of their group; logarithms are off their mean."""

    def __init__(self, groups: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> None:
        self.sizes = np.array([len(lengths) for lengths, _ in groups])
        starts = np.cumsum(self.sizes) - self.sizes
        lengths, censored = (np.concatenate(column) for column in zip(*groups, strict=True))
        group_of = np.repeat(np.arange(len(groups)), self.sizes)
        self.longest = np.maximum.reduceat(lengths, starts)
        shares = lengths / self.longest[group_of]
        logs = np.log(np.maximum(shares, SHORTEST))
        # The origin is near the likely locations: a bound far below what ended says little of them.
        ended = np.where(censored, 0.0, 1.0)
        self.num_ended = np.add.reduceat(ended, starts)
        ended_logs = np.add.reduceat(ended * logs, starts) / np.maximum(self.num_ended, 1.0)
        raised_logs = np.where(censored, np.maximum(logs, ended_logs[group_of]), logs)
        anchors = np.add.reduceat(raised_logs, starts) / self.sizes
        logs -= anchors[group_of]
        self.origins = np.log(self.longest) + anchors
        # What is needed of those that ended are sums.
        sums = [ended * logs, ended * shares, ended * shares**2]
        self.log_sum, self.sum, self.square_sum = (np.add.reduceat(each, starts) for each in sums)
        powers = [ended * (np.exp(tail * logs) if tail else logs**2) for tail in TAILS]
        self.power_sums = np.array([np.add.reduceat(each, starts) for each in powers])  # [num_tails, num_groups]
        # Of those that did not, each bound of a group, with how many have it.
        hidden = np.flatnonzero(censored)
        hidden = hidden[np.lexsort((logs[hidden], group_of[hidden]))]
        is_new = np.ones(len(hidden), dtype=bool)
        is_new[1:] = (np.diff(group_of[hidden]) > 0) | (np.diff(logs[hidden]) > 0)
        first = np.flatnonzero(is_new)
        self.bound_counts = np.diff(np.append(first, len(hidden)))
        self.bound_group, self.bounds = group_of[hidden[first]], logs[hidden[first]]
        self.bound_shares = np.maximum(shares, SHORTEST)[hidden[first]]
        self.bound_starts = np.searchsorted(self.bound_group, np.arange(len(groups) + 1))

    def log_likelihood(
        self, chunk: slice, shapes: NDArray[np.int64], places: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The log-likelihood of some groups by shape and location, and their bounds standardised.

        Args:
            chunk: which groups.
            shapes: which shapes.
            places: (location - origin) / spread.

        Returns:
            Shapes [num_groups, num_shapes, num_places] and [num_bounds, num_shapes, num_places].
        """
        tails, spreads = SHAPES.tail[shapes][:, None], SHAPES.spread[shapes][:, None]
        shifts = spreads * places
        num_ended, log_sum = self.num_ended[chunk, None, None], self.log_sum[chunk, None, None]
        power_sums = self.power_sums[np.searchsorted(TAILS, SHAPES.tail[shapes]), chunk][..., None].swapaxes(0, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            skewed = tails * (log_sum - num_ended * shifts) - np.exp(-tails * shifts) * power_sums + num_ended
            skewed /= (tails * spreads) ** 2
        normal = (-0.5 * power_sums + shifts * log_sum - (0.5 * shifts**2) * num_ended) / spreads**2
        values = np.where(tails > 0, skewed, normal)
        values += num_ended * (SHAPES.log_peak[shapes][:, None] - np.log(spreads)) + np.log(spreads)
        bound_rows = slice(self.bound_starts[chunk.start], self.bound_starts[chunk.stop])
        bound_places = self.bounds[bound_rows, None, None] / spreads - places
        survival = SHAPES.lookup(SHAPES.log_survival, shapes[:, None], bound_places)
        survival *= self.bound_counts[bound_rows, None, None]
        return values + self.totals(chunk, survival), bound_places

    def totals(self, chunk: slice, of_bounds: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums over the bounds of each group of a chunk."""
        bound_starts = self.bound_starts[chunk.start : chunk.stop + 1] - self.bound_starts[chunk.start]
        totals = np.zeros((len(bound_starts) - 1, *of_bounds.shape[1:]))
        has_bounds = np.diff(bound_starts) > 0
        if has_bounds.any():
            totals[has_bounds] = np.add.reduceat(of_bounds, bound_starts[:-1][has_bounds])
        return totals

    def chunks(self, num_cells: int) -> list[slice]:
        """Splits the groups; `num_cells` is that of a bound."""
        groups_each = max(CHUNK_CELLS * len(self.sizes) // (num_cells * max(len(self.bounds), len(self.sizes))), 1)
        edges = [*range(0, len(self.sizes), groups_each), len(self.sizes)]
        return [slice(*pair) for pair in pairwise(edges)]

    def places(self) -> NDArray[np.float64]:
        """Locations to add up over, in spreads off the origin, the closer the more the largest group knows of it."""
        return np.arange(-2.0, 5.0, min(max(1.6 / math.sqrt(self.sizes.max()), 0.1), 0.4))


class LengthModel:
    """What the rollouts so far have shown of how the lengths of a prompt are distributed.

    Example:
        >>> model = LengthModel()
        >>> means, stds = model.observe([([100, 300], [False, False]), ([100, 120, 120], [False, False, True])])
        >>> float(means[0]), float(stds[0]), bool(means[1] > 340 / 3)
        (200.0, 100.0, True)
    """

    def __init__(self) -> None:
        self._evidence = np.zeros_like(SHAPES.prior)  # log-likelihoods of the tails and populations
        self._known = 0.0  # groups, recent ones counted in full
        self._centers: tuple[float, float] | None = None  # mean and variance of the logarithms of prompts' means

    def moments(self, observations: Sequence[Observation]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected mean and standard deviation of whole draws, some lengths of which are only known to be longer.

        Without censored lengths these are the plain moments. A censored one of length 0 is left out.

        Returns:
            Means and stds in tokens, shape [num_observations]; 0.0 where nothing is known.

        Raises:
            ValueError: lengths that are negative or not finite, or flags of another shape.
        """
        groups = [_checked(*observation) for observation in observations]
        return self._moments(groups, self._evidence[None], np.array([self._known]))[:2]

    def observe(self, observations: Sequence[Observation]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Learns from the observations of a rollout; returns their moments, given also what the others showed."""
        groups = [_checked(*observation) for observation in observations]
        # 1. What they say of the population. Less than two lengths that ended say nothing.
        num_ended = [np.count_nonzero(~censored & (lengths > 0)) for lengths, censored in groups]
        telling = np.flatnonzero(np.array(num_ended) > 1)
        telling = telling[np.linspace(0, len(telling) - 1, min(len(telling), LEARNED_GROUPS)).round().astype(int)]
        if not len(telling):
            return self._moments(groups, self._evidence[None], np.array([self._known]))[:2]
        evidence = np.zeros((len(groups), *self._evidence.shape))
        evidence[telling] = _evidence(_GroupColumns([groups[index] for index in telling]), self._centers)
        earlier, new_evidence = MEMORY * self._evidence, evidence.sum(axis=0)
        # 2. Each by what earlier rollouts and the others showed: none counts twice.
        is_telling = np.isin(np.arange(len(groups)), telling)
        known = MEMORY * self._known + len(telling)
        means, stds, log_means, doubts = self._moments(groups, earlier + (new_evidence - evidence), known - is_telling)
        # 3. For the next rollouts. What one group leaves open of its mean is no variance among prompts.
        self._evidence, self._known = earlier + new_evidence, known
        center = float(log_means[telling].mean())
        old_center, old_variance = self._centers or (center, None)
        squares = float(np.mean((log_means[telling] - old_center) ** 2 - doubts[telling]))
        variance = (len(telling) * max(squares, 0.0) + CENTER_PRIOR) / (len(telling) + 1)
        old_variance = variance if old_variance is None else old_variance
        self._centers = (
            old_center + CENTER_WEIGHT * (center - old_center),
            old_variance + CENTER_WEIGHT * (variance - old_variance),
        )
        return means, stds

    def _moments(
        self,
        groups: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]],
        evidence: NDArray[np.float64],
        known: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], ...]:
        """Means, stds, and by the group alone the mean's expected logarithm and its variance.

        Evidence is that of each group's others, or the same for all: [num_groups or 1, num_tails, num_populations];
        `known` says how many these others are.
        """
        moments = np.zeros((4, len(groups)))
        for index, (lengths, censored) in enumerate(groups):
            if lengths.any() and not censored.any():
                mean, std = float(lengths.mean()), float(lengths.std())
                moments[:, index] = mean, std, math.log(mean), (std / mean) ** 2 / len(lengths)
        hidden = np.array([index for index, (_, censored) in enumerate(groups) if censored.any()], dtype=int)
        if len(hidden):
            evidence = evidence + SHAPES.guess * (GUESS_GROUPS / (GUESS_GROUPS + known[:, None, None]))
            evidence = np.broadcast_to(evidence, (len(groups), *evidence.shape[1:]))[hidden]
            moments[:, hidden] = _completed(_GroupColumns([groups[index] for index in hidden]), evidence, self._centers)
        return tuple(moments)

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, for JSON."""
        centers = None if self._centers is None else list(self._centers)
        return {"evidence": self._evidence.tolist(), "known": self._known, "centers": centers}

    def load_state_dict(self, state: Any) -> None:
        """Goes on where `state_dict` was called; a `ValueError` where `state` is something else."""
        evidence, known, centers = (_numbers(state, name) for name in ("evidence", "known", "centers"))
        is_centered = centers.shape == (2,) and centers[1] > 0
        is_empty = evidence.shape != SHAPES.prior.shape or known.shape != () or known < 0
        if is_empty or not (is_centered or state["centers"] is None):
            raise ValueError(
                f"length model={state!r:.80}: must have evidence, {SHAPES.prior.shape} finite numbers, known, a count, "
                "and centers, null or two numbers of which the second is above 0."
            )
        self._evidence, self._known = evidence, float(known)
        self._centers = (float(centers[0]), float(centers[1])) if is_centered else None


def _numbers(state: Any, name: str) -> NDArray[np.float64]:
    """The finite numbers that a state has under a name; empty where it has something else."""
    try:
        numbers = np.array(state[name], dtype=np.float64)
    except (TypeError, ValueError, KeyError, IndexError):
        return np.empty(0)
    return numbers if np.isfinite(numbers).all() else np.empty(0)


def _checked(lengths: ArrayLike, censored: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Columns of an observation, without what was stopped before its first token."""
    values, flags = np.asarray(lengths, dtype=np.float64), np.asarray(censored, dtype=np.bool_)
    if values.ndim != 1 or values.shape != flags.shape:
        raise ValueError(f"lengths has shape {values.shape}, censored {flags.shape}: both must be [num_candidates].")
    for index in np.flatnonzero(~(np.isfinite(values) & (values >= 0))):
        raise ValueError(f"lengths[{index}]={values[index]}: a length must be finite and not negative.")
    is_known = (values > 0) | ~flags
    return values[is_known], flags[is_known]


def _evidence(batch: _GroupColumns, centers: tuple[float, float] | None) -> NDArray[np.float64]:
    """The log-likelihood of each group by tail and population, at most 0: [num_groups, num_tails, num_populations]."""
    shapes, places = np.arange(len(SHAPES.tail)), batch.places()
    log_means = SHAPES.spread[:, None] * places + SHAPES.log_mean[:, None]
    evidence = np.empty((len(batch.sizes), *SHAPES.prior.shape))
    for chunk in batch.chunks(len(shapes) * len(places)):
        values, _ = batch.log_likelihood(chunk, shapes, places)
        values += _centering(batch.origins[chunk], log_means, centers)
        values -= values.max(axis=(1, 2), keepdims=True)
        of_shapes = np.exp(values).sum(axis=2).reshape(-1, len(TAILS), len(SPREADS))
        evidence[chunk] = np.log(np.maximum(of_shapes @ SHAPES.populations.T, 1e-300))
    evidence -= evidence.max(axis=(1, 2), keepdims=True)
    return np.maximum(evidence, -MAX_SURPRISE)


def _completed(
    batch: _GroupColumns, evidence: NDArray[np.float64], centers: tuple[float, float] | None
) -> tuple[NDArray[np.float64], ...]:
    """Expected means and stds; without `centers` the logarithm of the mean and its variance: each [num_groups]."""
    # 1. How likely each shape is for each group, as one of its population; the shapes that matter.
    likely = SHAPES.prior + evidence
    likely = np.exp(likely - likely.max(axis=(1, 2), keepdims=True))
    shape_shares = (likely @ SHAPES.populations).reshape(len(batch.sizes), -1)
    shape_shares /= shape_shares.sum(axis=1, keepdims=True)
    shapes, places = np.flatnonzero((shape_shares > MIN_SHARE).any(axis=0)), batch.places()
    log_shares = np.log(np.maximum(shape_shares[:, shapes], 1e-300))
    log_means = SHAPES.spread[shapes][:, None] * places + SHAPES.log_mean[shapes][:, None]
    means, variances, logs, doubts = np.empty((4, len(batch.sizes)))
    for chunk in batch.chunks(len(shapes) * len(places)):
        log_chances, bound_places = batch.log_likelihood(chunk, shapes, places)
        log_chances += log_shares[chunk, :, None]
        # 2. Moments of the whole group by shape and location: what is known, and what is expected beyond the bounds.
        rows = slice(batch.bound_starts[chunk.start], batch.bound_starts[chunk.stop])
        bounds, counts = batch.bound_shares[rows, None, None], batch.bound_counts[rows, None, None]
        ratios = (SHAPES.lookup(table, shapes[:, None], bound_places) for table in SHAPES.log_power)
        first, second = (np.exp(np.maximum(each, LEAST_GROWTH)) for each in ratios)
        first, second = bounds * first, bounds**2 * np.maximum(second, first**2)
        num_all = batch.sizes[chunk, None, None]
        total = batch.sum[chunk, None, None] + batch.totals(chunk, counts * first)
        squares = batch.square_sum[chunk, None, None] + batch.totals(chunk, counts * second)
        # The unseen parts move the group's own mean; that of one alone has no other to be spread around.
        unseen = np.where(num_all > 1, batch.totals(chunk, counts * (second - first**2)), 0.0)
        group_variances = squares / num_all - (total**2 + unseen) / num_all**2
        # 3. Expectations, each with the prior of locations that makes it unbiased.
        logs[chunk] = _expected(log_chances, log_means)
        doubts[chunk] = _expected(log_chances, np.square(log_means - logs[chunk, None, None]))
        log_chances += _centering(batch.origins[chunk], log_means, centers, CENTER_ROOM)
        means[chunk] = _expected(log_chances - log_means, total / num_all)
        variances[chunk] = _expected(log_chances - 2 * log_means, group_variances)
    stds = np.sqrt(np.maximum(variances, 0.0))
    means, stds = np.minimum(means, MAX_STRETCH), np.minimum(stds, MAX_STRETCH / 2)
    return batch.longest * means, batch.longest * stds, batch.origins + logs, doubts


def _centering(
    origins: NDArray[np.float64], log_means: NDArray[np.float64], centers: tuple[float, float] | None, room: float = 1.0
) -> NDArray[np.float64] | float:
    """The log of the prior of means [num_groups, num_shapes, num_places], which are relative to e^origin."""
    if centers is None:
        return 0.0
    return np.square(origins[:, None, None] + log_means - centers[0]) / (-2 * room * centers[1])


def _expected(log_chances: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of values [num_groups, num_shapes, num_places] by their chances, shape [num_groups]."""
    chances = np.exp(log_chances - log_chances.max(axis=(1, 2), keepdims=True))
    return (chances * values).sum(axis=(1, 2)) / chances.sum(axis=(1, 2))
