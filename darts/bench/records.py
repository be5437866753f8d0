"""What a bench measures: one record per arm, seed and step, one per validation; and the JSONL file they are kept in.

Contract: no verl import. A record is written when its step has ended; a round (a step of every arm) counts once all of
it is there. `Records.keep` removes what a bench that was interrupted had written of a round that begins again.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from darts.bench.slots import in_turns, slot_steps
from darts.evidence import documents
from darts.pool import CandidatePool

TIMES = {
    "step_s": "timing_s/step",
    "rollout_s": "timing_s/gen",
    "old_log_prob_s": "timing_s/old_log_prob",
    "update_s": "timing_s/update_actor",
    "weights_s": "timing_s/update_weights",
}
"""Seconds of a step, and verl's metric (0.9.1) that has them."""
MAY_BE_OFF = ("old_log_prob_s",)
"""Phases that do not run in every step, and then took 0."""
SERVED = "training/rollout_probs_diff_mean"
"""verl's metric: mean over tokens of |probability by the server - by the actor|, where old log-probs are computed."""


class RecordError(ValueError):
    """A line that is not a record of a bench."""


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StepRecord:
    """One step of one arm. Lengths and tokens are of responses; an aborted candidate counts with the tokens it had."""

    kind: Literal["step"] = "step"
    arm: str
    seed: int
    step: int  # from 1
    place: int  # in the round's order, from 0
    step_s: float  # as verl times it, without validation and without the swap of the arms
    rollout_s: float
    old_log_prob_s: float
    update_s: float
    weights_s: float
    swap_s: float = 0.0  # to put this arm's state in the place of the other's, and to keep it; not in `step_s`
    launched: int  # candidates
    aborted: int
    tokens_generated: int
    tokens_kept: int  # trained on
    slots: int  # of `darts.bench.slots`
    slot_steps: int
    idle_slot_steps: int
    kept_mean: float
    kept_p99: float
    kept_max: float
    pool_mean: float  # of all candidates
    pool_p99: float
    pool_max: float
    reward_kept: float | None = None  # mean; None where nothing was scored
    reward_pool: float | None = None  # of all candidates that were scored
    queue: int = 0  # prompts that were launched and are to come again
    served_difference: float | None = None  # `SERVED`; other weights than the arm's own would show here

    @property
    def tokens_dropped(self) -> int:
        """Generated and thrown away."""
        return self.tokens_generated - self.tokens_kept

    @property
    def other_s(self) -> float:
        """What of the step is in none of the phases: rewards, advantages, metrics, the trainer itself."""
        return self.step_s - self.rollout_s - self.old_log_prob_s - self.update_s - self.weights_s


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ValidationRecord:
    """One validation of one arm, after `step` steps; `step=0` is the initial actor."""

    kind: Literal["validation"] = "validation"
    arm: str
    seed: int
    step: int
    accuracy: float | None  # mean over prompts and responses; None where it was not measured
    mean_length: float | None = None  # tokens of a response
    prompt_accuracy: tuple[float, ...] = ()  # of each prompt, in an order that all validations share; or unknown


Record = StepRecord | ValidationRecord
JSON: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])
"""A record as one line of JSON, and back; what is not a number is null."""


