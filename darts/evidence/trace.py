"""The trace of a run: one JSON line per step with its metrics and every candidate's length; its writer and its reader.

Contract: a line is written at the end of its step and appended. A run that resumes appends too: a step that is written
again replaces the one before and all that came after that one, and a line that a killed run left half written does not
count. A trace that cannot be written ends with one warning, not with the run. What cannot be read is one `TraceError`.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from darts.messages import ActorCall
from darts.planning import Rollout
from darts.pool import CandidatePool

VERSION = 1
FILE = "darts.jsonl"
FATES = "kfcdtax"
"""Kept, kept although truncated, kept as it was cut, finished and dropped, truncated and dropped, aborted, lost."""
LONGEST_RESPONSE = 1 << 30  # tokens; a longer response is a mistake
MOST = 256  # points of a timeline
LONGEST_LINE = 1 << 26  # bytes; a step with 2,048 candidates takes some 30,000


class Trace:
    """Appends steps to a file, which is made with its folder by the first; without a path nothing is written."""

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
        file_size = file.seek(0, os.SEEK_END)
        file.seek(max(file_size - LONGEST_LINE, 0))
        file_tail = file.read()
        file.truncate(file_size - len(file_tail) + file_tail.rfind(b"\n") + 1)


def rollout_columns(rollout: Rollout) -> dict[str, Any]:
    """What became of a rollout's prompts and candidates.

    Example: `{"key": ["9f86d081884c7d65"], "std": [31.2], "observed_std": [28.9], "budget": [3], "length": [[12, 80,
    9]], "fate": ["kak"], "reward": [[1.0, null, 0.0]]}`; `std` is null where the prompt was not known, `reward` where
    none was given. Fates are `FATES`.
    """
    plan, pool = rollout.plan, rollout.pool
    group_ends = np.cumsum(plan.budgets)[:-1]
    columns = {
        "key": plan.keys,
        "std": [round(std, 3) if known else None for std, known in zip(plan.std.tolist(), plan.known, strict=True)],
        "observed_std": [round(std, 3) for std in rollout.observed_std.tolist()],
        "budget": plan.budgets.tolist(),
        "length": [lengths.tolist() for lengths in np.split(pool.length, group_ends)],
        "fate": ["".join(fates) for fates in np.split(fate(pool), group_ends)],
    }
    if not np.isnan(pool.reward).all():
        columns["reward"] = [[_number(reward) for reward in rewards] for rewards in np.split(pool.reward, group_ends)]
    return columns


def timeline_columns(rollout: Rollout, calls: Sequence[ActorCall]) -> dict[str, Any]:
    """When candidates ended and the actor computed, in seconds since the rollout began.

    Example: `{"seconds": 12.5, "running": [[0.0, 84], [3.1, 42], [12.4, 0]], "calls": [[0.8, 1.1, 4096]]}`: candidates
    that run from then on, and begin, end and tokens of the actor's calls. Of many, `MOST` of each are told: candidates
    at evenly spaced ranks, and calls joined with their neighbours.
    """
    ended = np.sort(rollout.pool.ended_at - rollout.began)
    ended = ended[np.isfinite(ended)]
    shown_ranks = np.unique(np.linspace(0, len(ended) - 1, min(len(ended), MOST)).astype(int))
    running = [[0.0, len(ended)], *([round(float(ended[rank]), 3), len(ended) - 1 - int(rank)] for rank in shown_ranks)]
    num_joined, call_rows = math.ceil(len(calls) / MOST), []
    for start in range(0, len(calls), num_joined or 1):
        joined = calls[start : start + num_joined]
        begin_s, call_s = joined[0].began - rollout.began, sum(call.ended - call.began for call in joined)
        call_rows.append([round(begin_s, 3), round(begin_s + call_s, 3), sum(call.tokens for call in joined)])
    return {"seconds": round(rollout.ended - rollout.began, 3), "running": running, "calls": call_rows}


def fate(pool: CandidatePool) -> np.ndarray:
    """One letter per candidate; see `rollout_columns`."""
    return np.where(pool.kept & ~pool.cut, np.where(pool.truncated, "f", "k"), pool.state)


def _number(value: Any) -> float | None:
    """A finite number, to six digits; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{number:.6g}") if math.isfinite(number) else None


# --- reading ---------------------------------------------------------------------------------------------------------

INSIDE_STEP = (
    "gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "save_checkpoint",
    "update_weights",
)  # fmt: skip
"""What is measured inside `timing_s/step` in verl 0.9.1; DARTS's trainer saves there, as `RayPPOTrainer` does."""


class TraceError(ValueError):
    """A trace that cannot be read; one line that says where, what the rule is, and what to do."""


