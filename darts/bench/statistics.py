"""Figures of a bench's arms, and of one arm over another: totals, paired ratios and differences, with intervals.

Contract: pure; records in, numbers out; NaN where there is nothing.

1. Two arms are compared on the (seed, step) pairs that both have, whatever else is there.
2. A speed-up is the total of the base's seconds over the total of the arm's, over these pairs.
3. Intervals are 95 % percentile bootstraps in two stages: seeds are drawn with replacement, and in each drawn seed its
   steps, in blocks of the square root of their number, since neighbouring steps are alike (our choice). Differences of
   accuracy: seeds, and prompts, the same for all seeds, since all validate on the same ones; where no accuracies by
   prompt are known, seeds alone. Intervals of few blocks are too narrow: where neighbouring steps correlate by 0.5 they
   cover the truth in 93 % of cases with three seeds of 30 steps, in 76 % with one, in 68 % with one of 10 (a test).
4. What such an interval means depends on the seeds. With one it is about this seed's steps (or prompts) alone. With
   three it holds what the noise of steps explains and some of what differs between seeds, of which three values tell
   little: where seeds differ by more than steps do, it covers the truth in three of four cases, not in 95 %.
   `ArmComparison.by_seed` has the seeds' own values.
5. Accuracies at the end are of the seeds that were validated at the last step that any seed of the arm (of both arms,
   where two are compared) was: a seed that has only begun would pull differences towards 0.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from darts.bench.records import Record, StepRecord, ValidationRecord, frame_of
from darts.evidence.statistics import Estimate, interval

Array = NDArray[np.float64]
RESAMPLES = 2000
LAST = 1 / 3
"""Share of the steps that `last` means, from the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmComparison:
    """One arm over, or against, another."""

    overall: Estimate  # NaN ends where one pair or none is all there is
    by_seed: dict[int, float]

    def __format__(self, form: str) -> str:
        if math.isnan(self.overall.value):
            return "-"
        return format(self.overall, form) if math.isfinite(self.overall.low) else format(self.overall.value, form)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """When arms had an accuracy."""

    seconds: dict[int, float]  # by seed, of training; infinite where it was never reached

    def __str__(self) -> str:
        all_seconds = list(self.seconds.values())
        count = sum(map(math.isfinite, all_seconds))
        if not count:
            return "-"
        # Seeds that never reached it are later than all others.
        median_s = float(np.median(all_seconds))
        median = f"{median_s:.0f} s" if math.isfinite(median_s) else "-"
        return median if count == len(all_seconds) else f"{median} ({count} of {len(all_seconds)} seeds)"


class BenchResults:
    """What a bench has measured so far, by arm. Frames of an arm have seed and step as their index, in this order.

    Args:
        records: of complete rounds; of a round that is there twice the last counts.
        arms: all that are to be told of, in their order; None: as they occur.
        steps: of a seed, as planned; None: the last that any arm has.
    """

    def __init__(self, records: Iterable[Record], arms: Sequence[str] | None = None, steps: int | None = None) -> None:
        all_records = list(records)
        self._steps = frame_of(StepRecord, all_records)
        validations = frame_of(ValidationRecord, all_records)
        self._validations = validations[np.isfinite(validations["accuracy"].astype(float))]
        self.arms = list(dict.fromkeys(record.arm for record in all_records) if arms is None else arms)
        seed_numbers, step_numbers = (self._steps.index.get_level_values(name).tolist() for name in ("seed", "step"))
        self.seeds = sorted(set(seed_numbers))
        self.num_steps = max(step_numbers, default=0) if steps is None else steps

    @property
    def last_from(self) -> int:
        """The first step of the last third."""
        return self.num_steps - max(math.floor(self.num_steps * LAST), 1) + 1

    def steps(self, arm: str, last: bool = False) -> pd.DataFrame:
        """The steps of an arm; or those of the last third alone."""
        arm_steps = self._steps[self._steps["arm"] == arm]
        return arm_steps[arm_steps.index.get_level_values("step") >= self.last_from] if last else arm_steps

    def validations(self, arm: str) -> pd.DataFrame:
        """The validations of an arm; those without an accuracy are left out."""
        return self._validations[self._validations["arm"] == arm]

    def values(self, arm: str, key: str, last: bool = False) -> pd.Series:
        """A field of an arm's steps, where it is known."""
        return self.steps(arm, last)[key].astype(float).dropna()

    def over(self, arm_name: str, above_name: str, below_name: str) -> float:
        """The total of a field over that of another."""
        return _over(self.values(arm_name, above_name).sum(), self.values(arm_name, below_name).sum())

    def by_seed(self, arm: str, key: str) -> pd.DataFrame:
        """A field (of steps, or else of validations) [seeds, steps that have it], maybe NaN."""
        records = self.steps(arm) if key in self._steps else self.validations(arm)
        field_values = records[key].astype(float).dropna()
        return field_values[field_values.index.isin(self.seeds, level="seed")].unstack("step").reindex(self.seeds)

    def accuracy(self, arm: str, last: bool = False) -> float:
        """Mean over seeds, after the last step that has one; or over the validations of the last third."""
        return self._at_end(self.validations(arm), last)["accuracy"].astype(float).groupby("seed").mean().mean()

    def elapsed(self, arm: str) -> pd.DataFrame:
        """Seconds of training until a step has ended [seeds, steps from 0]; NaN where a step before is missing."""
        step_seconds = self.by_seed(arm, "step_s").reindex(columns=range(self.num_steps + 1))
        return step_seconds.fillna({0: 0.0}).cumsum(axis=1, skipna=False)

    def target(self, base: str) -> float:
        """The accuracy that times are told to where none is given: the base's over the last third (our choice)."""
        return self.accuracy(base, last=True)

    def time_to(self, arm: str, accuracy: float) -> Reached:
        """Seconds of training, the steps' own, until a validation had at least this accuracy.

        Validations are noisy and this is the first that is high enough, so times are early, for all arms alike.
        """
        validated = self.validations(arm)["accuracy"]
        elapsed, seconds = self.elapsed(arm), dict.fromkeys(validated.index.unique("seed").tolist(), math.inf)
        for seed, step in validated[validated >= accuracy].groupby("seed").head(1).index:
            reached_s = elapsed.reindex([seed], columns=[step]).iat[0, 0]
            seconds[seed] = math.inf if math.isnan(reached_s) else reached_s
        return Reached(seconds=seconds)

    def ratio(self, arm: str, base: str, key: str, last: bool = False) -> ArmComparison:
        """The total of a field of `base` over that of `arm`, over the pairs of both: a speed-up where it is seconds."""
        pairs = pd.concat([self.steps(name, last)[key] for name in (base, arm)], axis=1, join="inner").sort_index()
        return compared(dict(list(pairs.groupby("seed"))))

    def speed_up(self, arm_name: str, base_arm: str, last: bool = False) -> ArmComparison:
        """The base's seconds over the arm's."""
        return self.ratio(arm_name, base_arm, "step_s", last)

    def accuracy_gain(self, arm: str, base: str, last: bool = False) -> ArmComparison:
        """The arm's accuracy minus the base's, after the last step that both validated; or over the last third."""
        arm_validations, base_validations = (self.validations(name) for name in (arm, base))
        shared = self._at_end(arm_validations.loc[arm_validations.index.intersection(base_validations.index)], last)
        shared = shared[shared.index.get_level_values("step") > 0].sort_index()
        return difference(shared, base_validations.loc[shared.index])

    def _at_end(self, validations: pd.DataFrame, last: bool) -> pd.DataFrame:
        """The validations of the last third; or those after the last step of all."""
        step_numbers = validations.index.get_level_values("step")
        return validations[step_numbers >= (self.last_from if last else step_numbers.max())]


