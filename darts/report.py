"""What a run did, as one page: `python -m darts.report RUN [--out DIR]` reads `darts.jsonl`, draws and explains.

Contract.
1. The input is the only `darts.jsonl` in or below RUN, or the file RUN itself; one JSON object per training step,
   `VERSION` 1. A step that is written again (a resume) replaces the one before, and all that came after that one: they
   are of weights that no longer exist. A last line that was cut off is left out with a note; any other is an error.
2. The file is read once, line by line, and of a step only what the page needs is held: some kilobytes. The page shows
   the timeline of one step, which is known at the end: of the others only the place of their line is held, and that
   step's line is read again.
3. The output is PNG figures and one `index.html` that needs nothing else. A figure without data is left out, and the
   page says why. "First" and "last" are means over the first and last tenth of the steps that have the value.
4. Time is the sum of the steps' own times, without validation: what lies between a kill and a resume does not count.
5. Errors are one line on stderr (name, value, rule, fix) and exit code 2.
"""

import argparse
import base64
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from darts.report_figures import Drawn

Array = NDArray[np.float64]
VERSION = 1
FILE = "darts.jsonl"
FATES = "kfdtax"
"""Kept, kept although truncated (filled), finished and dropped, truncated and dropped, aborted, lost."""
INSIDE_STEP = (
    "gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "save_checkpoint",
    "update_weights",
)  # fmt: skip
"""What is measured inside `timing_s/step` in verl 0.9.1; DARTS's trainer saves there, as `RayPPOTrainer` does."""
REWARDS = ("critic/rewards/mean", "critic/score/mean", "darts/reward/kept_mean")
"""The reward of a run is the first of these that it has."""
UTILITY = tuple(f"darts/allocation/{name}" for name in ("utility", "gain", "time_cost", "time_cost_measured"))
OVERLAP = tuple(
    f"darts/overlap/{name}"
    for name in (
        "hidden_s", "exposed_s", "hidden_share", "calls", "forwarded_per_kept", "in_rollout_share", "before_end_share",
        "cache_peak_gib", "tokens_twice", "late_rows",
    )
)  # fmt: skip
LOGGED = (
    *(f"timing_s/{name}" for name in ("step", *INSIDE_STEP, "testing")), *REWARDS, *UTILITY, *OVERLAP,
    "darts/reward/pool_mean", "darts/group/saturated_share", "darts/history/std_correlation",
    "darts/latency/predicted_s", "darts/rollout/seconds",
)  # fmt: skip
VALIDATION = "val-core/"
MAX_LENGTHS = 512  # held of a step; of more, as many evenly spaced ranks
MAX_PROMPTS = 128  # held of a step for the scatter plots
PROGRESS_S = 3.0


class ReportError(ValueError):
    """The input cannot be reported on; one line that says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What is held of a rollout. Example: fates=[64, 0, 12, 1, 7, 0], lengths=[9, 11, ...], budgets={10: 4, 11: 4}."""

    fates: NDArray[np.int64]  # candidates by fate, in the order of FATES
    lengths: NDArray[np.int32]  # sorted; at most MAX_LENGTHS
    budgets: dict[int, int]  # M'_i -> prompts
    std: NDArray[np.float32]  # [prompts whose std was predicted, at most MAX_PROMPTS; predicted, observed, M'_i]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One training step. Example: number=3, values={"timing_s/step": 3.7, "length/p99": 88.0, ...}, rollout=None."""

    number: int
    values: dict[str, float]  # what was logged and what was computed from the rollout; finite
    rollout: Rollout | None
    offset: int | None = None  # byte at which its line begins in the file; None: the line has no timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step, in seconds since its rollout began. Example: that of `darts.trace.timeline_columns`, chosen of 4."""

    step: Step
    chosen_of: int  # steps, of which this has the median time
    seconds: float  # of the rollout
    running: Array  # [points; from when on, candidates that had not ended]
    calls: Array  # [calls of the actor, maybe none; begin, end, tokens]


