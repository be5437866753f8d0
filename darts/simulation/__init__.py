"""Replays length traces through the method: what a strategy would take on a cluster, without one.

Contract: Python, NumPy and pydantic; figures need matplotlib. Decisions are those of `darts.strategy`,
`darts.planning` and `darts.group` themselves; here is what they run on: engines whose steps take what a `LatencyCurve`
says.

A replay takes lengths as they were recorded. It does not know that a strategy changes what the model learns, so it
shows what a strategy gains or costs at once, never what shaping brings later.
"""

import sys
import time

PROGRESS_S = 3.0
_last_said_s = _began_s = time.monotonic()


class SimulationError(ValueError):
    """Input that cannot be simulated; one line that names what, the rule, and the fix."""


def progress(line: str) -> None:
    """Says on stderr how far a long replay is, every few seconds."""
    global _last_said_s
    now_s = time.monotonic()
    if now_s - _last_said_s > PROGRESS_S:
        _last_said_s = now_s
        print(f"[{now_s - _began_s:.0f} s] {line}", file=sys.stderr, flush=True)
