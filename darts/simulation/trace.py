"""Recorded response lengths: `LengthTrace`, and its form as a CSV file.

Contract. A CSV file, gzipped if its name ends in `.gz`, has a header with the columns `step, prompt, candidate,
response_length`, and maybe `reward` and `truncated` (0 or 1); other columns are not read. Each row is one response that
ended by itself or at the limit. What cannot be is one `SimulationError` with file, line, value, rule and fix.
"""

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

from darts.evidence.trace import LONGEST_RESPONSE
from darts.simulation import SimulationError

REQUIRED = ("step", "prompt", "candidate", "response_length")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptLengths:
    """The responses to one prompt at one step; arrays have one entry per candidate, at least one.

    Example: step=101, key="17", lengths=[787, 658, 691], truncated=[False, False, False], reward=[-1.0, 1.0, nan].
    """

    step: int
    key: str  # names the prompt, at all steps
    lengths: NDArray[np.int64]  # tokens, end token included
    truncated: NDArray[np.bool_]  # ended at the length limit
    reward: NDArray[np.float64]  # NaN where unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthTrace:
    """Prompts in the order in which they came from the data, and what a user has to know about them."""

    name: str
    prompts: Sequence[PromptLengths]  # steps increase
    notes: Sequence[str] = field(default_factory=tuple)
    batch: int | None = None  # prompts that a step trained on, where known

    @property
    def steps(self) -> list[int]:
        """The steps, increasing."""
        return sorted({prompt.step for prompt in self.prompts})

    @property
    def response_length(self) -> int:
        """The limit: the longest truncated length, or one more than the longest if none is truncated (our choice)."""
        cut_lengths = [int(prompt.lengths[prompt.truncated].max()) for prompt in self.prompts if prompt.truncated.any()]
        return max(cut_lengths) if cut_lengths else max(int(prompt.lengths.max()) for prompt in self.prompts) + 1

    @property
    def prompts_per_step(self) -> int:
        """That a step trained on; where that is not known, the median of the prompts of a step."""
        if self.batch is not None:
            return self.batch
        prompt_counts = np.unique([prompt.step for prompt in self.prompts], return_counts=True)[1]
        return int(np.median(prompt_counts))

    def between(self, first: int | None, last: int | None) -> "LengthTrace":
        """The steps from `first` to `last`, both included; None is no bound.

        Raises:
            SimulationError: there is no such step.
        """
        first_step, last_step = (-math.inf if first is None else first), (math.inf if last is None else last)
        chosen_prompts = [prompt for prompt in self.prompts if first_step <= prompt.step <= last_step]
        if not chosen_prompts:
            steps = self.steps
            raise SimulationError(
                f"{self.name}: has steps {steps[0]} to {steps[-1]}, none of {first} to {last}; name some that it has."
            )
        return replace(self, prompts=chosen_prompts)


def read_csv(path: Path) -> LengthTrace:
    """The trace in a CSV file.

    Raises:
        SimulationError: see the module's contract.
    """
    try:
        with _open_text(path) as file:
            reader = csv.DictReader(file)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(map(str, reader.fieldnames or ())) or "none"
                _refuse(path, 1, f"column {missing[0]} is missing; found: {found}", f"has {', '.join(REQUIRED)}")
            return LengthTrace(name=path.name, prompts=_grouped(path, _rows(path, reader)))
    except (OSError, EOFError, zlib.error) as error:
        raise SimulationError(f"{path}: cannot be read ({error}); give a CSV file, or a gzipped one as .gz.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SimulationError(f"{path}: must be CSV as UTF-8 text, but {error}; is it gzipped without .gz?") from None


Row = tuple[int, str, int, int, bool, float]
"""Step, prompt, candidate, length, whether truncated, reward."""


def _rows(path: Path, reader: "csv.DictReader[str]") -> Iterable[tuple[int, Row]]:
    """The rows with the numbers of their lines."""

    def number(name: str, row: Mapping[str, str], parse_text: Callable[[str], float], rule: str) -> float:
        try:
            return parse_text(row[name])
        except (TypeError, ValueError):
            _refuse(path, reader.line_num, f"{name}={row[name]!r}", rule)

    for row in reader:
        length = int(number("response_length", row, int, "is a whole number of tokens"))
        if not 1 <= length <= LONGEST_RESPONSE:
            _refuse(path, reader.line_num, f"response_length={length}", f"lies in [1, {LONGEST_RESPONSE}]")
        step = int(number("step", row, int, "is a whole number"))
        candidate = int(number("candidate", row, int, "is a whole number"))
        reward = number("reward", row, float, "is a number, or empty") if row.get("reward") else math.nan
        truncated = number("truncated", row, int, "is 0 or 1") if row.get("truncated") else 0
        if truncated not in (0, 1):
            _refuse(path, reader.line_num, f"truncated={truncated}", "is 0 or 1")
        if not row["prompt"]:
            _refuse(path, reader.line_num, f"prompt={row['prompt']!r}", "names the prompt")
        yield reader.line_num, (step, row["prompt"], candidate, length, bool(truncated), reward)


def _grouped(path: Path, rows: Iterable[tuple[int, Row]]) -> list[PromptLengths]:
    """The rows by step and prompt, in the order in which these first occur within a step."""
    groups: dict[tuple[int, str], dict[int, tuple[int, bool, float]]] = {}
    for line, (step, prompt, candidate, *response) in rows:
        group = groups.setdefault((step, prompt), {})
        if candidate in group:
            _refuse(path, line, f"step={step}, prompt={prompt}, candidate={candidate} is there twice", "occurs once")
        group[candidate] = tuple(response)
    if not groups:
        raise SimulationError(f"{path}, line 2: holds no rows below its header; a trace has at least one response.")
    prompts = []
    for (step, prompt), group in sorted(groups.items(), key=lambda item: item[0][0]):
        lengths, truncated, reward = zip(*(group[candidate] for candidate in sorted(group)), strict=True)
        prompts.append(
            PromptLengths(
                step=step,
                key=prompt,
                lengths=np.array(lengths, dtype=np.int64),
                truncated=np.array(truncated, dtype=bool),
                reward=np.array(reward, dtype=np.float64),
            )
        )
    return prompts


def _open_text(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _refuse(path: Path, line: int, what: str, rule: str) -> NoReturn:
    raise SimulationError(f"{path}, line {line}: {what}; a trace {rule}. Correct or remove the line.")