@dataclass(slots=True, kw_only=True)
class Run:
    """The steps that count, in order, and what was odd about the file."""

    name: str
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timeline: Timeline | None = None

    @property
    def rolled(self) -> list[Step]:
        """The steps that had a DARTS rollout."""
        return [step for step in self.steps if step.rollout]

    def series(self, key: str) -> Array:
        """A value by step, NaN where it is missing."""
        return np.array([step.values.get(key, math.nan) for step in self.steps])

    def reward(self) -> tuple[str, Array]:
        """Name and values of the reward that the page reports; all NaN without any."""
        key = next((key for key in REWARDS if np.isfinite(self.series(key)).any()), REWARDS[0])
        return key, self.series(key)

    def validations(self) -> list[str]:
        """The validation metrics: the means over samples, or where there is none, all."""
        keys = sorted({key for step in self.steps for key in step.values if key.startswith(VALIDATION)})
        return [key for key in keys if "/mean@" in key] or keys

    def hours(self) -> Array:
        """Hours of training at the end of each step; a step without a time takes the median; NaN without any."""
        seconds = self.series("timing_s/step")
        known = seconds[np.isfinite(seconds)]
        return np.cumsum(np.where(np.isfinite(seconds), seconds, np.median(known) if len(known) else math.nan)) / 3600


def tenths(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first and last tenth, at least one each."""
    size = max(1, len(values) // 10)
    return values[:size], values[-size:]


def first_and_last(values: Array) -> tuple[float, float]:
    """Means of the first and last tenth of the values that are known; NaN where none is."""
    first, last = tenths(values[np.isfinite(values)])
    return _mean(first), _mean(last)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


# --- reading ---------------------------------------------------------------------------------------------------------


def find_file(run: Path) -> Path:
    """The `darts.jsonl` of a run; what the quickstart keeps of the run before, in `previous/`, is not looked at.

    Raises:
        ReportError: there is no such path, no such file below it, or more than one.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ReportError(f"RUN={run}: must be the folder of a run or its {FILE}, but nothing is there; check the path")
    found = sorted(file for file in run.rglob(FILE) if "previous" not in file.relative_to(run).parts)
    if not found:
        raise ReportError(f"RUN={run}: must hold one {FILE}, but none is in or below it; name the folder of a run")
    if len(found) > 1:
        raise ReportError(f"RUN={run}: must hold one {FILE}, but holds {', '.join(map(str, found))}; name one of them")
    return found[0]


def read_run(path: Path) -> Run:
    """Reads a file of steps, with progress on stderr if it takes long.

    Raises:
        ReportError: an empty file, a version other than `VERSION`, a line that is not a step (but a cut last one), or
            a timeline that is none.
    """
    run, replaced, done, said = Run(name=path.name), 0, 0, time.monotonic()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                print(f"{path.name}: {done / 1e6:.0f} of {path.stat().st_size / 1e6:.0f} MB read", file=sys.stderr)
            try:
                record = json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ReportError(f"{path}, line {number}: must be JSON, but {error}; remove the line") from None
                run.notes.append(f"Line {number}, the last, was cut off (a killed run?) and is left out.")
                break
            try:
                step = _step(record, done - len(line))
            except ReportError as error:
                raise ReportError(f"{path}, line {number}: {error}") from None
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ReportError(f"{path}, line {number}: must be a step, but {error!r}; remove the line") from None
            while run.steps and run.steps[-1].number >= step.number:
                run.steps.pop()
                replaced += 1
            run.steps.append(step)
    if not run.steps:
        raise ReportError(f"{path}: must hold a whole step, but holds none; did the run end before its first?")
    if replaced:
        run.notes.append(f"Repeated or undone by a resume: {replaced} steps; only what replaced them counts.")
    if missing := int(np.isnan(run.series("timing_s/step")).sum()):
        run.notes.append(f"Without timing_s/step: {missing} steps; on axes of time they take the median of the others.")
    run.timeline = _timeline(path, run.steps)
    return run


def _step(record: dict[str, Any], offset: int) -> Step:
    if record["version"] != VERSION:
        raise ReportError(f"version={record['version']!r}: must be {VERSION}; use the verl-darts that wrote the file")
    logged, block = record["metrics"], record.get("rollout")
    rollout, values = reduce_rollout(block) if block and block["length"] else (None, {})
    keys = [key for key in LOGGED if key in logged] + [sys.intern(key) for key in logged if key.startswith(VALIDATION)]
    values |= {key: float(logged[key]) for key in keys if isinstance(logged[key], int | float)}
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    place = offset if record.get("timeline") else None
    return Step(number=int(record["step"]), values=finite, rollout=rollout, offset=place)


def _timeline(path: Path, steps: Sequence[Step]) -> Timeline | None:
    """Of the last tenth of the steps with a timeline and a time, the one with the (lower) median time; read again."""
    last = tenths([step for step in steps if step.offset is not None and "timing_s/step" in step.values])[1]
    if not last:
        return None
    step = sorted(last, key=lambda some: some.values["timing_s/step"])[(len(last) - 1) // 2]
    with path.open("rb") as file:
        file.seek(step.offset)
        line = file.readline()
    try:
        told = json.loads(line)["timeline"]
        running, calls = (np.array(told[name], dtype=float) for name in ("running", "calls"))
        timeline = Timeline(
            step=step,
            chosen_of=len(last),
            seconds=float(told["seconds"]),
            running=running.reshape(len(running), 2),
            calls=calls.reshape(len(calls), 3),
        )
        if not len(running) or not np.isfinite([timeline.seconds, *running.flat, *calls.flat]).all():
            raise ValueError("running is empty, or something is not a finite number")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path}, step {step.number}: timeline must have seconds, running and calls, but {error!r}; remove the line"
        ) from None
    return timeline


