"""The synthetic task of the testbeds: problems, demonstrations, answers.

A problem is a sum such as ``37+8+2``: one number of two digits, then numbers of one digit; its
difficulty is how many numbers there are, and every total has two digits. A response is a list of
lines and a final answer::

    37+8=45          one step: the running total plus the next number
    45+2=47
    wait, 47         a re-check: says the running total again, which normally changes nothing
    #47.             the answer, always last

``guess 47`` may stand in place of the remaining steps, and is then often wrong. A `Mix` says how
often demonstrations step, guess and re-check, and so what a model warm-started on them will do.

Pure Python; everything random comes from the generator that is passed in. One byte is one token.
"""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

_ANSWER = re.compile(r"#(\d{1,3})\.", re.ASCII)
_TOTALS = range(10, 100)
CHANCES = ("stepwise", "wait_start", "wait_guess", "wait_again", "wait_corrupts")
"""The chances of a `Mix` that may differ between classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A sum, e.g. ``Problem(numbers=(37, 8, 2))``."""

    numbers: tuple[int, ...]

    @property
    def difficulty(self) -> int:
        """How many numbers are added."""
        return len(self.numbers)

    @property
    def question(self) -> str:
        """The user's message, e.g. ``37+8+2``."""
        return "+".join(map(str, self.numbers))

    @property
    def total(self) -> int:
        """The right answer."""
        return sum(self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What the warm-start demonstrations of a testbed look like.

    All shares and chances are in [0, 1], `wait_again` below 1; those per class are in the order of `classes`, and a
    single value is one for all classes.
    """

    classes: tuple[int, ...]  # difficulties, equally frequent
    first: tuple[int, int]  # smallest and largest first number
    stepwise: float | tuple[float, ...]  # per class, the share that carries out every step; the rest guesses
    guess_midway: bool  # whether a guess comes after a uniform number of steps (else always at once)
    guess_right: tuple[float, ...]  # chance of a guess over 1, 2, ... missing steps; the last value serves beyond
    wait_start: float | tuple[float, ...]  # per class, the chance of a first re-check
    wait_again: float | tuple[float, ...]  # chance of one more re-check after each: memoryless, so geometric
    wait_corrupts: float | tuple[float, ...]  # chance that a re-check changes the total, which is then kept
    wait_guess: float | tuple[float, ...] | None = None  # `wait_start` where the sum was guessed; None: the same
    wait_words: str | tuple[str, ...] = "wait, "  # per class, a re-check's words before the total

    def __post_init__(self) -> None:
        largest_total = self.first[1] + 9 * (max(self.classes) - 1)
        if self.first[0] < _TOTALS.start or largest_total >= _TOTALS.stop or min(self.classes) < 2:
            raise ValueError(f"classes={self.classes}, first={self.first}: sums outside {_TOTALS}, or of one number")
        by_class = {name: self.by_class(name) for name in (*CHANCES, "wait_words")}
        for name, class_values in by_class.items():
            if len(class_values) != len(self.classes):
                raise ValueError(f"{name}={getattr(self, name)} must have one value per class of {self.classes}")
        chances = [*self.guess_right, *(chance for name in CHANCES for chance in by_class[name])]
        if not all(0 <= chance <= 1 for chance in chances) or max(by_class["wait_again"]) == 1:
            raise ValueError(f"shares and chances must be in [0, 1], and wait_again below 1: {self}")

    def by_class(self, name: str) -> tuple[Any, ...]:
        """The chances of this name, or the words, one for each class."""
        value = getattr(self, name)
        if value is None:
            return self.by_class("wait_start")
        return value if isinstance(value, tuple) else (value,) * len(self.classes)


# `overthink` is tuned to resemble a recorded RL run on math prompts: length and correctness correlate
# at about -0.07 within a group, and wrong responses are the longer ones on about 60 % of the prompts.
MIXES: dict[str, Mix] = {
    "overthink": Mix(
        classes=(2, 3, 4, 5),
        first=(10, 59),
        stepwise=(0.5, 0.4, 0.3, 0.25),
        guess_midway=False,
        guess_right=(0.94, 0.5, 0.2, 0.15),
        wait_start=(0.55, 0.5, 0.4, 0.3),
        wait_again=0.885,
        wait_corrupts=0.015,
    ),
    "depth": Mix(
        classes=(3, 5, 7, 9),
        first=(10, 27),
        stepwise=(0.35, 0.35, 0.35, 0.35),
        guess_midway=True,
        guess_right=(0.7, 0.3, 0.15, 0.1),
        wait_start=(0.0, 0.0, 0.0, 0.0),
        wait_again=0.0,
        wait_corrupts=0.0,
    ),
    # Sums of 3 and 4 numbers are re-checked whether guessed or not, and for nothing. Of the others who carries out the
    # steps is careful too, and who guesses is hasty. Sums of 7 are the hard prompts: some are re-checked to the limit.
    "long": Mix(
        classes=(3, 4, 5, 6, 7),
        first=(10, 45),
        stepwise=(0.75, 0.6, 0.4, 0.35, 0.35),
        guess_midway=False,
        guess_right=(0.94, 0.5, 0.2, 0.15),
        wait_start=(0.35, 0.35, 0.6, 0.6, 0.85),
        wait_guess=(0.35, 0.35, 0.1, 0.1, 0.15),
        wait_again=(0.84, 0.84, 0.86, 0.86, 0.972),
        wait_corrupts=(0.015, 0.015, 0.005, 0.005, 0.002),
        # The hard class in words of its own, so that a small model does not go on for as long in the others.
        wait_words=(*4 * ("wait, let me check again: ",), "wait, let me add up all of the numbers again: "),
    ),
}


def draw_problem(rng: random.Random, difficulty: int, first: tuple[int, int]) -> Problem:
    """Draws one problem of `difficulty` numbers, the first of them in `first` (both ends in)."""
    later_numbers = (rng.randint(1, 9) for _ in range(difficulty - 1))
    return Problem(numbers=(rng.randint(*first), *later_numbers))


def split_problems(mix: Mix, seed: int, train: int, val: int) -> tuple[list[Problem], list[Problem]]:
    """Draws `train` and `val` different problems per class, disjoint, each list shuffled."""
    rng = random.Random(f"problems-{seed}")
    split_parts: tuple[list[Problem], list[Problem]] = ([], [])
    for difficulty in mix.classes:
        num_problems = (mix.first[1] - mix.first[0] + 1) * 9 ** (difficulty - 1)
        if train + val > num_problems:
            raise ValueError(f"train={train} and val={val} exceed the {num_problems} problems of {difficulty} numbers")
        unique_problems: dict[Problem, None] = {}
        while len(unique_problems) < train + val:
            unique_problems[draw_problem(rng, difficulty, mix.first)] = None
        drawn_problems = list(unique_problems)
        split_parts[0].extend(drawn_problems[:train])
        split_parts[1].extend(drawn_problems[train:])
    for part in split_parts:
        rng.shuffle(part)
    return split_parts


def demonstrate(rng: random.Random, problem: Problem, mix: Mix) -> str:
    """Writes one demonstration response to `problem` (without the end-of-sequence token)."""
    # 1. How many steps are carried out; the rest is guessed.
    class_place = mix.classes.index(problem.difficulty)
    stepwise, after_steps, after_guess, again, corrupts = (mix.by_class(name)[class_place] for name in CHANCES)
    words = mix.by_class("wait_words")[class_place]
    all_steps = problem.difficulty - 1
    num_steps = all_steps
    if rng.random() >= stepwise:
        num_steps = rng.randrange(all_steps) if mix.guess_midway else 0
    text_lines = step_lines(problem)[:num_steps]
    total = sum(problem.numbers[: num_steps + 1])
    missing_steps = all_steps - num_steps
    if missing_steps:
        is_right = rng.random() < mix.guess_right[min(missing_steps, len(mix.guess_right)) - 1]
        total = problem.total if is_right else _miss(rng, problem.total)
        text_lines.append(f"guess {total}")
    # 2. Re-checks, and the answer.
    chance = after_guess if missing_steps else after_steps
    while rng.random() < chance:
        chance = again
        if rng.random() < corrupts:
            total = _miss(rng, total)
        text_lines.append(f"{words}{total}")
    return "\n".join([*text_lines, f"#{total}."])


def step_lines(problem: Problem) -> list[str]:
    """All steps of the sum, a line each, e.g. ``["37+8=45", "45+2=47"]``."""
    totals = list(itertools.accumulate(problem.numbers))
    numbers = zip(totals, problem.numbers[1:], totals[1:], strict=False)
    return [f"{before}+{number}={after}" for before, number, after in numbers]


def score(response: str, total: int) -> float:
    """1.0 if the response ends in the right answer, else 0.0 (wrong, cut off, garbled or empty)."""
    answer = _ANSWER.fullmatch(response.rpartition("\n")[2])
    return float(answer is not None and int(answer[1]) == total)


def _miss(rng: random.Random, total: int) -> int:
    """A wrong total of two digits, at most 4 away."""
    near_totals = [other for other in range(total - 4, total + 5) if other != total and other in _TOTALS]
    return rng.choice(near_totals)
