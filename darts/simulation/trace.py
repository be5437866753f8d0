"""Recorded response lengths: `LengthTrace`, from a CSV file or from the JSONL of a run (`darts.evidence.trace`).

Contract. A CSV file, gzipped if its name ends in `.gz`, has a header with the columns `step, prompt, candidate,
response_length`, and maybe `reward` and `truncated` (0 or 1); other columns are not read. Each row is one response that
ended by itself or at the limit. What cannot be is one error with file, line, value, rule and fix. Of a run:

1. A prompt counts once for each time that it comes from the data, at its place there. Strategies with a queue launch
   long ones again until they are trained on: as prompts of their own these would make the data longer than they are.
   Candidates of later launches stand behind those of the first, so that a replay has others when it launches again.
2. Lengths of aborted candidates are parts: censored. Each is completed by a draw (our choice): from the whole lengths
   of the same prompt, at any step, that are longer; without any, its prompt's estimated mean length times a ratio of
   length to mean that is drawn from the groups nobody stopped, among those that make it longer; without any, what it
   had. Lost candidates are dropped. The notes say how many of each.
"""

import csv
import gzip
import math
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from darts.evidence.trace import LONGEST_RESPONSE, TracedStep, read_steps
from darts.history import censored_moments
from darts.simulation import SimulationError


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
    notes: Sequence[str] = ()
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
        return self.batch or int(np.median([*Counter(prompt.step for prompt in self.prompts).values()]))

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

    def limited(self, response_length: int) -> "LengthTrace":
        """The same under a lower limit: longer responses are cut to it and marked; their rewards are not known then."""
        limited_prompts, num_cut, num_candidates = [], 0, 0
        for prompt in self.prompts:
            is_cut = prompt.lengths > response_length
            limited_prompts.append(
                replace(
                    prompt,
                    lengths=np.minimum(prompt.lengths, response_length),
                    truncated=prompt.truncated | is_cut,
                    reward=np.where(is_cut, np.nan, prompt.reward),
                )
            )
            num_cut += int(is_cut.sum())
            num_candidates += len(is_cut)
        share_text = f"{num_cut} of {num_candidates} responses ({num_cut / num_candidates:.1%})"
        notes = [f"{share_text} are longer than {response_length:,} tokens and were cut to it"] if num_cut else []
        return replace(self, prompts=limited_prompts, notes=[*self.notes, *notes])


