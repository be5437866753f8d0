"""Simulated against measured seconds, strategy by strategy: `python -m darts.simulation validate`.

Contract: costs come from plain runs alone (`darts.simulation.costs.fit`); nothing is fitted per strategy. Measured and
simulated figures are means over all steps: strategies with a queue have rounds of different kinds, of which a median
shows the most frequent alone. Noise of the machine is in the means of all arms, which take turns.

Of the JSON of a benchmark little is read, so that the format may grow: the table `steps` by column, with `arm`,
`step_s` and maybe `rollout_s`; of each of `arms` its `name`, `strategy` (else the name), `changes` (by path within
`darts:`), `overlap` and `bypass`, where they are there; below them lies `darts` of `config`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from darts.evidence.tables import number, table
from darts.simulation import SimulationError
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Setting, replay
from darts.simulation.search import with_settings
from darts.simulation.trace import LengthTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredArm:
    """An arm of a benchmark. Example: arm=ReplayArm(name="darts", ...), step_s=[3.1, 3.0], rollout_s=[2.0, 1.9]."""

    arm: ReplayArm
    step_s: list[float]
    rollout_s: list[float]  # NaN where not measured


def read_bench(path: Path) -> list[MeasuredArm]:
    """The arms in the order in which they first occur.

    Raises:
        SimulationError: no such file, not JSON, or records that lack something.
    """
    try:
        bench_state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SimulationError(f"{path}: must be JSON, but {error}; give the JSON of a benchmark.") from None
    columns = bench_state.get("steps") if isinstance(bench_state, Mapping) else None
    if not isinstance(columns, Mapping) or not columns:
        raise SimulationError(f"{path}: has no steps; give the JSON that the benchmark of strategies wrote.")
    found_arms: dict[str, MeasuredArm] = {}
    where = f"{path}, steps[0]"
    try:
        for place, row in enumerate(zip(*columns.values(), strict=True)):
            where = f"{path}, steps[{place}]"
            record = dict(zip(columns, row, strict=True))
            name, step_s, rollout_s = str(record["arm"]), float(record["step_s"]), record.get("rollout_s", math.nan)
            if not 0 < step_s < math.inf:
                raise ValueError(f"step_s={step_s}")
            measured = found_arms.setdefault(name, MeasuredArm(arm=_arm(bench_state, name), step_s=[], rollout_s=[]))
            measured.step_s.append(step_s)
            measured.rollout_s.append(float(rollout_s))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        rule = f"must have arm and a positive step_s, in columns of one length, but {error!r}"
        raise SimulationError(f"{where}: {rule}; remove the record.") from None
    return list(found_arms.values())


def _arm(state: Mapping[str, Any], name: str) -> ReplayArm:
    arm = next((arm for arm in state.get("arms") or () if arm.get("name") == name), {})
    changes = dict(arm.get("changes") or {})
    if arm.get("overlap") is not None:
        changes["overlap.mode"] = arm["overlap"]
    block = with_settings((state.get("config") or {}).get("darts") or {}, changes)
    block |= {"enable": True, "strategy": arm.get("strategy", name)}
    return ReplayArm(name=name, block=block, bypass=bool(arm.get("bypass", False)))


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
        """How far off the simulated seconds a step are, relative to the measured."""
        return self.simulated_s / self.measured_s - 1


def validate(
    measured_arms: Sequence[MeasuredArm],
    trace: LengthTrace,
    setting: Setting,
    num_steps: int,
    own_traces: Mapping[str, Sequence[LengthTrace]],
) -> list[ComparedSeconds]:
    """Replays each arm and compares.

    Args:
        trace: lengths, for arms that have none of their own.
        own_traces: lengths of an arm's own runs, by its name; each is replayed, and the mean is over all.

    Raises:
        ConfigError, SimulationError: an arm whose settings or trace cannot be used.
    """
    compared_arms = []
    for measured_arm in measured_arms:
        arm, step_times = measured_arm.arm, []
        for lengths in own_traces.get(arm.name) or [trace]:
            run_setting = replace(setting, response_length=max(lengths.response_length, trace.response_length))
            dataset = Dataset(lengths, run_setting.width(arm))
            step_times += [step.time for step in replay(arm, run_setting, dataset, num_steps)]
        compared_arms.append(
            ComparedSeconds(
                name=arm.name,
                steps=len(measured_arm.step_s),
                measured_s=float(np.mean(measured_arm.step_s)),
                simulated_s=float(np.mean([time.step for time in step_times])),
                measured_rollout_s=float(np.mean(measured_arm.rollout_s)),
                simulated_rollout_s=float(np.mean([time.rollout for time in step_times])),
            )
        )
    return compared_arms


def markdown(compared: Sequence[ComparedSeconds]) -> str:
    """One row for each arm."""
    columns = ["strategy", "steps", "measured s a step", "simulated", "error", "measured rollout s", "simulated"]
    rows = []
    for row in compared:
        step_cells = [f"{row.measured_s:.3f}", f"{row.simulated_s:.3f}", f"{row.error:+.1%}"]
        rollout_cells = [number(row.measured_rollout_s, ".3f"), f"{row.simulated_rollout_s:.3f}"]
        rows.append([row.name, row.steps, *step_cells, *rollout_cells])
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
    num_pairs = len(first) * (len(first) - 1)
    return float((_order(first) * _order(second)).sum() / num_pairs) if num_pairs else math.nan


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, ties with their mean rank; NaN for fewer than two values or where all are equal."""
    ranks = [_order(values).sum(axis=1) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(map(np.ptp, ranks)) else math.nan


def _order(values: Sequence[float]) -> np.ndarray:
    """Signs of all differences, [values, values]; the sum of a row is twice the mean rank, but for a constant."""
    return np.sign(np.subtract.outer(values, values))
