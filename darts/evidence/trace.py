"""The trace of a run: one JSON line per step with its metrics and every candidate's length, for `darts.report`.

Contract: a line is written at the end of its step and appended. A run that resumes appends too: of several lines of one
step the last counts, and a line that a killed run left half written is removed. A trace that cannot be written ends
with one warning, not with the run.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts.messages import ActorCall
from darts.planning import Rollout
from darts.pool import CandidatePool

VERSION = 1
MOST = 256  # points of a timeline
LONGEST_LINE = 1 << 26
"""Bytes; a step with 2,048 candidates takes some 30,000."""


class Trace:
    """Appends steps to a file, which is made with its folder by the first.

    Args:
        path: of the file; None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._whole = False  # the file is known to end with a whole line

    def write(
        self, step: int, metrics: dict[str, Any], rollout: Rollout | None, calls: Sequence[ActorCall] = ()
    ) -> None:
        """Appends one step; `rollout` is None where DARTS generated nothing. `calls`: of the overlapped actor."""
        if self._path is None:
            return
        line: dict[str, Any] = {"version": VERSION, "step": step, "at": round(time.time(), 3)}
        line["metrics"] = {name: number for name, value in metrics.items() if (number := _number(value)) is not None}
        if rollout is not None:
            line["rollout"] = rollout_columns(rollout)
            line["timeline"] = timeline_columns(rollout, calls)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._whole and self._path.exists():
                drop_cut_line(self._path)
            self._whole = True
            with self._path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")
        except OSError as cause:
            warnings.warn(f"darts.trace={self._path}: cannot be written ({cause}); no more lines.", stacklevel=2)
            self._path = None


def drop_cut_line(path: Path) -> None:
    """Removes what stands after a file's last line break."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LONGEST_LINE, 0))
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def rollout_columns(rollout: Rollout) -> dict[str, Any]:
    """What became of a rollout's prompts and candidates.

    Example: `{"key": ["9f86d081884c7d65"], "std": [31.2], "observed_std": [28.9], "budget": [3], "length": [[12, 80,
    9]], "fate": ["kak"], "reward": [[1.0, null, 0.0]]}`; `std` is null where the prompt was not known, `reward` where
    none was given. Fates: `k` kept, `f` kept although truncated, `d` finished and dropped, `t` truncated and dropped,
    `a` aborted, `x` lost.
    """
    plan, pool = rollout.plan, rollout.pool
    ends = np.cumsum(plan.budgets)[:-1]
    fates = "".join(fate(pool).tolist())
    columns = {
        "key": plan.keys,
        "std": [round(std, 3) if known else None for std, known in zip(plan.std.tolist(), plan.known, strict=True)],
        "observed_std": [round(std, 3) for std in rollout.observed_std.tolist()],
        "budget": plan.budgets.tolist(),
        "length": [lengths.tolist() for lengths in np.split(pool.length, ends)],
        "fate": [fates[start:end] for start, end in zip([0, *ends], [*ends, len(fates)], strict=True)],
    }
    if not np.isnan(pool.reward).all():
        columns["reward"] = [[_number(reward) for reward in rewards] for rewards in np.split(pool.reward, ends)]
    return columns


def timeline_columns(rollout: Rollout, calls: Sequence[ActorCall]) -> dict[str, Any]:
    """When candidates ended and the actor computed, in seconds since the rollout began.

    Example: `{"seconds": 12.5, "running": [[0.0, 84], [3.1, 42], [12.4, 0]], "calls": [[0.8, 1.1, 4096]]}`: candidates
    that run from then on, and begin, end and tokens of the actor's calls. Of many, `MOST` of each are told: candidates
    at evenly spaced ranks, and calls joined with their neighbours.
    """
    ended = np.sort(rollout.pool.ended_at - rollout.began)
    ended = ended[np.isfinite(ended)]
    ranks = np.unique(np.linspace(0, len(ended) - 1, min(len(ended), MOST)).astype(int))
    running = [[0.0, len(ended)], *([round(float(ended[rank]), 3), len(ended) - 1 - int(rank)] for rank in ranks)]
    joined = [
        calls[start : start + -(-len(calls) // MOST)] for start in range(0, len(calls), -(-len(calls) // MOST) or 1)
    ]
    return {
        "seconds": round(rollout.ended - rollout.began, 3),
        "running": running,
        "calls": [
            [
                round(some[0].began - rollout.began, 3),
                round(some[0].began - rollout.began + sum(call.ended - call.began for call in some), 3),
                sum(call.tokens for call in some),
            ]
            for some in joined
        ],
    }


def fate(pool: CandidatePool) -> np.ndarray:
    """One letter per candidate; see `rollout_columns`."""
    return np.where(pool.kept, np.where(pool.truncated, "f", "k"), pool.state)


def _number(value: Any) -> float | None:
    """A finite number, to six digits; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{number:.6g}") if math.isfinite(number) else None


FILE = "darts.jsonl"

INSIDE_STEP = (
    "gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "save_checkpoint",
    "update_weights",
)  # fmt: skip
"""What is measured inside `timing_s/step` in verl 0.9.1; DARTS's trainer saves there, as `RayPPOTrainer` does."""


class ReportError(ValueError):
    """The input cannot be reported on; one line that says what to do."""


def find_file(run: Path) -> Path:
    """The `darts.jsonl` of a run; what the quickstart keeps of the run before, in `previous/`, is not looked at.

    Raises:
        ReportError: there is no such path, no such file below it, or more than one.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ReportError(f"RUN={run}: must be the folder of a run or its {FILE}, but nothing is there; check the path")
    found = sorted(file for file in run.rglob(FILE) if "previous" not in file.relative_to(run).parts)
    if not found:
        raise ReportError(f"RUN={run}: must hold one {FILE}, but none is in or below it; name the folder of a run")
    if len(found) > 1:
        raise ReportError(f"RUN={run}: must hold one {FILE}, but holds {', '.join(map(str, found))}; name one of them")
    return found[0]