def reduce_rollout(block: dict[str, Any]) -> tuple[Rollout, dict[str, float]]:
    """What the page needs of the `rollout` of a line: what is held, and figures, NaN where they are not known.

    Raises:
        KeyError, TypeError, ValueError: the block is not of the form that the trainer writes.
    """
    prompts, letters = len(block["length"]), "".join(block["fate"])
    if list(map(len, block["length"])) != list(map(len, block["fate"])) or len(block["budget"]) != prompts:
        raise ValueError("length, fate and budget are not of the same prompts and candidates")
    if not set(letters) <= set(FATES):
        raise ValueError(f"fate={''.join(sorted(set(letters) - set(FATES)))!r} is not of {FATES!r}")
    length, fate = np.fromiter(chain(*block["length"]), dtype=np.int64), np.array(list(letters))
    kept, ended = np.isin(fate, list("kf")), ~np.isin(fate, list("ax"))
    reward = np.array([list(chain(*block.get("reward") or [[None] * len(length)]))], dtype=float).reshape(len(length))
    predicted, observed = (np.array(block.get(key) or [None] * prompts, dtype=float) for key in ("std", "observed_std"))
    budget = np.array(block["budget"], dtype=int)
    std = np.stack([predicted, observed, budget], axis=1)[np.isfinite(predicted)]
    both = std[np.isfinite(std[:, 1]), :2]
    median, p90, p99, longest = np.percentile(length, [50, 90, 99, 100]).tolist()
    values = {
        "length/pool": _mean(length),
        "length/median": median,
        "length/p90": p90,
        "length/p99": p99,
        "length/longest": longest,
        "length/kept": _mean(length[kept]),
        "tokens/generated": float(length.sum()),
        "tokens/kept": float(length[kept].sum()),
        "darts/reward/kept_mean": _mean(reward[kept]),  # NaN if one was not scored, as in darts.metrics
        "darts/reward/pool_mean": _mean(reward[ended]),
        "std_correlation": (
            float(np.corrcoef(both.T)[0, 1]) if len(both) > 2 and np.ptp(both, axis=0).all() else math.nan
        ),
    }
    rollout = Rollout(
        fates=np.array([letters.count(letter) for letter in FATES]),
        lengths=_spread(np.sort(length), MAX_LENGTHS).astype(np.int32),
        budgets=dict(zip(*map(np.ndarray.tolist, np.unique(budget, return_counts=True)), strict=True)),
        std=_spread(std, MAX_PROMPTS).astype(np.float32),
    )
    return rollout, values


def _spread(values: NDArray[Any], most: int) -> NDArray[Any]:
    """At most so many of the rows, evenly spaced."""
    return values if len(values) <= most else values[((np.arange(most) + 0.5) * len(values) / most).astype(int)]


# --- the page --------------------------------------------------------------------------------------------------------


