"""A reward that differs between responses of any kind, so that every group teaches something."""

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """In [0, 1), by the characters of the response alone."""
    return sum(map(ord, solution_str)) % 97 / 97