def read_trace(path: str | Path, seed: int = 0) -> LengthTrace:
    """A CSV file of lengths, or the JSONL of a run, by its name (`.jsonl`).

    Args:
        path: of the file.
        seed: of the draws that complete aborted candidates.

    Raises:
        SimulationError, TraceError: it is neither, or does not hold what it should.
    """
    path = Path(path)
    if path.is_dir():
        raise SimulationError(f"{path}: is a folder; give the CSV file, or the darts.jsonl of a run.")
    if path.suffix == ".jsonl":
        return _read_run(path, seed)
    try:
        return LengthTrace(name=path.name, prompts=_read_csv(path))
    except (OSError, EOFError, zlib.error) as error:
        raise SimulationError(f"{path}: cannot be read ({error}); give a CSV file, or a gzipped one as .gz.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SimulationError(f"{path}: must be CSV as UTF-8 text, but {error}; is it gzipped without .gz?") from None


# --- CSV -------------------------------------------------------------------------------------------------------------


class ResponseRow(BaseModel):
    """A line of a CSV file; the descriptions are the rules."""

    step: int = Field(description="is a whole number")
    prompt: str = Field(description="names the prompt")
    candidate: int = Field(description="is a whole number")
    response_length: int = Field(
        ge=1, le=LONGEST_RESPONSE, description=f"is a whole number of tokens in [1, {LONGEST_RESPONSE}]"
    )
    reward: float = Field(math.nan, description="is a number, or empty")
    truncated: int = Field(0, ge=0, le=1, description="is 0 or 1")


def _read_csv(path: Path) -> list[PromptLengths]:
    """The prompts by step, in the order in which they first occur within it."""
    columns, line_number = ResponseRow.model_fields, 1
    required = [name for name, column in columns.items() if column.is_required()]
    groups: dict[tuple[int, str], dict[int, ResponseRow]] = {}

    def refused(what: str, rule: str) -> SimulationError:
        return SimulationError(f"{path}, line {line_number}: {what}; a trace {rule}. Correct or remove the line.")

    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for name in required:
            if name not in (found := reader.fieldnames or ()):
                what = f"column {name} is missing; found: {', '.join(found) or 'none'}"
                raise refused(what, f"has {', '.join(required)}")
        for line in reader:
            line_number = reader.line_num
            try:
                row = ResponseRow(**{name: line[name] for name in columns if line.get(name)})
            except ValidationError as error:
                name = str(error.errors()[0]["loc"][0])
                raise refused(f"{name}={line[name]!r}", str(columns[name].description)) from None
            group = groups.setdefault((row.step, row.prompt), {})
            if row.candidate in group:
                where = f"step={row.step}, prompt={row.prompt}, candidate={row.candidate}"
                raise refused(f"{where} is there twice", "has it once")
            group[row.candidate] = row
    if not groups:
        raise SimulationError(f"{path}, line 2: holds no rows below its header; a trace has at least one response.")
    prompts = []
    for (step, key), group in sorted(groups.items(), key=lambda item: item[0][0]):
        rows = [group[candidate] for candidate in sorted(group)]
        lengths = np.array([row.response_length for row in rows], dtype=np.int64)
        truncated = np.array([row.truncated for row in rows], dtype=bool)
        reward = np.array([row.reward for row in rows], dtype=np.float64)
        prompts.append(PromptLengths(step=step, key=key, lengths=lengths, truncated=truncated, reward=reward))
    return prompts


# --- runs ------------------------------------------------------------------------------------------------------------


def _read_run(path: Path, seed: int) -> LengthTrace:
    """The lengths of a run as a trace; see the module's contract."""
    steps, notes = read_steps(path, lambda step: step)
    rng = np.random.default_rng(seed)
    # 1. What is known of whole lengths: those of each prompt, and of all groups their ratios to the mean.
    whole_lengths: dict[str, list[int]] = {}
    ratios: list[float] = []
    for step in steps:
        for key, lengths, fates in zip(step.keys, step.lengths, step.fates, strict=True):
            has_ended = ~_has(fates, "acx")
            whole_lengths.setdefault(key, []).extend(lengths[has_ended].tolist())
            if has_ended.all():
                ratios += (lengths / lengths.mean()).tolist()
    sorted_ratios, num_drawn = np.sort(ratios), 0
    # 2. The prompts, with the candidates of all their launches; parts are completed.
    counts: Counter[str] = Counter()
    prompts = []
    for launches in _launches(steps):
        first_step, prompt_place = launches[0]
        key, fates = first_step.keys[prompt_place], "".join(step.fates[prompt_place] for step, prompt_place in launches)
        lengths = np.concatenate([step.lengths[prompt_place] for step, prompt_place in launches])
        reward = np.concatenate([step.rewards[prompt_place] for step, prompt_place in launches])
        counts.update(fates)
        is_censored, is_usable = _has(fates, "ac"), ~_has(fates, "x")
        completed = lengths.copy()
        if is_censored.any():
            mean = censored_moments(lengths[is_usable], is_censored[is_usable])[0]
            longer_lengths = np.sort(whole_lengths[key]), sorted_ratios * mean
            for index in np.flatnonzero(is_censored):
                completed[index], is_known = _completed(int(lengths[index]), longer_lengths, rng)
                num_drawn += is_known
        is_usable &= completed > 0  # one that never began, and of whose prompt nothing is known
        if is_usable.any():
            columns = {"lengths": completed, "truncated": _has(fates, "ft"), "reward": reward}
            columns = {name: values[is_usable] for name, values in columns.items()}
            prompts.append(PromptLengths(step=first_step.number, key=key, **columns))
    if not prompts:
        raise SimulationError(
            f"{path}, line {steps[0].line}: no step has a rollout with a whole response; give a run that generated "
            "through DARTS's trainer (darts.strategy=none for plain verl), or a CSV file."
        )
    # 3. What a user has to know.
    total, aborted = counts.total(), counts["a"] + counts["c"]
    if aborted:
        notes.append(
            f"CENSORED: {aborted} of {total} candidates ({aborted / total:.1%}) were aborted, so nobody knows how long "
            f"they would have been; {num_drawn} were completed by draws from longer ones, {aborted - num_drawn} count "
            "with what they had. A run of darts.strategy=none or shortest_k has none"
        )
    if counts["x"]:
        notes.append(f"{counts['x']} of {total} candidates were lost by servers and are dropped")
    num_trained = int(np.median([sum(map(_trained, step.fates)) for step in steps if step.keys]))
    return LengthTrace(name=path.name, prompts=prompts, notes=notes, batch=num_trained or None)


def _launches(steps: Sequence[TracedStep]) -> list[list[tuple[TracedStep, int]]]:
    """The launches of each prompt until it was trained on, as often as it came from the data: step and place there."""
    prompts: list[list[tuple[TracedStep, int]]] = []
    waiting: defaultdict[str, deque[list[tuple[TracedStep, int]]]] = defaultdict(deque)  # the data may have a key twice
    for step in steps:
        untrained_launches = []
        for prompt_place, (key, fates) in enumerate(zip(step.keys, step.fates, strict=True)):
            if waiting[key]:
                launches = waiting[key].popleft()
            else:
                prompts.append(launches := [])
            launches.append((step, prompt_place))
            if not _trained(fates):
                untrained_launches.append((key, launches))
        for key, launches in untrained_launches:
            waiting[key].append(launches)
    return prompts


def _completed(
    part_length: int, candidates: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> tuple[int, bool]:
    """A whole length for one that was aborted after `part_length` tokens; and whether something was known of it."""
    for lengths in candidates:  # sorted; the first that has a longer one
        first_longer = int(np.searchsorted(lengths, part_length, side="right"))
        if first_longer < len(lengths):
            drawn_length = lengths[rng.integers(first_longer, len(lengths))]
            return max(round(float(drawn_length)), part_length, 1), True
    return part_length, False


def _trained(fates: str) -> bool:
    return any(letter in fates for letter in "kfc")


def _has(fates: str, letters: str) -> NDArray[np.bool_]:
    return np.array([letter in letters for letter in fates], dtype=bool)
