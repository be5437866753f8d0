"""Simulated against measured seconds, strategy by strategy: `python -m darts.simulation validate`.

Contract: pure, but for `read_bench`. Costs come from plain runs alone (`darts.simulation.costs.fit`); nothing is fitted
per strategy. Measured and simulated figures are means over all steps: strategies with a queue have rounds of different
kinds, of which a median shows the most frequent alone. Noise of the machine is in the means of all arms, which take
turns.

Of the JSON of a benchmark little is read, so that the format may grow: the table `steps` by column, with `arm`,
`step_s` and maybe `rollout_s`; of each of `arms` its `name`, `strategy` (else the name), `changes` (by path within
`darts:`), `overlap` and `bypass`, where they are there; below them lies `darts` of `config`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from darts.evidence.tables import number, table
from darts.simulation import SimulationError
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Setting, replay, width
from darts.simulation.search import merged, nested
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
    try:
        records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except (TypeError, ValueError) as error:
        raise SimulationError(f"{path}: steps must be columns of one length, but {error}.") from None
    found_arms: dict[str, MeasuredArm] = {}
    for place, record in enumerate(records):
        name, step_s, rollout_s = _times(f"{path}, steps[{place}]", record)
        measured = found_arms.setdefault(name, MeasuredArm(arm=_arm(bench_state, name), step_s=[], rollout_s=[]))
        measured.step_s.append(step_s)
        measured.rollout_s.append(rollout_s)
    return list(found_arms.values())


def _times(where: str, record: Mapping[str, Any]) -> tuple[str, float, float]:
    try:
        name, step_s, rollout_s = str(record["arm"]), float(record["step_s"]), record.get("rollout_s", math.nan)
        if not 0 < step_s < math.inf:
            raise ValueError(f"step_s={step_s}")
        return name, step_s, float(rollout_s)
    except (KeyError, TypeError, ValueError) as error:
        rule = f"must have arm and a positive step_s, but {error!r}"
        raise SimulationError(f"{where}: {rule}; remove the record.") from None


def _arm(state: Mapping[str, Any], name: str) -> ReplayArm:
    arm = next((arm for arm in state.get("arms") or () if arm.get("name") == name), {})
    block = (state.get("config") or {}).get("darts") or {}
    overlap = {} if arm.get("overlap") is None else {"overlap.mode": arm["overlap"]}
    for key, value in (dict(arm.get("changes") or {}) | overlap).items():
        block = merged(block, nested(key, value))
    block = merged(block, {"enable": True, "strategy": arm.get("strategy", name)})
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
    say: Callable[[str], None] = lambda line: None,
) -> list[ComparedSeconds]:
    """Replays each arm and compares.

    Args:
        trace: lengths, for arms that have none of their own.
        traces: lengths of an arm's own runs, by its name; each is replayed, and the mean is over all.
        say: hears how far it is.

    Raises:
        ConfigError, SimulationError: an arm whose settings or trace cannot be used.
    """
    compared_arms = []
    for measured_arm in measured_arms:
        arm, step_times = measured_arm.arm, []
        for lengths in own_traces.get(arm.name) or [trace]:
            run_setting = replace(setting, response_length=max(lengths.response_length, trace.response_length))
            dataset = Dataset(lengths, width(arm, run_setting))
            for step_count, step in enumerate(replay(arm, run_setting, dataset, num_steps), 1):
                step_times.append(step.time)
                say(f"{arm.name}: step {step_count}/{num_steps}")
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
    rows = []
    for row in compared:
        time_cells = [f"{row.measured_s:.3f}", f"{row.simulated_s:.3f}", f"{row.error:+.1%}"]
        time_cells += [number(row.measured_rollout_s, ".3f"), f"{row.simulated_rollout_s:.3f}"]
        rows.append([row.name, row.steps, *time_cells])
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
    pairs = np.triu_indices(len(first), 1)
    signs = [np.sign(values[pairs[0]] - values[pairs[1]]) for values in map(np.asarray, (first, second))]
    agreement = signs[0] * signs[1]
    return float(agreement.mean()) if len(agreement) else math.nan


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, ties with their mean rank; NaN for fewer than two values or where all are equal."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    if len(ranks[0]) < 2 or any(np.ptp(rank_values) == 0 for rank_values in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
