"""The command: which facts, in which order, and what the exit code is.

    python -m darts.doctor                                 this machine
    python -m darts.doctor --communication                 and all nodes and GPUs of the cluster in RAY_ADDRESS
    python -m darts.doctor --communication --ranks 4       four processes where there is no GPU

Contract: one line per fact, as soon as it is known; exit code 1 if one is FAILED, 2 for options that make no sense.
torch, verl and Ray are imported when their facts are asked for.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from darts.doctor.facts import (
    FAILED,
    OK,
    WARNING,
    Fact,
    device_facts,
    installed_for,
    machine_facts,
    plugin_facts,
    version_facts,
)
from darts.evidence.log import OptionParser, logger
from darts.evidence.machine import machine

GROUPS = ("versions", "plugin", "device", "machine")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(prog="python -m darts.doctor", description="What is there, and will it work?")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="these facts alone")
    parser.add_argument(
        "--communication",
        action="store_true",
        help="also the nodes of the Ray cluster in RAY_ADDRESS (else a local Ray is started), and all-reduce between "
        "one process per GPU",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="processes on a machine without GPUs (default: 2)")
    parser.add_argument(
        "--limit-s", type=float, default=60.0, metavar="S", help="limit of every single wait (default: %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the facts for machines; replaced if it exists")
    options = parser.parse_args(arguments)
    if options.ranks is not None:
        if not options.communication:
            parser.error(f"--ranks {options.ranks}: only with --communication")
        if options.ranks < 2:
            parser.error(f"--ranks {options.ranks}: must be at least 2, or there is nothing to communicate")
        if installed_for() == "gpu":
            parser.error(f"--ranks {options.ranks}: with GPUs there is one process per GPU; leave it out")
    if not 1 <= options.limit_s < math.inf:
        parser.error(f"--limit-s {options.limit_s:g}: must be at least 1")
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK):
        parser.error(f"--json {options.json}: a file cannot be written there")
    return options


def _all_facts(options: argparse.Namespace) -> Iterator[Fact]:
    elsewhere = options.communication and bool(os.environ.get("RAY_ADDRESS"))
    group_facts = (version_facts, plugin_facts, partial(device_facts, elsewhere), machine_facts)
    for name, find_facts in zip(GROUPS, group_facts, strict=True):
        if name in options.only:
            yield from find_facts()
    if options.communication:
        from darts.doctor.communication import communication_facts

        yield from communication_facts(options.ranks or 2, options.limit_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = _parse(arguments)
    start_s, facts = time.monotonic(), []
    for fact in _all_facts(options):
        facts.append(fact)
        print(fact.line(), flush=True)
    counts, seconds = Counter(fact.status for fact in facts), time.monotonic() - start_s
    summary = f"{counts[OK]} ok, {counts[WARNING]} warnings, {counts[FAILED]} failed, in {seconds:.0f} s"
    logger.info(f"doctor: {summary}")
    if options.json is not None:
        document = {"format": "darts.doctor", "version": 1, "machine": machine(), "facts": [asdict(f) for f in facts]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
