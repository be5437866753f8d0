"""What was measured: the JSON of a benchmark of strategies, as far as `validate` needs it.

Contract: thin, so that the format may grow. The steps are a list `records`, or a table `steps` of columns; each has
`arm`, `step_s` and maybe `rollout_s`. Of `arms` (a list with `name`, or a mapping by name) are read, where they are
there: `strategy` (else the arm's name), `changes` (by path within `darts:`), `overlap`, and a block `darts`; below them
lies `darts` of `config`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.simulation import SimulationError
from darts.simulation.replay import Arm
from darts.simulation.search import merged, nested


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredArm:
    """An arm's steps. Example: name="darts", block={"strategy": "darts"}, step_s=[3.1, 3.0], rollout_s=[2.0, 1.9]."""

    name: str
    block: Mapping[str, Any]  # `darts:`
    step_s: NDArray[np.float64]
    rollout_s: NDArray[np.float64]  # NaN where not measured
    bypass: bool = False

    @property
    def arm(self) -> Arm:
        """As it is replayed."""
        return Arm(name=self.name, block=self.block, bypass=self.bypass)


def read_bench(path: Path) -> list[MeasuredArm]:
    """The arms in the order in which they first occur.

    Raises:
        SimulationError: no such file, not JSON, or records that lack something.
    """
    try:
        state = json.loads(path.read_text())
    except OSError as error:
        raise SimulationError(f"{path}: cannot be read ({error.strerror}); give the JSON of a benchmark.") from None
    except ValueError as error:
        raise SimulationError(f"{path}: must be JSON, but {error}; give the JSON of a benchmark.") from None
    steps: dict[str, list[tuple[float, float]]] = {}
    for number, record in enumerate(_records(path, state)):
        name, times = _times(f"{path}, records[{number}]", record)
        steps.setdefault(name, []).append(times)
    told = state.get("arms") or {}
    arms = told if isinstance(told, Mapping) else {str(arm.get("name")): arm for arm in told}
    shared = (state.get("config") or {}).get("darts") or {}
    found = []
    for name, times in steps.items():
        arm, own = arms.get(name) or {}, np.array(times)
        block, bypass = _block(shared, name, arm), bool(arm.get("bypass", False))
        found.append(MeasuredArm(name=name, block=block, step_s=own[:, 0], rollout_s=own[:, 1], bypass=bypass))
    return found


def _records(path: Path, state: Any) -> list[Any]:
    found = state.get("records") if isinstance(state, Mapping) else None
    table = state.get("steps") if isinstance(state, Mapping) else None
    if found is None and isinstance(table, Mapping) and table:
        try:
            found = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        except (TypeError, ValueError) as error:
            raise SimulationError(f"{path}: steps must be columns of one length, but {error}.") from None
    if not isinstance(found, list) or not found:
        raise SimulationError(f"{path}: has no records; give the JSON that the benchmark of strategies wrote.")
    return found


def _times(where: str, record: Any) -> tuple[str, tuple[float, float]]:
    try:
        times = float(record["step_s"]), float(record.get("rollout_s", math.nan))
        if not (math.isfinite(times[0]) and times[0] > 0):
            raise ValueError(f"step_s={times[0]}")
        return str(record["arm"]), times
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SimulationError(
            f"{where}: must have arm and a positive step_s, but {error!r}; remove the record."
        ) from None


def _block(shared: Mapping[str, Any], name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """The block `darts:` of an arm."""
    block = merged(shared, told.get("darts") or {})
    changes = dict(told.get("changes") or {})
    if told.get("overlap") is not None:
        changes["overlap.mode"] = told["overlap"]
    for key, value in changes.items():
        block = merged(block, nested(key, value))
    return block | {"enable": True, "strategy": told.get("strategy", name)}