def find_file(run: Path) -> Path:
    """The only `darts.jsonl` of a run, else `TraceError`; what the quickstart keeps of the run before, in `previous/`,
    is not looked at."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise TraceError(f"RUN={run}: must be the folder of a run or its {FILE}, but nothing is there; check the path")
    found = sorted(file for file in run.rglob(FILE) if "previous" not in file.relative_to(run).parts)
    if not found:
        raise TraceError(f"RUN={run}: must hold one {FILE}, but none is in or below it; name the folder of a run")
    if len(found) > 1:
        raise TraceError(f"RUN={run}: must hold one {FILE}, but holds {', '.join(map(str, found))}; name one of them")
    return found[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TracedStep:
    """One line of a trace. What its rollout launched stands by prompt; there is none where DARTS generated nothing.

    Example: number=3, line=3, offset=812, metrics={"timing_s/step": 3.7}, keys=["9f86d081884c7d65"], std=[31.2], ...
    """

    number: int
    line: int
    offset: int  # byte at which the line begins
    metrics: Mapping[str, float]
    keys: Sequence[str]
    std: NDArray[np.float64]  # predicted; NaN where the prompt was not known
    observed_std: NDArray[np.float64]
    lengths: Sequence[NDArray[np.int64]]
    fates: Sequence[str]  # a letter of `FATES` for each candidate
    rewards: Sequence[NDArray[np.float64]]  # NaN where none was given
    has_timeline: bool


Held = TypeVar("Held")


def read_steps(path: Path, hold: Callable[[TracedStep], Held]) -> tuple[list[Held], list[str]]:
    """The steps of a run that count, in order, and what is odd about the file, which may be larger than memory.

    Returns:
        What `hold` holds of each step, and one sentence, without its full stop, for each oddity.

    Raises:
        TraceError: a file that cannot be read or has no whole step, or a line that is no step (but a cut last one).
    """
    steps: list[tuple[int, Held]] = []
    notes, num_replaced = [], 0
    try:
        with path.open("rb") as file:
            for count, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    if line.endswith(b"\n"):
                        raise TraceError(f"{path}, line {count}: must be JSON, but {error}; remove the line") from None
                    notes.append(f"Line {count}, the last, was cut off (a killed run?) and is left out")
                    break
                try:
                    step = _traced(record, count, file.tell() - len(line))
                except TraceError as error:
                    raise TraceError(f"{path}, line {count}: {error}") from None
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    why = str(error) if type(error) is ValueError else repr(error)
                    raise TraceError(f"{path}, line {count}: must be a step, but {why}; remove the line") from None
                while steps and steps[-1][0] >= step.number:
                    steps.pop()
                    num_replaced += 1
                steps.append((step.number, hold(step)))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); give the {FILE} of a run") from None
    if not steps:
        raise TraceError(f"{path}: must hold a whole step, but holds none; did the run end before its first?")
    if num_replaced:
        notes.append(f"Repeated or undone by a resume: {num_replaced} steps; only what replaced them counts")
    return [held for _, held in steps], notes


def _traced(record: Any, line: int, offset: int) -> TracedStep:
    if record["version"] != VERSION:
        raise TraceError(f"version={record['version']!r}: must be {VERSION}; use the verl-darts that wrote the file")
    block = record.get("rollout") or {"key": [], "length": [], "fate": []}
    keys, lengths, fates = [str(key) for key in block["key"]], block["length"], list(block["fate"])
    rewards = block.get("reward") or [[None] * len(row) for row in lengths]
    column_shapes = [list(map(len, rows)) for rows in (lengths, fates, rewards)]
    if len(keys) != len(lengths) or column_shapes != column_shapes[:1] * 3:
        raise ValueError("key, length, fate and reward are not of the same prompts and candidates")
    if unknown_letters := set("".join(fates)) - set(FATES):
        raise ValueError(f"fate={''.join(sorted(unknown_letters))!r} is not of {FATES!r}")
    for length, fate_letter in zip(chain(*lengths), chain(*fates), strict=True):
        least_length = 0 if fate_letter in "ax" else 1
        if type(length) is not int or not least_length <= length <= LONGEST_RESPONSE:
            rule = f"must be a whole number of tokens in [{least_length}, {LONGEST_RESPONSE}]"
            raise ValueError(f"length={length!r} with fate={fate_letter!r}, {rule}")
    columns = {name: block.get(name) or [None] * len(keys) for name in ("std", "observed_std")}
    return TracedStep(
        number=int(record["step"]),
        line=line,
        offset=offset,
        metrics={name: float(value) for name, value in record["metrics"].items() if isinstance(value, int | float)},
        keys=keys,
        **{name: np.array(column, dtype=np.float64) for name, column in columns.items()},
        lengths=[np.array(row, dtype=np.int64) for row in lengths],
        fates=fates,
        rewards=[np.array(row, dtype=np.float64) for row in rewards],
        has_timeline=bool(record.get("timeline")),
    )
