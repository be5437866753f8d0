"""What the benchmarks share: their command line, the JSON file that they leave, and how a run's trace is read.

Contract: standard library and `darts` alone, so that `--help` is fast. A benchmark's records are flat dictionaries, one
per repetition, as `darts.bench.rollouts_report` has them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import darts.evidence.machine
from darts.evidence import statistics
from darts.evidence.statistics import Array, Estimate
from darts.evidence.tables import table
from darts.evidence.trace import find_file

__all__ = ["arms_of", "document", "found", "mean", "over", "paired", "parser", "save", "table", "trace_metrics"]

Record = Mapping[str, Any]


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with `--out`; the description is the module's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="FILE", help="where to write all figures as JSON (default: nowhere)")
    return made


def document(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to; to be called before anything is measured, for the machine's load."""
    return {"settings": vars(options), "machine": machine()}


def save(options: argparse.Namespace, opening: dict[str, Any], **results: Any) -> None:
    """Writes the file that `--out` names, if any."""
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(opening | results, default=str) + "\n")


def over(records: Sequence[Record], arm: str, base: str, by: Sequence[str], key: str = "seconds") -> Estimate:
    """The total of `key` of `arm` over that of `base`, with a bootstrap interval over the pairs."""
    return speed_up(records, base, arm, by, key)


def trace_metrics(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of each step of a run, by step.

    What a resumed run has done again replaces what it had done, as in `darts.report`.

    Args:
        run: Its trace, or a folder that holds one.
    """
    steps: dict[int, dict[str, float]] = {}
    for line in find_file(run).read_text().split("\n")[:-1]:  # a last line without its end was cut off
        record = json.loads(line)
        steps = {step: metrics for step, metrics in steps.items() if step < record["step"]}
        steps[record["step"]] = record["metrics"]
    return steps


def found(records: Sequence[Record], key: str) -> list[float]:
    """The values of `key` where there is one."""
    return [record[key] for record in records if record.get(key) is not None]


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN without any."""
    return float(np.mean(values)) if len(values) else float("nan")


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

Arm = TypeVar("Arm")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return darts.evidence.machine.machine(tuple(ENVIRONMENT))


def rotated(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """The arms in this turn's order."""
    start = turn % len(arms)
    return [*arms[start:], *arms[:start]]


Record = Mapping[str, Any]


def arms_of(records: Sequence[Record]) -> list[str]:
    """The arms in the order in which they first occur."""
    return list(dict.fromkeys(record["arm"] for record in records))


def paired(records: Sequence[Record], arm: str, key: str, by: Sequence[str]) -> Array:
    """The values of `key` of one arm, in the order of their pairing keys.

    Raises:
        ValueError: the arm lacks a pair that another arm has, or has one twice.
    """
    pairs = sorted({tuple(record[name] for name in by) for record in records})
    own = {tuple(record[name] for name in by): record for record in records if record["arm"] == arm}
    if len(own) != sum(record["arm"] == arm for record in records) or sorted(own) != pairs:
        raise ValueError(f"arm {arm!r}: {len(own)} different repetitions, but there are {len(pairs)}.")
    return np.array([own[pair][key] for pair in pairs], dtype=float)


def speed_up(records: Sequence[Record], arm: str, over: str, by: Sequence[str], key: str = "seconds") -> Estimate:
    """The total of `key` of the arm `over` divided by that of `arm`."""
    above, below = (paired(records, name, key, by) for name in (over, arm))
    return statistics.ratio(above, below, np.random.default_rng(0))
