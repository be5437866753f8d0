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

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options, with `--quick` worked in."""
        parser = make_parser(self.name, self.about)
        parser.add_argument("--out", type=Path, metavar="FILE", help="where all figures go as JSON (default: nowhere)")
        if self.quick:
            parser.add_argument("--quick", action="store_true", help="few and small repetitions, to try it out")
        add_options(parser, self.options)
        if "--quick" in arguments:
            parser.set_defaults(**self.quick)
        return parser.parse_args(list(arguments))

    def main(self, arguments: Sequence[str]) -> int:
        """Measures, prints tables and checks; the exit code."""
        options = self.parse(arguments)
        return exit_code(lambda: self._run(options, arguments))

    def _run(self, options: argparse.Namespace, arguments: Sequence[str]) -> int:
        command = ["python", "-m", "darts.bench", self.name, *arguments]
        document = {"command": command, "settings": vars(options), "machine": machine()}  # before there is load

        def save(**parts: Any) -> None:
            document.update(parts)
            if options.out is not None:
                documents.save(options.out, document)

        records = self.measure(options, save)
        made = self.checks(records)
        save(records=records, checks=[str(check) for check in made])
        logger.info("\n\n".join(["", self.tables(records), *map(str, made), ""]))
        return 0 if all(check.passed for check in made) else 1


def make_parser(name: str, about: str) -> argparse.ArgumentParser:
    """A command line whose help is a contract."""
    program = f"python -m darts.bench {name}".strip()
    return argparse.ArgumentParser(
        prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_options(parser: argparse.ArgumentParser, options: Mapping[str, tuple[Any, ...]]) -> None:
    """Adds options by name: default, help, and maybe more of `add_argument`; the default's type is the value's.

    Example:
        >>> add_options(parser, {"--prompts": (8, "of a rollout"), "--requests": ([32, 96], "at once")})
    """
    for name, (default, about, *more) in options.items():
        settings: dict[str, Any] = {"default": default, "help": f"{about} (default: %(default)s)"}
        if isinstance(default, bool):
            settings["action"] = "store_true"
        elif isinstance(default, list) and default:
            settings |= {"nargs": "+", "type": type(default[0])}
        elif isinstance(default, int | float | Path):
            settings["type"] = type(default)
        parser.add_argument(name, **settings | dict(*more))


def exit_code(body: Callable[[], int]) -> int:
    """What the body returns; or 2 where it refuses, 1 where it fails, with one line."""
    try:
        return body()
    except (ConfigError, BenchError, TraceError) as error:
        logger.error(error)
        return 2 if isinstance(error, ConfigError) else 1


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return darts.evidence.machine.machine(tuple(ENVIRONMENT))


def set_environment() -> None:
    """Gives this process and its children one thread each, unless the environment says otherwise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


# --- turns -----------------------------------------------------------------------------------------------------------


def rotated(arms: Sequence[ArmName], turn: int) -> list[ArmName]:
    """The arms in this turn's order."""
    start = turn % len(arms)
    return [*arms[start:], *arms[:start]]


def repetitions(count: int, name: str = "repetition", **axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The places of all combinations of the axes: for each, one that warms up (-1), and `count` that count."""
    for values in product(*axes.values()):
        for number in range(-1, count):
            yield {**dict(zip(axes, values, strict=True)), name: number}


def take_turns(
    places: Iterable[Place],
    arms: Sequence[str],
    measure: Callable[..., Mapping[str, Any]],
    settle: Callable[[dict[str, dict[str, Any]]], None] | None = None,
    shown: str = "seconds",
) -> list[dict[str, Any]]:
    """Measures every arm at every place.

    Args:
        places: keys by which the arms' records are paired; a place with a negative number only warms up.
        arms: names.
        measure: is called with the arm, and the place's keys by name; gives the figures.
        settle: gets a place's records by arm, and may change them.
        shown: figure of the line that each place gets.

    Returns:
        The records in the order of the arms, as tables have them.
    """
    records = []
    for turn, place in enumerate(places):
        found = {arm: {"arm": arm, **place, **measure(arm, **place)} for arm in rotated(arms, turn)}
        if settle is not None:
            settle(found)
        where = ", ".join(f"{key} {value}" for key, value in place.items())
        say(f"{where}, {shown}: " + ", ".join(f"{arm} {found[arm][shown]:,.4g}" for arm in arms))
        if not any(isinstance(value, int) and value < 0 for value in place.values()):
            records += found.values()
    return sorted(records, key=lambda record: arms.index(record["arm"]))


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


# --- figures and tables ----------------------------------------------------------------------------------------------


def arms_of(records: Iterable[FlatRecord]) -> list[str]:
    """The arms in the order in which they first occur."""
    return list(dict.fromkeys(record["arm"] for record in records))


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
        return [record for record in self.records if record["arm"] == self.arm]

    def known(self, key: str) -> Array:
        """The values of `key` where there is one."""
        return np.array([record[key] for record in self.own if record.get(key) is not None], dtype=float)

    def total(self, key: str) -> float:
        """The sum; 0 without any."""
        return float(self.known(key).sum())

    def mean(self, key: str) -> float:
        """The mean; NaN without any."""
        values = self.known(key)
        return float(values.mean()) if len(values) else float("nan")

    def median(self, key: str) -> float:
        """The median."""
        return float(np.median(self.known(key)))

    def over(self, key: str, form: str = ".2f") -> str:
        """The total of `key` over the base's, with its interval; 1 for the base."""
        return self._over(self.arm, self.base, key, form)

    def speed_up(self, key: str = "seconds", form: str = ".2f") -> str:
        """The base's total of `key` over the arm's."""
        return self._over(self.base, self.arm, key, form)

    def _over(self, above: str, below: str, key: str, form: str) -> str:
        return "1" if above == below else format(ratio(self.records, above, below, self.pair_by, key), form)

    def share(self, part: str, whole: str) -> Estimate:
        """The arm's total of `part` over that of `whole`."""
        above, below = (paired(self.records, self.arm, key, self.pair_by) for key in (part, whole))
        return statistics.ratio(above, below, np.random.default_rng(0))


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
    pairs = sorted({tuple(record[name] for name in pair_by) for record in records})
    own = {tuple(record[name] for name in pair_by): record for record in records if record["arm"] == arm}
    if len(own) != sum(record["arm"] == arm for record in records) or sorted(own) != pairs:
        raise ValueError(f"arm {arm!r}: {len(own)} different repetitions, but there are {len(pairs)}.")
    return np.array([own[pair][key] for pair in pairs], dtype=float)


def ratio(
    records: Sequence[FlatRecord], above: str, below: str, pair_by: Sequence[str], key: str = "seconds"
) -> Estimate:
    """The total of `key` of one arm over that of another."""
    values = (paired(records, arm, key, pair_by) for arm in (above, below))
    return statistics.ratio(*values, np.random.default_rng(0))
