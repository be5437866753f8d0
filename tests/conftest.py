"""Tiers: the folder of a test is its tier; tiers run in order, cheapest first; slow tests run with --full only.

With `-n 2` they run in two lanes, the dearest first, so that the cheap ones fill what is left. A tier that shares a
Ray, engines or ranks stays in one lane, and so does the e2e tier: two whole runs never need memory at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
TIERS = ("unit", "contract", "actor", "ray", "engine", "e2e")
LANES = ("e2e", "ray", "engine", "actor", "contract", "unit")
"""The order in lanes. A Ray lives to the end of its process, but the engines' ends the one before."""
DIVISIBLE = ("unit", "contract")
"""Tiers whose files may run in different lanes."""
LANE = os.environ.get("PYTEST_XDIST_WORKER")

# An example may take as long as it likes: that it took 200 ms says nothing on a slow machine.
settings.register_profile("fast", deadline=None, max_examples=40)
settings.register_profile("full", deadline=None, max_examples=100)

# Ray starts its workers with niceness 15. Beside other work they would have next to no processor, and tests would wait.
os.environ.setdefault("RAY_worker_niceness", "0")
if LANE:  # where Ray looks for a cluster to join, and puts its sockets
    os.environ["RAY_TMPDIR"] = f"{os.environ.get('RAY_TMPDIR', '/tmp')}/{LANE}"
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if config.getoption("--full") else "fast")


def tier_of(item: pytest.Item) -> str:
    folder = item.path.relative_to(HERE).parts[0]
    if folder not in TIERS:
        raise pytest.UsageError(f"{item.path}: tests live in tests/{{{','.join(TIERS)}}}/")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier_of(item))
    items.sort(key=lambda item: (LANES if LANE else TIERS).index(tier_of(item)))

    if config.getoption("--full"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole tiers, or whole files of the divisible ones, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            tier = (config.rootpath / file).relative_to(HERE).parts[0]
            return file if tier in DIVISIBLE else tier

    config.option.loadscopereorder = False
    return Lanes(config, log)
