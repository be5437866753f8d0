"""Markdown tables, and checks with their bounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def number(value: float, form: str = ".2f") -> str:
    """A figure of a table; `-` where it is not known."""
    return format(value, form) if math.isfinite(value) else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One required bound with what was measured."""

    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """Whether low <= value <= high."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.value:.3f} in [{self.low:g}, {self.high:g}]"
