"""What all benches stand on: a command with options, a JSON document, arms that take turns, pairs, tables, checks.

Contract: standard library, pandas and `darts` alone: `--help` loads neither verl nor torch.

1. A bench is a `Bench`: its options, one function that measures, one that makes tables of the records, one that checks.
2. A record is a flat dictionary: what was measured of one arm at one place, with `arm` and the place's keys, by which
   it is paired with the other arms' records. All of them are in the document, with settings, command and machine;
   tables and checks get them as a data frame, or as one for each name where a bench has several lists.
3. Arms take turns at each place, in an order that rotates: what else happens on the machine hits all of them, so only
   ratios within a run are compared. They are of totals, with 95 % bootstrap intervals over the pairs.
4. The exit code is 0; 1 where a check fails or the bench does, with one line; 2 where it is refused, with one line.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from darts.config import ConfigError
from darts.evidence import documents, statistics
from darts.evidence.log import logger, say
from darts.evidence.machine import machine
from darts.evidence.statistics import Estimate
from darts.evidence.tables import Check, table
from darts.evidence.trace import TraceError

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
OVERRIDE = {"--override": ([], "of the Hydra configuration; may be repeated", {"action": "append"})}
"""The option of benches that start an engine."""
FlatRecords = list[dict[str, Any]]
Options = Mapping[str, tuple[Any, ...]]
"""Default (its type is the value's), help, maybe more of `add_argument`: `{"--requests": ([32, 96], "at once")}`."""
Save = Callable[..., None]
"""Adds parts to a bench's document, or replaces them."""


class BenchError(RuntimeError):
    """A bench that cannot go on; one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One bench, as `python -m darts.bench NAME` runs it."""

    name: str
    about: str  # the contract that `--help` shows
    options: Options
    measure: Callable[[argparse.Namespace, Save], Any]
    tables: Callable[[Any], str]
    checks: Callable[[Any], list[Check]] = lambda records: []
    quick: Mapping[str, Any] = field(default_factory=dict)  # defaults with `--quick`; without any there is none

    def parse(self, command_arguments: Sequence[str]) -> argparse.Namespace:
        """The options, with `--quick` worked in."""
        option_table: dict[str, tuple[Any, ...]] = {"--out": (None, "JSON file of all figures", {"type": Path})}
        if self.quick:
            option_table["--quick"] = False, "few and small repetitions, to try it out"
        return parse(self.name, self.about, option_table | dict(self.options), self.quick, command_arguments)

    def main(self, command_arguments: Sequence[str]) -> int:
        """Measures, prints tables and checks; the exit code."""
        bench_options = self.parse(command_arguments)
        return exit_code(lambda: self._run(bench_options, command_arguments))

    def _run(self, bench_options: argparse.Namespace, command_arguments: Sequence[str]) -> int:
        command_words = ["python", "-m", "darts.bench", self.name, *command_arguments]
        machine_here = machine(tuple(ENVIRONMENT))  # before there is load
        document = {"command": command_words, "settings": vars(bench_options), "machine": machine_here}

        def save(**made_parts: Any) -> None:
            document.update(made_parts)
            if bench_options.out is not None:
                documents.save(bench_options.out, document)

        started_at = time.monotonic()
        records = self.measure(bench_options, save)
        save(records=records)
        several = isinstance(records, dict)
        frames = {name: pd.DataFrame(part) for name, part in records.items()} if several else pd.DataFrame(records)
        made_checks = self.checks(frames)
        check_lines = [str(check) for check in made_checks]
        save(checks=check_lines)
        logger.info("\n\n" + self.tables(frames) + "\n\n" + "\n".join([*check_lines, ""]))
        say(f"done in {time.monotonic() - started_at:.0f} s")
        return 0 if all(check.passed for check in made_checks) else 1


def parse(
    bench_name: str, about: str, options: Options, quick: Mapping[str, Any], command_arguments: Sequence[str]
) -> argparse.Namespace:
    """The options of a command whose help is a contract; `quick` has defaults with `--quick`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m darts.bench {bench_name}".strip(),
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option_name, (default_value, help_text, *more_settings) in options.items():
        option_settings: dict[str, Any] = {"default": default_value, "help": f"{help_text} (default: %(default)s)"}
        if isinstance(default_value, bool):
            option_settings["action"] = "store_true"
        elif isinstance(default_value, list) and default_value:
            option_settings |= {"nargs": "+", "type": type(default_value[0])}
        elif isinstance(default_value, int | float | Path):
            option_settings["type"] = type(default_value)
        parser.add_argument(option_name, **option_settings | dict(*more_settings))
    if "--quick" in command_arguments:
        parser.set_defaults(**quick)
    return parser.parse_args(list(command_arguments))


def exit_code(command_body: Callable[[], int]) -> int:
    """What the body returns; or 2 where it refuses, 1 where it fails, with one line."""
    try:
        return command_body()
    except (ConfigError, BenchError, TraceError) as caught_error:
        logger.error(caught_error)
        return 2 if isinstance(caught_error, ConfigError) else 1


def set_environment() -> None:
    """Gives this process and its children one thread each, unless the environment says otherwise."""
    os.environ.update(ENVIRONMENT | dict(os.environ))


def repetitions(count: int, key_name: str = "repetition", **axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The places of all combinations of the axes: for each, one that warms up (-1), and `count` that count."""
    for axis_values in product(*axes.values()):
        for repetition_number in range(-1, count):
            yield {**dict(zip(axes, axis_values, strict=True)), key_name: repetition_number}


def take_turns(
    places: Iterable[Mapping[str, Any]],
    arms: Sequence[str],
    measure_arm: Callable[..., Mapping[str, Any]],
    settle_place: Callable[[dict[str, dict[str, Any]]], None] = lambda found_records: None,
    shown: str = "seconds",
) -> FlatRecords:
    """Measures every arm at every place, in an order that rotates; the records are in the order of the arms.

    Args:
        places: keys by which the arms' records are paired; a place with a negative number only warms up.
        arms: names.
        measure_arm: is called with the arm, and the place's keys by name; gives the figures.
        settle_place: gets a place's records by arm, and may change them.
        shown: figure of the line that each place gets.
    """
    records = []
    for turn, place in enumerate(places):
        first_place = turn % len(arms)
        rotated_arms = [*arms[first_place:], *arms[:first_place]]
        found = {arm: {"arm": arm, **place, **measure_arm(arm, **place)} for arm in rotated_arms}
        settle_place(found)
        where = ", ".join(f"{key} {value}" for key, value in place.items())
        say(f"{where}, {shown}: " + ", ".join(f"{arm} {found[arm][shown]:,.4g}" for arm in arms))
        if not any(isinstance(value, int) and value < 0 for value in place.values()):
            records += found.values()
    return sorted(records, key=lambda record: arms.index(record["arm"]))


def seconds_of(timed_call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    started_at = time.perf_counter()
    call_answer = timed_call()
    return time.perf_counter() - started_at, call_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """The figures of one arm among all, for a row of a table.

    Example: `ArmFigures(arm="adaptive", base="uniform", pair_by=("seed", "step"), records=records).over("seconds")`.
    """

    arm: str
    base: str  # the arm that it is compared with
    pair_by: Sequence[str]
    records: pd.DataFrame  # of all arms

    def known(self, figure_key: str) -> pd.Series:
        """The arm's values where there are some."""
        arm_records = self.records[self.records["arm"] == self.arm]
        return arm_records.reindex(columns=[figure_key])[figure_key].dropna().astype(float)

    def total(self, figure_key: str) -> float:
        """The sum; 0 without any."""
        return self.known(figure_key).sum()

    def mean(self, figure_key: str) -> float:
        """The mean; NaN without any."""
        return self.known(figure_key).mean()

    def median(self, figure_key: str) -> float:
        """The median; NaN without any."""
        return self.known(figure_key).median()

    def over(self, figure_key: str, form: str = ".2f") -> str:
        """The total over the base's, with its interval; 1 for the base."""
        return "1" if self.arm == self.base else format(self._ratio(self.arm, self.base, figure_key), form)

    def speed_up(self, figure_key: str = "seconds", form: str = ".2f") -> str:
        """The base's total over the arm's."""
        return "1" if self.arm == self.base else format(self._ratio(self.base, self.arm, figure_key), form)

    def share(self, part_key: str, whole_key: str) -> Estimate:
        """The arm's total of one figure over that of another."""
        arm_values = (
            paired(self.records, key, self.pair_by)[self.arm].to_numpy(float) for key in (part_key, whole_key)
        )
        return statistics.ratio(*arm_values, np.random.default_rng(0))

    def _ratio(self, above_arm: str, below_arm: str, figure_key: str) -> Estimate:
        return ratio(self.records, above_arm, below_arm, self.pair_by, figure_key)


Columns = Sequence[tuple[str, Callable[[ArmFigures], object]]]
"""Titles, and what is in a row's cell."""


def arms_table(
    records: pd.DataFrame,
    columns: Columns,
    pair_by: Sequence[str],
    base: str,
    split: str | None = None,
    arms: Sequence[str] | None = None,
) -> str:
    """A row for each arm, or of these arms; with `split`, for each value of this key, which is the first column."""
    rows = []
    for value, part in records.groupby(split) if split else [(None, records)]:
        for arm in part["arm"].unique() if arms is None else arms:
            figures = ArmFigures(arm=arm, base=base, pair_by=pair_by, records=part)
            rows.append([*([value] if split else []), arm, *(cell(figures) for _, cell in columns)])
    return table([*([split] if split else []), "arm", *(title for title, _ in columns)], rows)


def paired(records: pd.DataFrame, figure_key: str, pair_by: Sequence[str]) -> pd.DataFrame:
    """A figure [pairs, arms], in the order of the pairing keys.

    Raises:
        ValueError: an arm lacks a pair that another arm has, or has one twice.
    """
    figure_groups = records.groupby([*pair_by, "arm"])[figure_key]
    counts = figure_groups.size().unstack(fill_value=0)
    if (counts != 1).any(axis=None):
        arm_name = counts.columns[(counts != 1).any()][0]
        raise ValueError(f"arm {arm_name!r}: must have each of the {len(counts)} repetitions once.")
    return figure_groups.first().unstack()


def ratio(
    records: pd.DataFrame, above_arm: str, below_arm: str, pair_by: Sequence[str], figure_key: str = "seconds"
) -> Estimate:
    """The total of one arm over that of another."""
    arm_values = paired(records, figure_key, pair_by)
    totals = (arm_values[arm].to_numpy(float) for arm in (above_arm, below_arm))
    return statistics.ratio(*totals, np.random.default_rng(0))
