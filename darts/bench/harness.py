"""What all benches stand on: a command with options, a JSON document, arms that take turns, pairs, tables, checks.

Contract: standard library, NumPy and `darts` alone, so that `--help` is fast.

1. A bench is a `Bench`: its options, one function that measures, one that makes tables of the records, one that checks.
2. A record is a flat dictionary: what was measured of one arm at one place, with `arm` and the place's keys, by which
   it is paired with the other arms' records. All of them are in the document, with settings, command and machine.
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
from typing import Any, TypeVar

import numpy as np

import darts.evidence.machine
from darts.config import ConfigError
from darts.evidence import documents, statistics
from darts.evidence.log import logger, say
from darts.evidence.statistics import Array, Estimate
from darts.evidence.tables import Check, table
from darts.evidence.trace import TraceError

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
OVERRIDE = {"--override": ([], "of the Hydra configuration; may be repeated", {"action": "append"})}
"""The option of benches that start an engine."""
FlatRecord = Mapping[str, Any]
Records = Any
"""A list of flat records, or several by name."""
Place = Mapping[str, Any]
Save = Callable[..., None]
"""Adds parts to a bench's document, or replaces them."""
ArmName = TypeVar("ArmName")


class BenchError(RuntimeError):
    """A bench that cannot go on; one line that says why."""


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One bench, as `python -m darts.bench NAME` runs it."""

    name: str
    about: str  # the contract that `--help` shows
    options: Mapping[str, tuple[Any, ...]]  # as `add_options`
    measure: Callable[[argparse.Namespace, Save], Records]
    tables: Callable[[Records], str]
    checks: Callable[[Records], list[Check]] = lambda records: []
    quick: Mapping[str, Any] = field(default_factory=dict)  # defaults with `--quick`; without any there is none

    def parse(self, command_arguments: Sequence[str]) -> argparse.Namespace:
        """The options, with `--quick` worked in."""
        parser = make_parser(self.name, self.about)
        parser.add_argument("--out", type=Path, metavar="FILE", help="where all figures go as JSON (default: nowhere)")
        if self.quick:
            parser.add_argument("--quick", action="store_true", help="few and small repetitions, to try it out")
        add_options(parser, self.options)
        if "--quick" in command_arguments:
            parser.set_defaults(**self.quick)
        return parser.parse_args(list(command_arguments))

    def main(self, command_arguments: Sequence[str]) -> int:
        """Measures, prints tables and checks; the exit code."""
        bench_options = self.parse(command_arguments)
        return exit_code(lambda: self._run(bench_options, command_arguments))

    def _run(self, options: argparse.Namespace, arguments: Sequence[str]) -> int:
        command = ["python", "-m", "darts.bench", self.name, *arguments]
        document = {"command": command, "settings": vars(options), "machine": machine()}  # before there is load

        def save(**made_parts: Any) -> None:
            document.update(made_parts)
            if options.out is not None:
                documents.save(options.out, document)

        began = time.monotonic()
        records = self.measure(options, save)
        made = self.checks(records)
        lines = [str(check) for check in made]
        save(records=records, checks=lines)
        logger.info("\n\n" + self.tables(records) + "\n\n" + "\n".join([*lines, ""]))
        say(f"done in {time.monotonic() - began:.0f} s")
        return 0 if all(check.passed for check in made) else 1


def make_parser(bench_name: str, help_text: str) -> argparse.ArgumentParser:
    """A command line whose help is a contract."""
    program_name = f"python -m darts.bench {bench_name}".strip()
    return argparse.ArgumentParser(
        prog=program_name, description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_options(parser: argparse.ArgumentParser, option_table: Mapping[str, tuple[Any, ...]]) -> None:
    """Adds options by name: default, help, and maybe more of `add_argument`; the default's type is the value's.

    Example:
        >>> add_options(parser, {"--prompts": (8, "of a rollout"), "--requests": ([32, 96], "at once")})
    """
    for option_name, (default_value, help_text, *more_settings) in option_table.items():
        option_settings: dict[str, Any] = {"default": default_value, "help": f"{help_text} (default: %(default)s)"}
        if isinstance(default_value, bool):
            option_settings["action"] = "store_true"
        elif isinstance(default_value, list) and default_value:
            option_settings |= {"nargs": "+", "type": type(default_value[0])}
        elif isinstance(default_value, int | float | Path):
            option_settings["type"] = type(default_value)
        parser.add_argument(option_name, **option_settings | dict(*more_settings))


def exit_code(command_body: Callable[[], int]) -> int:
    """What the body returns; or 2 where it refuses, 1 where it fails, with one line."""
    try:
        return command_body()
    except (ConfigError, BenchError, TraceError) as caught_error:
        logger.error(caught_error)
        return 2 if isinstance(caught_error, ConfigError) else 1


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return darts.evidence.machine.machine(tuple(ENVIRONMENT))


def set_environment() -> None:
    """Gives this process and its children one thread each, unless the environment says otherwise."""
    for variable_name, variable_value in ENVIRONMENT.items():
        os.environ.setdefault(variable_name, variable_value)


# --- turns -----------------------------------------------------------------------------------------------------------


def rotated(arm_names: Sequence[ArmName], turn_number: int) -> list[ArmName]:
    """The arms in this turn's order."""
    first_place = turn_number % len(arm_names)
    return [*arm_names[first_place:], *arm_names[:first_place]]