def step_record(
    metrics: Mapping[str, Any],
    pool: CandidatePool,
    launch_order: Sequence[int] | NDArray[np.int64] | None = None,
    num_engines: int = 1,
    max_running: int | None = None,
    **facts: Any,
) -> StepRecord:
    """The record of a step that has ended.

    Args:
        metrics: verl's, with `TIMES`; `darts/strategy/queue` where the strategy has a queue.
        pool: every launched candidate, sorted by prompt.
        launch_order: prompts of the pool in the order in which they started (`Plan.launch_order`); None: as they stand.
        num_engines: that shared the rollout, candidate by candidate in turns.
        max_running: `max_num_seqs`.
        facts: fields of the record that are known: `arm`, `seed`, `step`, `place`, `swap_s`.
    """
    prompts, kept = np.unique(pool.prompt), pool.kept
    launch_places = range(len(prompts)) if launch_order is None else launch_order
    launched = np.concatenate([pool.length[pool.prompt == prompts[place]] for place in launch_places])
    used_slots = slot_steps(in_turns(launched, num_engines), max_running)
    for kind, lengths in (("kept", pool.length[kept]), ("pool", pool.length)):
        figures = {"mean": lengths.mean(), "p99": np.percentile(lengths, 99), "max": lengths.max()}
        facts |= {f"{kind}_{name}": float(figure) for name, figure in figures.items()}
    return StepRecord(
        **facts,
        **{name: float(metrics.get(key, 0.0) if name in MAY_BE_OFF else metrics[key]) for name, key in TIMES.items()},
        launched=len(pool),
        aborted=int(pool.aborted.sum()),
        tokens_generated=int(pool.length.sum()),
        tokens_kept=int(pool.length[kept].sum()),
        slots=used_slots.slots,
        slot_steps=used_slots.whole,
        idle_slot_steps=used_slots.idle,
        reward_kept=documents.finite(pd.Series(pool.reward[kept]).mean()),
        reward_pool=documents.finite(pd.Series(pool.reward).mean()),
        queue=int(metrics.get("darts/strategy/queue", 0)),
        served_difference=metrics.get(SERVED),
    )


class Records:
    """The JSONL file of a bench, in its order."""

    def __init__(self, records_path: Path) -> None:
        self._path = records_path

    def append(self, bench_record: Record) -> None:
        """Writes a record behind the others."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as records_file:
            records_file.write(_line(bench_record))

    def read(self) -> list[Record]:
        """All records; none where there is no file. A last line that was cut off does not count.

        Raises:
            RecordError: a line that is no record; with file and number.
        """
        file_lines = self._path.read_text().split("\n")[:-1] if self._path.exists() else []
        read_records: list[Record] = []
        try:
            read_records.extend(map(JSON.validate_json, file_lines))
        except ValidationError as caught_error:
            first_error = caught_error.errors(include_url=False)[0]
            error_place = "".join(f"{place_part}: " for place_part in first_error["loc"])
            line_place = f"{self._path}:{len(read_records) + 1}"
            raise RecordError(f"{line_place}: {error_place}{first_error['msg']}") from caught_error
        return read_records

    def keep(self, is_complete: Callable[[int, int], bool]) -> list[Record]:
        """Removes the records of rounds that are not complete, and what was cut off; returns the others.

        Args:
            is_complete: of a seed and a step. A validation before the first step belongs to the first.
        """
        kept_records = [record for record in self.read() if is_complete(record.seed, max(record.step, 1))]
        if self._path.exists():
            documents.write(self._path, "".join(map(_line, kept_records)))
        return kept_records


def _line(bench_record: Record) -> str:
    return JSON.dump_json(bench_record).decode() + "\n"


def frame_of(kind: type[Record], records: Iterable[Record]) -> pd.DataFrame:
    """The records of one kind, with their properties, by seed and step; the last where there are several of an arm."""
    names = [name for name, value in vars(kind).items() if isinstance(value, property)] + _fields(kind)
    rows = [[getattr(record, name) for name in names] for record in records if isinstance(record, kind)]
    frame = pd.DataFrame(rows, columns=names).drop_duplicates(["arm", "seed", "step"], keep="last")
    return frame.set_index(["seed", "step"]).sort_index(kind="stable")


def table_of(kind: type[Record], frames: Iterable[pd.DataFrame]) -> dict[str, list[Any]]:
    """Records of one kind by column, for a document; numbers to six digits, null where there is none."""
    columns = pd.concat([frame_of(kind, []), *frames]).reset_index()
    return {name: [_short(value) for value in columns[name].tolist()] for name in _fields(kind)}


def records_of(kind: type[Record], columns: Mapping[str, Sequence[Any]]) -> list[Record]:
    """The records of one kind that `table_of` gave.

    Raises:
        ValueError: other columns.
    """
    return [kind(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _fields(kind: type[Record]) -> list[str]:
    return [field.name for field in fields(kind) if field.name != "kind"]


def _short(field_value: Any) -> Any:
    if isinstance(field_value, tuple):
        return [_short(item_value) for item_value in field_value]
    if isinstance(field_value, float):
        return float(f"{field_value:.6g}") if math.isfinite(field_value) else None
    return field_value
