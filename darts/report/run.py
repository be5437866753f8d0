"""A run as the page shows it: the steps that count, and what is held of each."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.evidence.trace import FATES, TracedStep, TraceError, read_steps

Array = NDArray[np.float64]
REWARDS = ("critic/rewards/mean", "critic/score/mean", "darts/reward/kept_mean")  # the first that is there
VALIDATION = "val-core/"
HELD = ("timing_s/", "darts/", VALIDATION, *REWARDS)  # names of the metrics that are held of a step begin so
MAX_LENGTHS = 512  # held of a step; of more, as many evenly spaced ranks
MAX_PROMPTS = 128  # held of a step for the scatter plots
PROGRESS_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDigest:
    """What is held of a rollout. Example: fates=[64, 0, 0, 12, 1, 7, 0], lengths=[9, ...], budgets={10: 4, 11: 4}."""

    fates: NDArray[np.int64]  # candidates by fate, in the order of FATES
    lengths: NDArray[np.int32]  # sorted; at most MAX_LENGTHS
    budgets: Counter[int]  # M'_i -> prompts
    std: NDArray[np.float32]  # [prompts whose std was predicted, at most MAX_PROMPTS; predicted, observed, M'_i]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """One training step. Example: number=3, values={"timing_s/step": 3.7, "length/p99": 88.0, ...}, rollout=None."""

    number: int
    values: dict[str, float]  # what was logged and what was computed from the rollout; finite
    rollout: RolloutDigest | None
    offset: int | None = None  # byte at which its line begins in the file; None: the line has no timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step, in seconds since its rollout began, as `darts.evidence.trace.timeline_columns` has it."""

    step: RunStep
    chosen_of: int  # steps, of which this has the median time; 0 where it was asked for
    seconds: float  # of the rollout
    running: Array  # [points; from when on, candidates that had not ended]
    calls: Array  # [calls of the actor, maybe none; begin, end, tokens]


