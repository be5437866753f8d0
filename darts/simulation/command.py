"""The command that replays traces, recommends settings, and compares with measurements.

    python -m darts.simulation replay TRACE --gpus 8 64 1024 --tensor-parallel 4 --curve h20-like --png replay.png
    python -m darts.simulation replay TRACE --strategy darts --strategy "darts:selection.num_long=2,early_stop=exact"
    python -m darts.simulation plan TRACE --curve curve.json --gpus 64
    python -m darts.simulation table replay.json --name speed-ups
    python -m darts.simulation validate TRACE --bench bench.json --curve curve.json --fit plain/darts.jsonl --gpus 1

Contract: TRACE is a CSV file (step, prompt, candidate, response_length; .gz) or the `darts.jsonl` of a run. Tables go
to stdout, progress to stderr. Input that cannot be used is one line on stderr and exit code 2.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from darts.config import ConfigError
from darts.evidence.documents import DocumentError, save
from darts.evidence.trace import TraceError
from darts.simulation import SimulationError, documents, shaping
from darts.simulation.assumptions import assumptions
from darts.simulation.bench_records import MeasuredArm, read_bench
from darts.simulation.comparison import CAVEAT, FORMULAS, ReplaySummary, compare, markdown
from darts.simulation.curves import load_curve
from darts.simulation.draws import Dataset
from darts.simulation.options import arms_of, block_of, parse, settings_of, steps_of, trace_of
from darts.simulation.replay import Arm, Setting, width
from darts.simulation.run_trace import read_trace
from darts.simulation.search import advise, grid
from darts.simulation.shaping import ShapingModel
from darts.simulation.trace import LengthTrace
from darts.simulation.validation import ComparedSeconds, validate, verdict
from darts.simulation.validation import markdown as validation_table

PROGRESS_S = 3.0
SHOWN = 8
"""Rows of the search that are shown."""


class _Progress:
    """Says how far it is, every few seconds."""

    def __init__(self) -> None:
        self._said = self.began = time.monotonic()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said > PROGRESS_S:
            self._said = now
            print(f"[{now - self.began:.0f} s] {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    try:
        options = parse(arguments)
        commands = {"replay": _replay, "plan": _plan, "validate": _validate, "table": _table}
        commands[options.command](options, _Progress())
    except (SimulationError, TraceError, DocumentError, ConfigError) as error:
        print(f"no simulation: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _replay(options: argparse.Namespace, progress: _Progress) -> None:
    arms, trace = arms_of(options), trace_of(options)
    settings, steps, models = settings_of(options, trace), steps_of(options, trace), _models(options, trace, arms)
    _check_output(options)
    about = _introduce(options, trace, settings[0], steps, arms)
    about += _said(assumptions(arms, max(settings, key=lambda setting: setting.cluster.train_gpus)))
    print(*dict.fromkeys(map(str, models.values())), sep="\n", end="\n" if models else "")
    rows: list[ReplaySummary] = []
    for setting in settings:
        rows += compare(trace, arms, setting, steps, seeds=options.seeds, reshape=models, say=progress)
    print(f"\n{markdown(rows)}\n", *FORMULAS, CAVEAT, sep="\n")
    if models:
        print("Rows marked MODEL: lengths were moved by the model above; nobody measured them.")
    for gpus in options.gpus:
        print(_fastest([row for row in rows if row.gpus == gpus]))
    told = {"trace": trace.name, "curve": options.curve, "steps": steps, "seeds": options.seeds}
    told |= {"formulas": [*FORMULAS, CAVEAT], "models": {name: str(model) for name, model in models.items()}}
    _write_json(options, about, rows, **told)
    if options.png:
        from darts.simulation import figures  # needs matplotlib

        size = f"{settings[0].num_prompts} prompts, M = {settings[0].group_size}"
        figures.draw(rows, f"{trace.name}, curve {Path(options.curve).name}, {steps} steps of {size}", options.png)
        print(f"figure: {options.png}")


def _plan(options: argparse.Namespace, progress: _Progress) -> None:
    trace = trace_of(options)
    (setting,), steps, block = settings_of(options, trace), steps_of(options, trace), block_of(options.set)
    _check_output(options)
    arms = grid(setting.group_size, block)
    about = _introduce(options, trace, setting, steps, arms) + _said(assumptions(arms, setting))
    advice = advise(trace, setting, steps, block, progress)
    print(f"\n{markdown([advice.plain, *advice.ranked[:SHOWN], *advice.oracles])}\n")
    if len(advice.ranked) > SHOWN:
        print(f"{len(advice.ranked) - SHOWN} slower ones of {len(advice.ranked)} different ones are not shown.")
    print(*FORMULAS, "", *advice.lines(), sep="\n")
    rows = [advice.plain, *advice.ranked, *advice.oracles]
    chosen = advice.settings[advice.recommended.name]
    _write_json(options, about, rows, trace=trace.name, recommended=chosen, lines=advice.lines())


def _validate(options: argparse.Namespace, progress: _Progress) -> None:
    measured, trace = read_bench(options.bench), trace_of(options)
    (setting,), steps = settings_of(options, trace), steps_of(options, trace)
    _check_output(options)
    own = {arm.name: _own_traces(options, arm) for arm in measured}
    about = _introduce(options, trace, setting, steps, [some.arm for some in measured if not own[some.name]])
    for some in measured:
        for number, lengths in enumerate(own[some.name], 1):
            of = some.name if len(own[some.name]) == 1 else f"{some.name}, run {number}"
            about += _said(f"{of}: {note}" for note in _odd(lengths, width(some.arm, setting)))
    about += _said(assumptions([some.arm for some in measured], setting))
    compared = validate(measured, trace, setting, steps, own, progress)
    print(f"\n{validation_table(compared)}\n\n{verdict(compared)}")
    _write_json(options, about, compared, trace=trace.name, verdict=verdict(compared))


def _table(options: argparse.Namespace, progress: _Progress) -> None:
    print(documents.tell(options.document, options.name, options.gpus))


def _own_traces(options: argparse.Namespace, arm: MeasuredArm) -> list[LengthTrace]:
    """The lengths of an arm's own runs."""
    paths = [folder / f"{arm.name}.jsonl" for folder in options.traces]
    return [read_trace(path) for path in paths if path.exists()]


