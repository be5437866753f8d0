"""A run as the page shows it: the steps that count, and what is held of each."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.evidence.trace import FATES, INSIDE_STEP, TracedStep, TraceError, read_steps

Array = NDArray[np.float64]
REWARDS = ("critic/rewards/mean", "critic/score/mean", "darts/reward/kept_mean")
"""The reward of a run is the first of these that it has."""
UTILITY = tuple(f"darts/allocation/{name}" for name in ("utility", "gain", "time_cost", "time_cost_measured"))
OVERLAP = tuple(
    f"darts/overlap/{name}"
    for name in (
        "hidden_s", "exposed_s", "hidden_share", "calls", "forwarded_per_kept", "in_rollout_share", "before_end_share",
        "cache_peak_gib", "tokens_twice", "late_rows",
    )
)  # fmt: skip
LOGGED = (
    *(f"timing_s/{name}" for name in ("step", *INSIDE_STEP, "testing")), *REWARDS, *UTILITY, *OVERLAP,
    "darts/reward/pool_mean", "darts/group/saturated_share", "darts/history/std_correlation",
    "darts/latency/predicted_s", "darts/rollout/seconds",
)  # fmt: skip
VALIDATION = "val-core/"
MAX_LENGTHS = 512  # held of a step; of more, as many evenly spaced ranks
MAX_PROMPTS = 128  # held of a step for the scatter plots
PROGRESS_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDigest:
    """What is held of a rollout. Example: fates=[64, 0, 12, 1, 7, 0], lengths=[9, 11, ...], budgets={10: 4, 11: 4}."""

    fates: NDArray[np.int64]  # candidates by fate, in the order of FATES
    lengths: NDArray[np.int32]  # sorted; at most MAX_LENGTHS
    budgets: dict[int, int]  # M'_i -> prompts
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

    def reward(self) -> tuple[str, Array]:
        """Name and values of the reward that the page reports; all NaN without any."""
        key = next((key for key in REWARDS if np.isfinite(self.series(key)).any()), REWARDS[0])
        return key, self.series(key)

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
        shown_step: the number of the step whose timeline is shown; None: the one that `_choose` chooses.

    Raises:
        TraceError: what `read_steps` refuses, a timeline that is none, or no timeline of the step that is to be shown.
    """
    said_at, file_size = time.monotonic(), path.stat().st_size

    def hold(traced: TracedStep) -> RunStep:
        nonlocal said_at
        if time.monotonic() - said_at > PROGRESS_S:
            said_at = time.monotonic()
            print(f"{path.name}: {traced.offset / 1e6:.0f} of {file_size / 1e6:.0f} MB read", file=sys.stderr)
        return _digest(traced)

    steps, notes = read_steps(path, hold)
    run = Run(name=path.name, steps=steps, notes=[f"{note}." for note in notes])
    if missing := int(np.isnan(run.series("timing_s/step")).sum()):
        run.notes.append(f"Without timing_s/step: {missing} steps; on axes of time they take the median of the others.")
    chosen_step, chosen_of = _choose(steps, shown_step)
    run.timeline = chosen_step and _read_timeline(path, chosen_step, chosen_of)
    return run


def _digest(traced: TracedStep) -> RunStep:
    """What is held of a step."""
    logged = traced.metrics
    rollout, step_values = reduce_rollout(traced) if traced.keys else (None, {})
    keys = [key for key in LOGGED if key in logged] + [sys.intern(key) for key in logged if key.startswith(VALIDATION)]
    step_values |= {key: logged[key] for key in keys}
    finite_values = {key: value for key, value in step_values.items() if math.isfinite(value)}
    line_offset = traced.offset if traced.has_timeline else None
    return RunStep(number=traced.number, values=finite_values, rollout=rollout, offset=line_offset)


def _choose(steps: Sequence[RunStep], number: int | None) -> tuple[RunStep | None, int]:
    """The step whose timeline is shown, and of how many it has the (lower) median time: the last tenth of those that
    have a timeline and a time."""
    timed = [step for step in steps if step.offset is not None and "timing_s/step" in step.values]
    if number is None:
        last_steps = sorted(tenths(timed)[1], key=lambda step: step.values["timing_s/step"])
        return (last_steps[(len(last_steps) - 1) // 2], len(last_steps)) if last_steps else (None, 0)
    chosen_step = next((step for step in timed if step.number == number), None)
    if chosen_step is None:
        known_steps = f"{len(timed)} of them, {timed[0].number} to {timed[-1].number}" if timed else "none"
        raise TraceError(f"--step {number}: must be a step with a timeline and a time, but the trace has {known_steps}")
    return chosen_step, 0


def _read_timeline(path: Path, step: RunStep, chosen_of: int) -> Timeline:
    """The timeline of a step, whose line is read again."""
    with path.open("rb") as file:
        file.seek(step.offset)
        json_line = file.readline()
    try:
        timeline_columns = json.loads(json_line)["timeline"]
        running_points, calls = (np.array(timeline_columns[name], dtype=float) for name in ("running", "calls"))
        timeline = Timeline(
            step=step,
            chosen_of=chosen_of,
            seconds=float(timeline_columns["seconds"]),
            running=running_points.reshape(len(running_points), 2),
            calls=calls.reshape(len(calls), 3),
        )
        if not len(running_points) or not np.isfinite([timeline.seconds, *running_points.flat, *calls.flat]).all():
            raise ValueError("running is empty, or something is not a finite number")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path}, step {step.number}: timeline must have seconds, running and calls, but {error!r}; remove the line"
        ) from None
    return timeline


def reduce_rollout(traced: TracedStep) -> tuple[RolloutDigest, dict[str, float]]:
    """What the page needs of a step's rollout: what is held, and figures, NaN where they are not known."""
    letters = "".join(traced.fates)
    lengths, rewards, fates = np.concatenate(traced.lengths), np.concatenate(traced.rewards), np.array(list(letters))
    is_kept, has_ended = np.isin(fates, list("kf")), ~np.isin(fates, list("ax"))
    budgets = np.array([len(row) for row in traced.lengths])
    std_rows = np.stack([traced.std, traced.observed_std, budgets], axis=1)[np.isfinite(traced.std)]
    both_known = std_rows[np.isfinite(std_rows[:, 1]), :2]
    has_correlation = len(both_known) > 2 and np.ptp(both_known, axis=0).all()
    percentile_ranks = {"median": 50, "p90": 90, "p99": 99, "longest": 100}
    values = {
        **{f"length/{name}": float(np.percentile(lengths, rank)) for name, rank in percentile_ranks.items()},
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
        budgets=dict(zip(*map(np.ndarray.tolist, np.unique(budgets, return_counts=True)), strict=True)),
        std=_spread(std_rows, MAX_PROMPTS).astype(np.float32),
    )
    return digest, values


def _spread(rows: NDArray[Any], max_rows: int) -> NDArray[Any]:
    """At most so many of the rows, evenly spaced."""
    return rows if len(rows) <= max_rows else rows[((np.arange(max_rows) + 0.5) * len(rows) / max_rows).astype(int)]