def compared(seed_rows: Mapping[int, Any]) -> ArmComparison:
    """The first numbers' sum over the second's, with an interval, of ordered pairs [steps, 2] by seed."""
    seeds = {int(seed): np.array(rows, dtype=float) for seed, rows in sorted(seed_rows.items())}
    seed_sums = {seed: rows.sum(axis=0) for seed, rows in seeds.items()}
    by_seed = {seed: _over(*both) for seed, both in seed_sums.items()}
    total_ratio, drawn_values = _over(*sum(seed_sums.values(), np.zeros(2))), None
    if sum(map(len, seeds.values())) > 1:
        drawn_totals = _drawn_sums(list(seeds.values()), np.random.default_rng(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn_values = drawn_totals[:, 0] / drawn_totals[:, 1]
    return _comparison(total_ratio, by_seed, drawn_values)


def difference(first: pd.DataFrame, second: pd.DataFrame) -> ArmComparison:
    """The mean over seeds of the first accuracy minus the second, with an interval; both after the same steps."""
    if first.empty:
        return _comparison(math.nan, {}, None)
    both = pd.concat([first, second])
    by_prompt = both["prompt_accuracy"].map(len).nunique() == 1 and both["prompt_accuracy"].iat[0]
    accuracies = [np.vstack(part["prompt_accuracy" if by_prompt else "accuracy"]) for part in (first, second)]
    gains = pd.DataFrame(accuracies[0] - accuracies[1], index=first.index).groupby("seed").mean()
    accuracy_gains, drawn_values = gains.to_numpy(), None  # [seeds, prompts]; without accuracies by prompt [seeds, 1]
    seeds, prompts = accuracy_gains.shape
    if accuracy_gains.size > 1:
        rng = np.random.default_rng(0)
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
        drawn_values = (accuracy_gains[rng.integers(seeds, size=(RESAMPLES, seeds))].mean(axis=1) * weights).sum(axis=1)
    return _comparison(float(accuracy_gains.mean()), gains.mean(axis=1).to_dict(), drawn_values)


def _comparison(value: float, by_seed: dict[int, float], drawn: Array | None) -> ArmComparison:
    """The value with the interval of what was drawn, which is nothing where one pair is all there is."""
    nothing = Estimate(value=value, low=math.nan, high=math.nan)
    return ArmComparison(overall=nothing if drawn is None else interval(value, drawn), by_seed=by_seed)


def _drawn_sums(seeds: Sequence[Array], rng: np.random.Generator) -> Array:
    """Sums over a drawn bench, in each resample; shape [RESAMPLES, 2]."""
    picks = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    sums = np.zeros((RESAMPLES, 2))
    for number, rows in enumerate(seeds):
        count = len(rows)
        size = max(round(math.sqrt(count)), 1)
        for place in range(len(seeds)):
            starts = rng.integers(count, size=(RESAMPLES, -(-count // size)))
            index = ((starts[..., None] + np.arange(size)) % count).reshape(RESAMPLES, -1)[:, :count]
            sums += np.where((picks[:, place] == number)[:, None], rows[index].sum(axis=1), 0.0)
    return sums


def _over(sum_above: float, sum_below: float) -> float:
    return float(sum_above / sum_below) if sum_below else math.nan