def _models(options: argparse.Namespace, trace: LengthTrace, arms: Sequence[Arm]) -> dict[str, ShapingModel]:
    """The model of shaping by arm: of those with the strategy `darts`, for which it was fitted."""
    if options.shaping is None:
        return {}
    model = shaping.fit(*map(read_trace, options.shaping), trace)
    return {arm.name: model for arm in arms if arm.block["strategy"] == "darts"}


def _introduce(
    options: argparse.Namespace, trace: LengthTrace, setting: Setting, steps: int, arms: Sequence[Arm]
) -> list[str]:
    """Says what is replayed, and what is odd about it; returns the lines."""
    span = f"{trace.steps[0]} to {trace.steps[-1]}"
    lines = [f"{trace.name}: {len(trace.prompts):,} prompts of steps {span}; limit {setting.response_length:,} tokens."]
    most = max((width(arm, setting) for arm in arms), default=setting.group_size)
    lines += [f"NOTE: {note}." for note in _odd(trace, most)]
    rounds = steps * setting.num_prompts / len(trace.prompts)
    again = f"; the data come {rounds:.1f} times, with fresh draws of their candidates" if rounds > 1 else ""
    lines.append(f"{steps} steps of {setting.num_prompts} prompts, M = {setting.group_size}{again}.")
    lines.append(
        f"Engines of {options.tensor_parallel} GPUs, {options.placement}, at most {options.max_num_seqs} sequences "
        f"each; curve {load_curve(options.curve)[1]}."
    )
    runs = ", ".join(map(str, options.fit or ()))
    source = f"fitted to {runs}" if runs else "estimates for a 7B model on H100s"
    lines.append(f"Costs ({source}): {setting.costs}")
    print(*lines, sep="\n")
    return lines


def _odd(trace: LengthTrace, most: int) -> list[str]:
    """What has to be known of lengths of which so many candidates a prompt are drawn."""
    share = Dataset(trace, most).resampled
    again = (
        f"{share:.1%} of {most} candidates a prompt were not recorded: they are drawn again from the recorded ones, so "
        "tails are too short"
    )
    return [*trace.notes, *([again] if share else [])]


def _said(notes: Iterable[str]) -> list[str]:
    lines = [f"NOTE: {note}." for note in notes]
    print(*lines, sep="\n", end="\n" if lines else "")
    return lines


def _fastest(rows: Sequence[ReplaySummary]) -> str:
    """One line for one cluster."""
    *strategies, oracle, free = rows
    best = max(strategies, key=lambda row: row.speed_up.value)
    marked = " (MODEL)" if best.model else ""
    return (
        f"{best.gpus} GPUs: fastest is {best.name}{marked}, {best.speed_up:.2f} times as fast as plain verl; the "
        f"oracle {oracle.speed_up.value:.2f}, and {free.speed_up.value:.2f} if it chooses its batches."
    )


def _check_output(options: argparse.Namespace) -> None:
    for name in ("json", "png"):
        path = getattr(options, name, None)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SimulationError(f"--{name} {path}: a file cannot be written there; name one in a folder that exists.")
    if getattr(options, "png", None):
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            raise SimulationError("--png: needs matplotlib; install verl-darts[report].") from None


def _write_json(
    options: argparse.Namespace, about: Sequence[str], rows: Sequence[ReplaySummary | ComparedSeconds], **more: Any
) -> None:
    if options.json is not None:
        save(options.json, documents.document(options.command, options.given, about, rows, **more))
        print(f"figures: {options.json}")
