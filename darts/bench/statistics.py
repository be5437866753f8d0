"""Figures of a bench's arms, and of one arm over another: totals, paired ratios and differences, with intervals.

Contract: pure NumPy; records in, numbers out; NaN where there is nothing.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darts.bench.records import Record, StepRecord, ValidationRecord
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

    @property
    def count(self) -> int:
        """Seeds that reached it."""
        return sum(math.isfinite(seed_seconds) for seed_seconds in self.seconds.values())

    @property
    def median(self) -> float:
        """Over all seeds, those that never reached it as later than all others; infinite where half did not."""
        return float(np.median(list(self.seconds.values()))) if self.seconds else math.nan

    def __str__(self) -> str:
        if not self.count:
            return "-"
        median = f"{self.median:.0f} s" if math.isfinite(self.median) else "-"
        return median if self.count == len(self.seconds) else f"{median} ({self.count} of {len(self.seconds)} seeds)"


class BenchResults:
    """What a bench has measured so far, by arm.

    Args:
        records: of complete rounds; of a round that is there twice the last counts.
        arms: all that are to be told of, in their order; None: as they occur.
        steps: of a seed, as planned; None: the last that any arm has.
    """

    def __init__(self, records: Iterable[Record], arms: Sequence[str] | None = None, steps: int | None = None) -> None:
        self._steps: dict[str, dict[tuple[int, int], StepRecord]] = {}
        self._validations: dict[str, dict[tuple[int, int], ValidationRecord]] = {}
        found_arms: dict[str, None] = {}
        for bench_record in records:
            found_arms[bench_record.arm] = None
            records_by_arm = self._steps if isinstance(bench_record, StepRecord) else self._validations
            records_by_arm.setdefault(bench_record.arm, {})[bench_record.seed, bench_record.step] = bench_record  # type: ignore[assignment]
        self.arms = list(found_arms) if arms is None else list(arms)
        seed_steps = [seed_step for of_arm in self._steps.values() for seed_step in of_arm]
        self.seeds = sorted({seed_number for seed_number, _ in seed_steps})
        self.num_steps = max((step_number for _, step_number in seed_steps), default=0) if steps is None else steps

    @property
    def last_from(self) -> int:
        """The first step of the last third."""
        return self.num_steps - max(math.floor(self.num_steps * LAST), 1) + 1

    def steps(self, arm: str, last: bool = False) -> list[StepRecord]:
        """The steps of an arm, by seed and step; or those of the last third alone."""
        own = self._steps.get(arm, {})
        return [own[pair] for pair in sorted(own) if not last or pair[1] >= self.last_from]

    def validations(self, arm: str) -> list[ValidationRecord]:
        """The validations of an arm, by seed and step; those without an accuracy are left out."""
        own = self._validations.get(arm, {})
        found = [own[pair] for pair in sorted(own)]
        return [one for one in found if one.accuracy is not None and math.isfinite(one.accuracy)]

    # --- of one arm --------------------------------------------------------------------------------------------------

    def values(self, arm: str, key: str, last_third: bool = False) -> Array:
        """A field of an arm's steps, where it is known."""
        found_values = np.array([getattr(record, key) for record in self.steps(arm, last_third)], dtype=float)
        return found_values[~np.isnan(found_values)]

    def mean(self, arm_name: str, field_name: str, last: bool = False) -> float:
        """The mean of a field over steps."""
        return _or_nan(np.mean, self.values(arm_name, field_name, last))

    def median(self, arm_name: str, field_name: str, last: bool = False) -> float:
        """The median of a field over steps."""
        return _or_nan(np.median, self.values(arm_name, field_name, last))

    def total(self, arm_name: str, field_name: str) -> float:
        """Over steps; 0 without any."""
        return float(self.values(arm_name, field_name).sum())

    def bubble_ratio(self, arm_name: str) -> float:
        """Idle over all slot-steps; see `darts.bench.slots`."""
        slot_steps = self.total(arm_name, "slot_steps")
        return self.total(arm_name, "idle_slot_steps") / slot_steps if slot_steps else math.nan

    def useful_per_s(self, arm_name: str) -> float:
        """Kept tokens per second of rollout."""
        rollout_s = self.total(arm_name, "rollout_s")
        return self.total(arm_name, "tokens_kept") / rollout_s if rollout_s else math.nan

    def by_seed(self, arm: str, key: str) -> tuple[Array, Array]:
        """The steps [n] that have a field (of steps, or else of validations), and its values [seeds, n], maybe NaN."""
        records = self.steps(arm) if hasattr(StepRecord, key) else self.validations(arm)
        found = {(one.seed, one.step): getattr(one, key) for one in records if one.seed in self.seeds}
        known = {pair: value for pair, value in found.items() if value is not None and math.isfinite(value)}
        steps = sorted({step for _, step in known})
        values = [known.get((seed, step), math.nan) for seed in self.seeds for step in steps]
        return np.array(steps, dtype=float), np.array(values).reshape(len(self.seeds), len(steps))

    def accuracy(self, arm: str, last: bool = False) -> float:
        """Mean over seeds, after the last step that has one; or over the validations of the last third."""
        accuracies = {(one.seed, one.step): one.accuracy for one in self.validations(arm)}
        found = self._at_end(sorted(accuracies), last)
        by_seed = [np.mean([accuracies[seed, step] for step in steps]) for seed, steps in found.items()]
        return _or_nan(np.mean, np.array(by_seed))

    def seconds_at(self, arm: str, seed: int, step: int) -> float:
        """Seconds of training until this step has ended; NaN where a step before is missing."""
        own = self._steps.get(arm, {})
        done = [own[seed, one].step_s for one in range(1, step + 1) if (seed, one) in own]
        return sum(done) if len(done) == step else math.nan

    def target(self, base: str) -> float:
        """The accuracy that times are told to where none is given: the base's over the last third (our choice)."""
        return self.accuracy(base, last=True)

    def time_to(self, arm: str, accuracy: float) -> Reached:
        """Seconds of training, the steps' own, until a validation had at least this accuracy.

        Validations are noisy and this is the first that is high enough, so times are early, for all arms alike.
        """
        seconds: dict[int, float] = {}
        for record in self.validations(arm):
            seconds.setdefault(record.seed, math.inf)
            if record.accuracy >= accuracy and seconds[record.seed] == math.inf:
                seconds[record.seed] = self.seconds_at(arm, record.seed, record.step)
        return Reached(seconds={seed: math.inf if math.isnan(value) else value for seed, value in seconds.items()})

    # --- of one arm over another -------------------------------------------------------------------------------------

    def ratio(self, arm: str, base: str, key: str, last: bool = False) -> ArmComparison:
        """The total of a field of `base` over that of `arm`, over the pairs of both: a speed-up where it is seconds."""
        own, other = ({(one.seed, one.step): one for one in self.steps(name, last)} for name in (arm, base))
        rows: dict[int, list[tuple[float, float]]] = {}
        for pair in sorted(own.keys() & other.keys()):
            rows.setdefault(pair[0], []).append((getattr(other[pair], key), getattr(own[pair], key)))
        return compared(rows)

    def speed_up(self, arm_name: str, base_arm: str, last: bool = False) -> ArmComparison:
        """The base's seconds over the arm's."""
        return self.ratio(arm_name, base_arm, "step_s", last)

    def accuracy_gain(self, arm: str, base: str, last: bool = False) -> ArmComparison:
        """The arm's accuracy minus the base's, after the last step that both validated; or over the last third."""
        own, other = ({(one.seed, one.step): one for one in self.validations(name)} for name in (arm, base))
        found = self._at_end(sorted(pair for pair in own.keys() & other.keys() if pair[1] > 0), last)
        pairs = {seed: [(own[seed, step], other[seed, step]) for step in steps] for seed, steps in found.items()}
        return difference(pairs)

    def _at_end(self, validated_steps: Sequence[tuple[int, int]], last_third: bool) -> dict[int, list[int]]:
        """The steps of the last third of (seed, step), by seed; or the last step of all, where a seed has it."""
        first_step = self.last_from if last_third else max((step for _, step in validated_steps), default=0)
        seed_steps: dict[int, list[int]] = {}
        for seed, step in validated_steps:
            if step >= first_step:
                seed_steps.setdefault(seed, []).append(step)
        return seed_steps


