"""What the benchmarks share: their command line, the JSON file that they leave, and how a run's trace is read.

Contract: standard library and `darts` alone, so that `--help` is fast. A benchmark's records are flat dictionaries, one
per repetition, as `darts.testbed.rollouts_report` has them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts.report import find_file
from darts.testbed.rollouts import machine
from darts.testbed.rollouts_report import arms_of, paired, speed_up, table
from darts.testbed.statistics import Estimate

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