def repetitions(count: int, key_name: str = "repetition", **axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The places of all combinations of the axes: for each, one that warms up (-1), and `count` that count."""
    for axis_values in product(*axes.values()):
        for repetition_number in range(-1, count):
            yield {**dict(zip(axes, axis_values, strict=True)), key_name: repetition_number}


def take_turns(
    places: Iterable[Place],
    arms: Sequence[str],
    measure_arm: Callable[..., Mapping[str, Any]],
    settle_place: Callable[[dict[str, dict[str, Any]]], None] | None = None,
    shown: str = "seconds",
) -> list[dict[str, Any]]:
    """Measures every arm at every place.

    Args:
        places: keys by which the arms' records are paired; a place with a negative number only warms up.
        arms: names.
        measure_arm: is called with the arm, and the place's keys by name; gives the figures.
        settle_place: gets a place's records by arm, and may change them.
        shown: figure of the line that each place gets.

    Returns:
        The records in the order of the arms, as tables have them.
    """
    records = []
    for turn, place in enumerate(places):
        found = {arm: {"arm": arm, **place, **measure_arm(arm, **place)} for arm in rotated(arms, turn)}
        if settle_place is not None:
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


# --- figures and tables ----------------------------------------------------------------------------------------------


def arms_of(flat_records: Iterable[FlatRecord]) -> list[str]:
    """The arms in the order in which they first occur."""
    return list(dict.fromkeys(flat_record["arm"] for flat_record in flat_records))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """The figures of one arm among all, for a row of a table.

    Example: `ArmFigures(arm="adaptive", base="uniform", pair_by=("seed", "step"), records=records).over("seconds")`.
    """

    arm: str
    base: str  # the arm that it is compared with
    pair_by: Sequence[str]
    records: Sequence[FlatRecord]  # of all arms

    @property
    def own(self) -> list[FlatRecord]:
        """The arm's records."""
        return [flat_record for flat_record in self.records if flat_record["arm"] == self.arm]

    def known(self, key: str) -> Array:
        """The values of `key` where there is one."""
        return np.array([record[key] for record in self.own if record.get(key) is not None], dtype=float)

    def total(self, figure_key: str) -> float:
        """The sum; 0 without any."""
        return float(self.known(figure_key).sum())

    def mean(self, figure_key: str) -> float:
        """The mean; NaN without any."""
        known_values = self.known(figure_key)
        return float(known_values.mean()) if len(known_values) else float("nan")

    def median(self, figure_key: str) -> float:
        """The median."""
        return float(np.median(self.known(figure_key)))

    def over(self, key: str, number_format: str = ".2f") -> str:
        """The total of `key` over the base's, with its interval; 1 for the base."""
        return self._over(self.arm, self.base, key, number_format)

    def speed_up(self, key: str = "seconds", form: str = ".2f") -> str:
        """The base's total of `key` over the arm's."""
        return self._over(self.base, self.arm, key, form)

    def _over(self, above: str, below: str, key: str, form: str) -> str:
        return "1" if above == below else format(ratio(self.records, above, below, self.pair_by, key), form)

    def share(self, part: str, whole: str) -> Estimate:
        """The arm's total of `part` over that of `whole`."""
        part_values, whole_values = (paired(self.records, self.arm, key, self.pair_by) for key in (part, whole))
        return statistics.ratio(part_values, whole_values, np.random.default_rng(0))


Columns = Sequence[tuple[str, Callable[[ArmFigures], object]]]
"""Titles, and what is in a row's cell."""


def arms_table(
    records: Sequence[FlatRecord],
    columns: Columns,
    pair_by: Sequence[str],
    base: str,
    split: str | None = None,
    arms: Sequence[str] | None = None,
) -> str:
    """A row for each arm, or of these arms; with `split`, for each value of this key, which is the first column."""
    rows = []
    for value in sorted({record[split] for record in records}) if split else [None]:
        some = [record for record in records if split is None or record[split] == value]
        for arm in arms_of(some) if arms is None else arms:
            figures = ArmFigures(arm=arm, base=base, pair_by=pair_by, records=some)
            rows.append([*([value] if split else []), arm, *(cell(figures) for _, cell in columns)])
    return table([*([split] if split else []), "arm", *(title for title, _ in columns)], rows)


def paired(records: Sequence[FlatRecord], arm: str, key: str, pair_by: Sequence[str]) -> Array:
    """The values of `key` of one arm, in the order of their pairing keys.

    Raises:
        ValueError: the arm lacks a pair that another arm has, or has one twice.
    """
    pair_keys = sorted({tuple(record[name] for name in pair_by) for record in records})
    arm_records = {tuple(record[name] for name in pair_by): record for record in records if record["arm"] == arm}
    if len(arm_records) != sum(record["arm"] == arm for record in records) or sorted(arm_records) != pair_keys:
        raise ValueError(f"arm {arm!r}: {len(arm_records)} different repetitions, but there are {len(pair_keys)}.")
    return np.array([arm_records[pair_key][key] for pair_key in pair_keys], dtype=float)


def ratio(
    records: Sequence[FlatRecord], above_arm: str, below_arm: str, pair_by: Sequence[str], key: str = "seconds"
) -> Estimate:
    """The total of `key` of one arm over that of another."""
    arm_values = (paired(records, arm, key, pair_by) for arm in (above_arm, below_arm))
    return statistics.ratio(*arm_values, np.random.default_rng(0))