def compared(seed_rows: dict[int, list[tuple[float, float]]]) -> ArmComparison:
    """The sum of the first numbers over the sum of the second, with an interval; see the module's contract.

    Args:
        seed_rows: by seed, pairs that belong together, in the order of steps.
    """
    seeds = {seed: np.array(seed_array, dtype=float) for seed, seed_array in sorted(seed_rows.items()) if seed_array}
    seed_sums = {seed: seed_array.sum(axis=0) for seed, seed_array in seeds.items()}
    by_seed = {seed: _over(*both) for seed, both in seed_sums.items()}
    total_ratio, drawn_values = _over(*sum(seed_sums.values(), np.zeros(2))), None
    if sum(len(seed_array) for seed_array in seeds.values()) > 1:
        drawn_totals = _drawn_sums(list(seeds.values()), np.random.default_rng(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn_values = drawn_totals[:, 0] / drawn_totals[:, 1]
    return _comparison(total_ratio, by_seed, drawn_values)


def difference(record_pairs: dict[int, list[tuple[ValidationRecord, ValidationRecord]]]) -> ArmComparison:
    """The mean over seeds of the first accuracy minus the second, with an interval; see the module's contract.

    Args:
        record_pairs: by seed, of validations after the same steps.
    """
    if not record_pairs:
        return _comparison(math.nan, {}, None)
    accuracy_gains = _differences(record_pairs)
    by_seed = dict(zip(record_pairs, accuracy_gains.mean(axis=1).tolist(), strict=True))
    (seeds, prompts), drawn_values = accuracy_gains.shape, None
    if accuracy_gains.size > 1:
        rng = np.random.default_rng(0)
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
        drawn_values = (accuracy_gains[rng.integers(seeds, size=(RESAMPLES, seeds))].mean(axis=1) * weights).sum(axis=1)
    return _comparison(float(accuracy_gains.mean()), by_seed, drawn_values)


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


def _differences(pairs: dict[int, list[tuple[ValidationRecord, ValidationRecord]]]) -> Array:
    """[seeds, prompts], means over a seed's validations; [seeds, 1] where not all have the same number of prompts."""
    sizes = {len(one.prompt_accuracy) for some in pairs.values() for pair in some for one in pair}
    by_prompt = len(sizes) == 1 and sizes != {0}

    def accuracy(bench_record: ValidationRecord) -> Array:
        return np.array(bench_record.prompt_accuracy if by_prompt else [bench_record.accuracy])

    by_seed = [[accuracy(own) - accuracy(other) for own, other in some] for some in pairs.values()]
    return np.array([np.mean(some, axis=0) for some in by_seed])


def known_mean(values: Array) -> Array:
    """The means along the last axis of what is known; NaN where nothing is."""
    is_known = np.isfinite(values)
    row_count = is_known.sum(axis=-1)
    return np.where(row_count > 0, np.where(is_known, values, 0).sum(axis=-1) / np.maximum(row_count, 1), math.nan)


def _or_nan(mean_function: Callable[[Array], float], known_values: Array) -> float:
    return float(mean_function(known_values)) if len(known_values) else math.nan


def _over(sum_above: float, sum_below: float) -> float:
    return float(sum_above / sum_below) if sum_below else math.nan
