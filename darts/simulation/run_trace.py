"""The lengths of a run, from the JSONL that `darts.evidence.trace` wrote and reads.

Contract.
1. A prompt counts once for each time that it comes from the data, at its place there. Strategies with a queue launch
   long ones again until they are trained on: as prompts of their own these would make the data longer than they are.
   Candidates of later launches stand behind those of the first, so that a replay has others when it launches again.
2. Lengths of aborted candidates are parts: censored. Each is completed by a draw (our choice): from the whole lengths
   of the same prompt, at any step, that are longer; without any, its prompt's estimated mean length times a ratio of
   length to mean that is drawn from the groups nobody stopped, among those that make it longer; without any, what it
   had. Lost candidates are dropped. The notes say how many of each.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darts.evidence.trace import TracedStep, read_steps
from darts.history import censored_moments
from darts.simulation import SimulationError
from darts.simulation.trace import LengthTrace, PromptLengths, read_csv


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
    return _read_run(path, seed) if path.suffix == ".jsonl" else read_csv(path)


def _read_run(path: Path, seed: int) -> LengthTrace:
    """The lengths of a run as a trace; see the module's contract."""
    steps, notes = read_steps(path, lambda step: step)
    rng = np.random.default_rng(seed)
    # 1. What is known of whole lengths: those of each prompt, and of all groups their ratios to the mean.
    whole_lengths: dict[str, list[int]] = {}
    ratios: list[float] = []
    for step in steps:
        for key, lengths, fates in zip(step.keys, step.lengths, step.fates, strict=True):
            has_ended = ~_has(fates, "ax")
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
        is_censored, is_usable = _has(fates, "a"), ~_has(fates, "x")
        completed = lengths.copy()
        if is_censored.any():
            mean = censored_moments(lengths[is_usable], is_censored[is_usable])[0]
            same_prompt = np.sort(whole_lengths[key])
            for index in np.flatnonzero(is_censored):
                completed[index], is_known = _completed(int(lengths[index]), same_prompt, sorted_ratios, mean, rng)
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
    prompts_trained = [sum(map(_trained, step.fates)) for step in steps if step.keys]
    return LengthTrace(
        name=path.name,
        prompts=prompts,
        notes=(*notes, *_told(counts, num_drawn)),
        batch=int(np.median(prompts_trained)) or None,
    )


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
                launches = []
                prompts.append(launches)
            launches.append((step, prompt_place))
            if not _trained(fates):
                untrained_launches.append((key, launches))
        for key, launches in untrained_launches:
            waiting[key].append(launches)
    return prompts


def _trained(fates: str) -> bool:
    return "k" in fates or "f" in fates


def _completed(
    part_length: int, same_prompt: NDArray[np.int64], ratios: NDArray[np.float64], mean: float, rng: np.random.Generator
) -> tuple[int, bool]:
    """A whole length for one that was aborted after `part_length` tokens; and whether something was known of it."""
    first_longer = int(np.searchsorted(same_prompt, part_length, side="right"))
    if first_longer < len(same_prompt):
        return int(same_prompt[rng.integers(first_longer, len(same_prompt))]), True
    first_longer = int(np.searchsorted(ratios * mean, part_length, side="right"))
    if first_longer < len(ratios):
        return max(round(ratios[rng.integers(first_longer, len(ratios))] * mean), part_length, 1), True
    return part_length, False


def _told(counts: Mapping[str, int], drawn: int) -> list[str]:
    total, aborted, num_lost = sum(counts.values()), counts["a"], counts["x"]
    notes = []
    if aborted:
        notes.append(
            f"CENSORED: {aborted} of {total} candidates ({aborted / total:.1%}) were aborted, so nobody knows how long "
            f"they would have been; {drawn} were completed by draws from longer ones, {aborted - drawn} count with "
            "what they had. A run of darts.strategy=none or shortest_k has none"
        )
    if num_lost:
        notes.append(f"{num_lost} of {total} candidates were lost by servers and are dropped")
    return notes


def _has(fates: str, letters: str) -> NDArray[np.bool_]:
    return np.array([letter in letters for letter in fates], dtype=bool)
