"""Simulated against measured seconds, strategy by strategy: `python -m darts.simulation validate`.

Contract: pure. Costs come from plain runs alone (`darts.simulation.costs.fit`); nothing is fitted per strategy.
Measured and simulated figures are means over all steps: strategies with a queue have rounds of different kinds, of
which a median shows the most frequent alone. Noise of the machine is in the means of all arms, which take turns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from darts.evidence.tables import number, table
from darts.simulation.bench_records import MeasuredArm
from darts.simulation.draws import Dataset
from darts.simulation.replay import Setting, replay, width
from darts.simulation.trace import LengthTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSeconds:
    """One arm. Example: name="darts", measured_s=3.0, simulated_s=3.2, measured_rollout_s=1.9, ..."""

    name: str
    steps: int  # measured
    measured_s: float
    simulated_s: float
    measured_rollout_s: float  # NaN where not measured
    simulated_rollout_s: float

    @property
    def error(self) -> float:
        """Of the simulated seconds a step, relative to the measured."""
        return self.simulated_s / self.measured_s - 1


def validate(
    arms: Sequence[MeasuredArm],
    trace: LengthTrace,
    setting: Setting,
    steps: int,
    own: Mapping[str, Sequence[LengthTrace]],
    say: Callable[[str], None] = lambda line: None,
) -> list[ComparedSeconds]:
    """Replays each arm and compares.

    Args:
        arms: what was measured.
        trace: lengths, for arms that have none of their own.
        setting: what they have in common.
        steps: to be replayed of each.
        own: lengths of an arm's own runs, by its name; each is replayed, and the mean is over all.
        say: hears how far it is.

    Raises:
        ConfigError, SimulationError: an arm whose settings or trace cannot be used.
    """
    compared = []
    for measured in arms:
        arm, done = measured.arm, []
        for some in own.get(measured.name) or [trace]:
            here = replace(setting, response_length=max(some.response_length, trace.response_length))
            dataset = Dataset(some, width(arm, here))
            for count, step in enumerate(replay(arm, here, dataset, steps), 1):
                done.append(step)
                say(f"{arm.name}: step {count}/{steps}")
        compared.append(
            ComparedSeconds(
                name=measured.name,
                steps=len(measured.step_s),
                measured_s=float(np.mean(measured.step_s)),
                simulated_s=float(np.mean([step.time.step for step in done])),
                measured_rollout_s=float(np.mean(measured.rollout_s)),
                simulated_rollout_s=float(np.mean([step.time.rollout for step in done])),
            )
        )
    return compared


def markdown(compared: Sequence[ComparedSeconds]) -> str:
    """One row for each arm."""
    rows = []
    for row in compared:
        times = [f"{row.measured_s:.3f}", f"{row.simulated_s:.3f}", f"{row.error:+.1%}"]
        times += [number(row.measured_rollout_s, ".3f"), f"{row.simulated_rollout_s:.3f}"]
        rows.append([row.name, row.steps, *times])
    columns = ["strategy", "steps", "measured s a step", "simulated", "error", "measured rollout s", "simulated"]
    return table(columns, rows)


def verdict(compared: Sequence[ComparedSeconds]) -> str:
    """Median error and rank agreement, in one line."""
    errors = [abs(row.error) for row in compared]
    measured, simulated = ([getattr(row, name) for row in compared] for name in ("measured_s", "simulated_s"))
    return (
        f"median error {np.median(errors):.1%}, largest {max(errors):.1%} over {len(compared)} strategies; ranking: "
        f"Kendall's tau {kendall(measured, simulated):.2f}, Spearman's rho {spearman(measured, simulated):.2f}"
    )


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-a: concordant less discordant pairs over all pairs; NaN for fewer than two values."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    upper = np.triu_indices(len(a), 1)
    signs = np.sign(a[upper[0]] - a[upper[1]]) * np.sign(b[upper[0]] - b[upper[1]])
    return float(signs.mean()) if len(signs) else math.nan


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, ties with their mean rank; NaN for fewer than two values or where all are equal."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    if len(ranks[0]) < 2 or any(np.ptp(some) == 0 for some in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
