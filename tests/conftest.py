"""Tiers: the folder of a test is its tier; tiers run in order, cheapest first; slow tests run with --full only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
TIERS = ("unit", "contract", "actor", "ray", "engine", "e2e")

# An example may take as long as it likes: what 200 ms are enough for says nothing on a slow machine.
settings.register_profile("darts", deadline=None)
settings.load_profile("darts")

# Ray starts its workers with niceness 15. Beside other work they would have next to no processor, and tests would wait.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def tier_of(item: pytest.Item) -> str:
    folder = item.path.relative_to(HERE).parts[0]
    if folder not in TIERS:
        raise pytest.UsageError(f"{item.path}: tests live in tests/{{{','.join(TIERS)}}}/")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier_of(item))
    items.sort(key=lambda item: TIERS.index(tier_of(item)))

    if config.getoption("--full"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