def summary(run: Run) -> list[tuple[str, str]]:
    """The table that opens the page; what the run has not got is not a row."""

    def change(key: str, form: str) -> str:
        first, last = first_and_last(run.series(key))
        if len([value for value in run.series(key) if not math.isnan(value)]) == 1:
            return f"{last:{form}}, once"
        return "" if math.isnan(first) else f"{first:{form}} -> {last:{form}}"

    def share(part: float, whole: float) -> str:
        return f"{part / whole:.1%}" if whole else ""

    rolled, (reward, _) = [step.rollout for step in run.rolled], run.reward()
    prompts = sum(sum(some.budgets.values()) for some in rolled)
    launched, aborted = (sum(int(some.fates[which].sum()) for some in rolled) for which in (slice(None), [4]))
    generated, kept = (int(np.nansum(run.series(f"tokens/{name}"))) for name in ("generated", "kept"))
    timed = [step.values for step in run.steps if {"timing_s/step", "timing_s/gen"} <= step.values.keys()]
    rollout_s, step_s = (sum(values[f"timing_s/{name}"] for values in timed) for name in ("gen", "step"))
    saturated = _mean([x for x in run.series("darts/group/saturated_share") if math.isfinite(x)])
    span = f"{run.steps[0].number} to {run.steps[-1].number}"
    rows = [
        ("steps", f"{len(run.steps)} ({span}), {len(rolled)} of them with a DARTS rollout"),
        ("prompts a step", rolled and f"{prompts / len(rolled):.4g}"),
        ("M' (candidates a prompt), mean", rolled and f"{launched / prompts:.2f}"),
        ("tokens generated", rolled and f"{generated:,}"),
        ("tokens kept", rolled and f"{kept:,}"),
        ("tokens dropped", rolled and f"{generated - kept:,} ({share(generated - kept, generated)})"),
        ("candidates aborted", rolled and f"{aborted:,} of {launched:,} ({share(aborted, launched)})"),
        ("saturated groups", "" if math.isnan(saturated) else f"{saturated:.1%}"),
        ("mean length, pool", change("length/pool", ",.1f")),
        ("mean length, kept", change("length/kept", ",.1f")),
        (f"reward ({reward})", change(reward, ".3f")),
        *((key, change(key, ".3f")) for key in run.validations()[:3]),
        ("seconds a step", change("timing_s/step", ".1f")),
        ("rollout's share of the step", share(rollout_s, step_s)),
        ("log-prob seconds under the rollout", change("darts/overlap/hidden_share", ".1%")),
    ]
    return [(label, value) for label, value in rows if value]


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h2 { font-size: 1.2em; margin: 2em 0 .3em; border-top: 1px solid #ddd; padding-top: .8em }
table { border-collapse: collapse } th { text-align: left; font-weight: normal; color: #555 }
th, td { padding: .15em 1.5em .15em 0; border-bottom: 1px solid #eee }
figure { margin: 0 } img { width: 100%; height: auto } figcaption, .small { color: #444; font-size: .95em }
"""
LEGEND = (
    "Arrows go from the mean over the first to that over the last tenth of the steps. The pool is all candidates that "
    "were generated, aborted ones with the tokens they had; the kept are trained on."
)


def page(run: Run, figures: Sequence["Drawn"]) -> str:
    """One HTML document with the figures inside."""
    title = f"DARTS run {escape(run.name)}"
    body = [f"<h1>{title}</h1>", "<table>"]
    body += [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in summary(run)]
    body += ["</table>", *(f'<p class="small">{escape(note)}</p>' for note in (LEGEND, *run.notes))]
    for figure in figures:
        body.append(f'<h2 id="{figure.name}">{escape(figure.title)}</h2>')
        if figure.png is None:
            body.append(f'<p class="small">Left out: {escape(figure.caption)}</p>')
            continue
        source = f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
        caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
        body.append(f'<figure><img src="{source}" alt="{escape(figure.title)}">{caption}</figure>')
    head = ["<head>", '<meta charset="utf-8">', f"<title>{title}</title>", f"<style>{CSS}</style>", "</head>"]
    return "\n".join(["<!DOCTYPE html>", '<html lang="en">', *head, "<body>", *body, "</body>", "</html>", ""])


def write_report(run: Run, out: Path) -> Path:
    """Draws all figures into a folder, also as one page; returns the page. Figures of a report before are replaced."""
    from darts import report_figures, report_timeline  # need matplotlib

    figures = report_figures.draw(run, report_figures.FIGURES | report_timeline.FIGURES)
    out.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        path = out / f"{figure.name}.png"
        path.unlink(missing_ok=True)
        if figure.png is not None:
            path.write_bytes(figure.png)
    index = out / "index.html"
    index.write_text(page(run, figures), encoding="utf-8")
    return index


def main(arguments: list[str] | None = None) -> int:
    """Writes the report and says where it is."""
    parser = argparse.ArgumentParser(prog="python -m darts.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help=f"folder of a run, or its {FILE}")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write (default: report/ beside {FILE})")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401

        path = find_file(options.run)
        run = read_run(path)
        run.name = (path.parent if options.run.is_file() else options.run).resolve().name
        index = write_report(run, options.out or path.parent / "report")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no report: matplotlib must be installed, but is missing; install verl-darts[report]", file=sys.stderr)
        return 2
    except (ReportError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 2
    for name, value in summary(run):
        print(f"  {name:<38}{value}")
    print(*(f"  {note}\n" for note in run.notes), sep="", end="")
    print(f"report: {index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
