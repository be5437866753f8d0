"""The lengths and times of a run, from the JSONL that `darts.evidence.trace` wrote.

Contract.
1. A step that is written again (a resume) replaces the one before, and all that came after that one; a last line that
   was cut off is left out with a note. So reads `darts.report`.
2. A prompt counts once for each time that it comes from the data, at its place there. Strategies with a queue launch
   long ones again until they are trained on: as prompts of their own these would make the data longer than they are.
   Candidates of later launches stand behind those of the first, so that a replay has others when it launches again.
3. Lengths of aborted candidates are parts: censored. Each is completed by a draw (our choice): from the whole lengths
   of the same prompt, at any step, that are longer; without any, its prompt's estimated mean length times a ratio of
   length to mean that is drawn from the groups nobody stopped, among those that make it longer; without any, what it
   had. Lost candidates are dropped. The notes say how many of each.
4. What cannot be is one `SimulationError` with file, line, rule and fix.
"""

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.history import censored_moments
from darts.simulation import SimulationError
from darts.simulation.trace import LONGEST, LengthTrace, PromptLengths, read_csv

VERSION = 1
FATES = "kfdtax"
"""Kept, kept although truncated, dropped, truncated and dropped, aborted, lost: `darts.evidence.trace` writes them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunStep:
    """One line: its metrics, and what its rollout launched; lists have one entry per prompt, maybe none."""

    number: int
    line: int
    metrics: Mapping[str, float]
    keys: Sequence[str]
    lengths: Sequence[NDArray[np.int64]]
    fates: Sequence[str]
    rewards: Sequence[NDArray[np.float64]]


def read_trace(path: str | Path, seed: int = 0) -> LengthTrace:
    """A CSV file of lengths, or the JSONL of a run, by its name (`.jsonl`).

    Args:
        path: of the file.
        seed: of the draws that complete aborted candidates.

    Raises:
        SimulationError: it is neither, or does not hold what it should.
    """
    path = Path(path)
    if path.is_dir():
        raise SimulationError(f"{path}: is a folder; give the CSV file, or the darts.jsonl of a run.")
    if path.suffix == ".jsonl":
        steps, notes = read_run(path)
        return lengths_of_run(path, steps, notes, seed)
    return read_csv(path)


def read_run(path: Path) -> tuple[list[RunStep], list[str]]:
    """The steps of a run that count, in order, and what was odd about the file.

    Raises:
        SimulationError: see the module's contract.
    """
    steps: list[RunStep] = []
    notes, replaced = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    step = _step(json.loads(line), number)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    if not line.endswith(b"\n"):
                        notes.append(f"line {number}, the last, was cut off and is left out")
                        break
                    why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                    raise SimulationError(
                        f"{path}, line {number}: {why}; it must be a step as darts.trace writes it. Remove the line."
                    ) from None
                while steps and steps[-1].number >= step.number:
                    steps.pop()
                    replaced += 1
                steps.append(step)
    except OSError as error:
        raise SimulationError(f"{path}: cannot be read ({error.strerror}); give the darts.jsonl of a run.") from None
    if not steps:
        raise SimulationError(f"{path}, line 1: holds no whole step; did the run end before its first?")
    if replaced:
        notes.append(f"{replaced} steps were repeated or undone by a resume; what replaced them counts")
    return steps, notes


def lengths_of_run(path: Path, steps: Sequence[RunStep], notes: Sequence[str] = (), seed: int = 0) -> LengthTrace:
    """The lengths of a run as a trace; see the module's contract.

    Raises:
        SimulationError: no step has a rollout with a usable candidate.
    """
    rng = np.random.default_rng(seed)
    whole: dict[str, list[int]] = {}
    ratios: list[float] = []
    for step in steps:
        for key, lengths, fates in zip(step.keys, step.lengths, step.fates, strict=True):
            ended = ~_has(fates, "ax")
            whole.setdefault(key, []).extend(lengths[ended].tolist())
            if ended.all():
                ratios += (lengths / lengths.mean()).tolist()
    longer, drawn = np.sort(ratios), 0
    counts = dict.fromkeys(FATES, 0)
    prompts = []
    for launches in _launches(steps):
        first, place = launches[0]
        key, fates = first.keys[place], "".join(step.fates[place] for step, place in launches)
        lengths = np.concatenate([step.lengths[place] for step, place in launches])
        reward = np.concatenate([step.rewards[place] for step, place in launches])
        for letter in fates:
            counts[letter] += 1
        censored, usable = _has(fates, "a"), ~_has(fates, "x")
        completed = lengths.copy()
        if censored.any():
            mean = censored_moments(lengths[usable], censored[usable])[0]
            own = np.sort(whole[key])
            for index in np.flatnonzero(censored):
                completed[index], known = _completed(int(lengths[index]), own, longer, mean, rng)
                drawn += known
        usable &= completed > 0  # one that never began, and of whose prompt nothing is known
        if usable.any():
            cut = _has(fates, "ft")
            prompts.append(
                PromptLengths(
                    step=first.number,
                    key=key,
                    lengths=completed[usable],
                    truncated=cut[usable],
                    reward=reward[usable],
                )
            )
    if not prompts:
        raise SimulationError(
            f"{path}, line {steps[0].line}: no step has a rollout with a whole response; give a run that generated "
            "through DARTS's trainer (darts.strategy=none for plain verl), or a CSV file."
        )
    trained = [sum(map(_trained, step.fates)) for step in steps if step.keys]
    return LengthTrace(
        name=path.name,
        prompts=prompts,
        notes=(*notes, *_told(counts, drawn)),
        batch=int(np.median(trained)) or None,
    )


def _launches(steps: Sequence[RunStep]) -> list[list[tuple[RunStep, int]]]:
    """Of each prompt, as often as it came from the data, its launches until it was trained on: step and place there."""
    prompts: list[list[tuple[RunStep, int]]] = []
    waiting: defaultdict[str, deque[list[tuple[RunStep, int]]]] = defaultdict(deque)  # the data may have a key twice
    for step in steps:
        untrained = []
        for place, (key, fates) in enumerate(zip(step.keys, step.fates, strict=True)):
            if waiting[key]:
                launches = waiting[key].popleft()
            else:
                launches = []
                prompts.append(launches)
            launches.append((step, place))
            if not _trained(fates):
                untrained.append((key, launches))
        for key, launches in untrained:
            waiting[key].append(launches)
    return prompts


def _trained(fates: str) -> bool:
    return bool(_has(fates, "kf").any())


def _completed(
    part: int, own: NDArray[np.int64], ratios: NDArray[np.float64], mean: float, rng: np.random.Generator
) -> tuple[int, bool]:
    """A whole length for one that was aborted after `part` tokens; and whether something was known of it."""
    first = int(np.searchsorted(own, part, side="right"))
    if first < len(own):
        return int(own[rng.integers(first, len(own))]), True
    first = int(np.searchsorted(ratios * mean, part, side="right"))
    if first < len(ratios):
        return max(round(ratios[rng.integers(first, len(ratios))] * mean), part, 1), True
    return part, False


def _told(counts: Mapping[str, int], drawn: int) -> list[str]:
    total, aborted, lost = sum(counts.values()), counts["a"], counts["x"]
    notes = []
    if aborted:
        notes.append(
            f"CENSORED: {aborted} of {total} candidates ({aborted / total:.1%}) were aborted, so nobody knows how long "
            f"they would have been; {drawn} were completed by draws from longer ones, {aborted - drawn} count with "
            "what they had. A run of darts.strategy=none or shortest_k has none"
        )
    if lost:
        notes.append(f"{lost} of {total} candidates were lost by servers and are dropped")
    return notes


def _step(record: Any, line: int) -> RunStep:
    if not isinstance(record, Mapping):
        raise ValueError("is no object")
    if record["version"] != VERSION:
        raise ValueError(f"version={record['version']!r}, must be {VERSION}")
    block = record.get("rollout") or {"key": [], "length": [], "fate": []}
    keys, fates = [str(key) for key in block["key"]], list(block["fate"])
    lengths = [np.array([_length(value) for value in row], dtype=np.int64) for row in block["length"]]
    rewards = [
        np.array([np.nan if value is None else float(value) for value in row])
        for row in block.get("reward") or [[None] * len(row) for row in lengths]
    ]
    sizes = [len(row) for row in lengths]
    if not (len(keys) == len(fates) == len(lengths) and sizes == list(map(len, fates)) == list(map(len, rewards))):
        raise ValueError("key, length, fate and reward are not of the same prompts and candidates")
    if unknown := set("".join(fates)) - set(FATES):
        raise ValueError(f"fate={''.join(sorted(unknown))!r} is not of {FATES!r}")
    for row, fate in zip(lengths, fates, strict=True):
        if (row[~_has(fate, "ax")] < 1).any():
            raise ValueError(
                f"length={row.tolist()!r:.60} with fate={fate!r:.60}: whole responses have at least 1 token"
            )
    metrics = {name: float(value) for name, value in record["metrics"].items() if isinstance(value, int | float)}
    return RunStep(
        number=int(record["step"]),
        line=line,
        metrics=metrics,
        keys=keys,
        lengths=lengths,
        fates=fates,
        rewards=rewards,
    )


def _length(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LONGEST:
        raise ValueError(f"length={value!r}, must be a whole number of tokens in [0, {LONGEST}]")
    return value


def _has(fates: str, letters: str) -> NDArray[np.bool_]:
    return np.array([letter in letters for letter in fates], dtype=bool)