@dataclass(slots=True, kw_only=True)
class Run:
    """The steps that count, in order, and what was odd about the file."""

    name: str
    steps: list[RunStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timeline: Timeline | None = None

    @property
    def rolled(self) -> list[RunStep]:
        """The steps that had a DARTS rollout."""
        return [step for step in self.steps if step.rollout]

    def series(self, key: str) -> Array:
        """A value by step, NaN where it is missing."""
        return np.array([step.values.get(key, math.nan) for step in self.steps])

    def has(self, *keys: str) -> bool:
        """Whether a step has one of the values."""
        return any(key in step.values for step in self.steps for key in keys)

    def reward(self) -> str:
        """Name of the reward that the page reports."""
        return next(filter(self.has, REWARDS), REWARDS[0])

    def validations(self) -> list[str]:
        """The validation metrics: the means over samples, or where there is none, all."""
        validation_keys = sorted({key for step in self.steps for key in step.values if key.startswith(VALIDATION)})
        return [key for key in validation_keys if "/mean@" in key] or validation_keys

    def hours(self) -> Array:
        """Hours of training at the end of each step; a step without a time takes the median; NaN without any."""
        seconds = self.series("timing_s/step")
        known = seconds[np.isfinite(seconds)]
        return np.cumsum(np.where(np.isfinite(seconds), seconds, np.median(known) if len(known) else math.nan)) / 3600


def tenths(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first and last tenth, at least one each."""
    tenth_size = max(1, len(values) // 10)
    return values[:tenth_size], values[-tenth_size:]


def mean_of(values: Any) -> float:
    """The mean; NaN without values."""
    return float(np.mean(values)) if len(values) else math.nan


def first_and_last(values: Array) -> tuple[float, float]:
    """Means of the first and last tenth of the values that are known; NaN where none is."""
    first, last = tenths(values[np.isfinite(values)])
    return mean_of(first), mean_of(last)


def read_run(path: Path, shown_step: int | None = None) -> Run:
    """Reads a file of steps, with progress on stderr if it takes long.

    Args:
        path: of the file.
        shown_step: the number of the step whose timeline is shown; None: a typical late one.

    Raises:
        TraceError: what `read_steps` refuses, a timeline that is none, or no timeline of the step that is to be shown.
    """
    said_at, file_size = time.monotonic(), path.stat().st_size

    def hold(traced: TracedStep) -> RunStep:
        nonlocal said_at
        if time.monotonic() - said_at > PROGRESS_S:
            said_at = time.monotonic()
            print(f"{path.name}: {traced.offset / 1e6:.0f} of {file_size / 1e6:.0f} MB read", file=sys.stderr)
        rollout, step_values = _reduce(traced) if traced.keys else (None, {})
        step_values |= {sys.intern(key): value for key, value in traced.metrics.items() if key.startswith(HELD)}
        finite_values = {key: value for key, value in step_values.items() if math.isfinite(value)}
        line_offset = traced.offset if traced.has_timeline else None
        return RunStep(number=traced.number, values=finite_values, rollout=rollout, offset=line_offset)

    steps, notes = read_steps(path, hold)
    run = Run(name=path.name, steps=steps, notes=[f"{note}." for note in notes])
    if missing := int(np.isnan(run.series("timing_s/step")).sum()):
        run.notes.append(f"Without timing_s/step: {missing} steps; on axes of time they take the median of the others.")
    run.timeline = _timeline(path, steps, shown_step)
    return run


def _timeline(path: Path, steps: Sequence[RunStep], number: int | None) -> Timeline | None:
    """The timeline of a step, whose line is read again; without a number, of the step with the (lower) median time in
    the last tenth of those that have a timeline and a time."""
    timed = [step for step in steps if step.offset is not None and "timing_s/step" in step.values]
    chosen_of = [step for step in timed if step.number == number]
    if number is None:
        chosen_of = sorted(tenths(timed)[1], key=lambda step: step.values["timing_s/step"])
    elif not chosen_of:
        known_steps = f"{len(timed)} of them, {timed[0].number} to {timed[-1].number}" if timed else "none"
        raise TraceError(f"--step {number}: must be a step with a timeline and a time, but the trace has {known_steps}")
    if not chosen_of:
        return None
    step = chosen_of[(len(chosen_of) - 1) // 2]
    with path.open("rb") as file:
        file.seek(step.offset)
        columns = json.loads(file.readline())["timeline"]
    try:
        seconds = float(columns["seconds"])
        running, calls = (np.array(columns[name], dtype=float) for name in ("running", "calls"))
        running, calls = running.reshape(len(running), 2), calls.reshape(len(calls), 3)
        if not len(running) or not np.isfinite([seconds, *running.flat, *calls.flat]).all():
            raise ValueError("running is empty, or something is not a finite number")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        rule = f"timeline must have seconds, running and calls, but {error!r}; remove the line"
        raise TraceError(f"{path}, step {step.number}: {rule}") from None
    num_chosen_of = len(chosen_of) if number is None else 0
    return Timeline(step=step, chosen_of=num_chosen_of, seconds=seconds, running=running, calls=calls)


def _reduce(traced: TracedStep) -> tuple[RolloutDigest, dict[str, float]]:
    """What the page needs of a step's rollout: what is held, and figures, NaN where they are not known."""
    letters = "".join(traced.fates)
    lengths, rewards, fates = np.concatenate(traced.lengths), np.concatenate(traced.rewards), np.array(list(letters))
    is_kept, has_ended = np.isin(fates, list("kfc")), ~np.isin(fates, list("acx"))
    budgets = np.array([len(row) for row in traced.lengths])
    std_rows = np.stack([traced.std, traced.observed_std, budgets], axis=1)[np.isfinite(traced.std)]
    both_known = std_rows[np.isfinite(std_rows[:, 1]), :2]
    has_correlation = len(both_known) > 2 and np.ptp(both_known, axis=0).all()
    percentiles = zip(("median", "p90", "p99", "longest"), np.percentile(lengths, (50, 90, 99, 100)), strict=True)
    values = {
        **{f"length/{name}": float(length) for name, length in percentiles},
        "length/pool": mean_of(lengths),
        "length/kept": mean_of(lengths[is_kept]),
        "tokens/generated": float(lengths.sum()),
        "tokens/kept": float(lengths[is_kept].sum()),
        "darts/reward/kept_mean": mean_of(rewards[is_kept]),  # NaN if one was not scored, as in darts.metrics
        "darts/reward/pool_mean": mean_of(rewards[has_ended]),
        "std_correlation": float(np.corrcoef(both_known.T)[0, 1]) if has_correlation else math.nan,
    }
    digest = RolloutDigest(
        fates=np.array([letters.count(letter) for letter in FATES]),
        lengths=_spread(np.sort(lengths), MAX_LENGTHS).astype(np.int32),
        budgets=Counter(map(len, traced.lengths)),
        std=_spread(std_rows, MAX_PROMPTS).astype(np.float32),
    )
    return digest, values


def _spread(rows: NDArray[Any], max_rows: int) -> NDArray[Any]:
    """At most so many of the rows, evenly spaced."""
    return rows if len(rows) <= max_rows else rows[((np.arange(max_rows) + 0.5) * len(rows) / max_rows).astype(int)]
