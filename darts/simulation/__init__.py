"""Replays length traces through the method: what a strategy would take on a cluster, without one.

Contract: pure Python and NumPy; figures need matplotlib. Decisions are those of `darts.strategy`, `darts.planning` and
`darts.group` themselves; here is what they run on: engines whose steps take what a `LatencyCurve` says.

| module | what it holds |
|---|---|
| `trace`, `run_trace` | lengths from a CSV file, and from the JSONL of a run |
| `draws` | the trace's prompts as a dataset whose candidates can be drawn again |
| `engine`, `rollout` | one rollout as discrete events: engines, queues, groups, aborts, the harvest |
| `cluster`, `costs`, `curves` | GPUs, seconds of the other phases of a step, latency curves |
| `bound` | the least seconds that any rollout can take |
| `replay` | a strategy over many steps |
| `assumptions` | what a replay assumes in favour of some strategies |
| `comparison`, `figures` | strategies side by side: tables, JSON, PNG |
| `shaping` | a MODEL of how a strategy moves the lengths of later steps; off by default |
| `search` | which strategy and settings to take (`plan`) |
| `validation` | simulated against measured (`validate`) |
| `documents` | what `--json` writes |
| `command` | `python -m darts.simulation` |

A replay takes lengths as they were recorded. It does not know that a strategy changes what the model learns, so it
shows what a strategy gains or costs at once, never what shaping brings later.
"""


class SimulationError(ValueError):
    """Input that cannot be simulated; one line that names what, the rule, and the fix."""
