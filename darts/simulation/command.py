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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from darts.config import ConfigError
from darts.evidence.documents import DocumentError, save
from darts.evidence.trace import TraceError
from darts.simulation import SimulationError, documents, shaping
from darts.simulation.assumptions import assumptions
from darts.simulation.comparison import CAVEAT, FORMULAS, ReplaySummary, compare, markdown
from darts.simulation.curves import load_curve
from darts.simulation.draws import Dataset
from darts.simulation.options import arms_of, block_of, inputs_of, parse
from darts.simulation.replay import Arm, Setting, width
from darts.simulation.run_trace import read_trace
from darts.simulation.search import advise, grid
from darts.simulation.shaping import ShapingModel
from darts.simulation.trace import LengthTrace
from darts.simulation.validation import ComparedSeconds, read_bench, validate, verdict
from darts.simulation.validation import markdown as validation_table

PROGRESS_S = 3.0
Say = Callable[[str], None]
SHOWN = 8
"""Rows of the search that are shown."""


def _progress() -> Say:
    """Says how far it is, every few seconds."""
    began = last_s = time.monotonic()

    def say(line: str) -> None:
        nonlocal last_s
        now = time.monotonic()
        if now - last_s > PROGRESS_S:
            last_s = now
            print(f"[{now - began:.0f} s] {line}", file=sys.stderr, flush=True)

    return say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    try:
        options = parse(arguments)
        commands = {"replay": _replay, "plan": _plan, "validate": _validate, "table": _table}
        commands[options.command](options, _progress())
    except (SimulationError, TraceError, DocumentError, ConfigError) as error:
        print(f"no simulation: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _replay(options: argparse.Namespace, progress: Say) -> None:
    arms, (trace, settings, steps) = arms_of(options), inputs_of(options)
    models = _models(options, trace, arms)
    about = _introduce(options, trace, settings[0], steps, arms)
    about += _notes(assumptions(arms, max(settings, key=lambda setting: setting.cluster.train_gpus)))
    print(*dict.fromkeys(map(str, models.values())), sep="\n", end="\n" if models else "")
    rows: list[ReplaySummary] = []
    for setting in settings:
        rows += compare(trace, arms, setting, steps, seeds=options.seeds, reshape=models, say=progress)
    print(f"\n{markdown(rows)}\n", *FORMULAS, CAVEAT, sep="\n")
    if models:
        print("Rows marked MODEL: lengths were moved by the model above; nobody measured them.")
    for gpus in options.gpus:
        print(_fastest([row for row in rows if row.gpus == gpus]))
    more = {"trace": trace.name, "curve": options.curve, "steps": steps, "seeds": options.seeds}
    more |= {"formulas": [*FORMULAS, CAVEAT], "models": {name: str(model) for name, model in models.items()}}
    _write_json(options, about, rows, **more)
    if options.png:
        from darts.simulation import figures  # needs matplotlib

        size = f"{settings[0].num_prompts} prompts, M = {settings[0].group_size}"
        figures.draw(rows, f"{trace.name}, curve {Path(options.curve).name}, {steps} steps of {size}", options.png)
        print(f"figure: {options.png}")


def _plan(options: argparse.Namespace, progress: Say) -> None:
    trace, (setting,), steps = inputs_of(options)
    block = block_of(options.set)
    arms = grid(setting.group_size, block)
    about = _introduce(options, trace, setting, steps, arms) + _notes(assumptions(arms, setting))
    advice = advise(trace, setting, steps, block, progress)
    print(f"\n{markdown([advice.plain, *advice.ranked[:SHOWN], *advice.oracles])}\n")
    if len(advice.ranked) > SHOWN:
        print(f"{len(advice.ranked) - SHOWN} slower ones of {len(advice.ranked)} different ones are not shown.")
    print(*FORMULAS, "", *advice.lines(), sep="\n")
    rows, chosen = [advice.plain, *advice.ranked, *advice.oracles], advice.settings[advice.recommended.name]
    _write_json(options, about, rows, trace=trace.name, recommended=chosen, lines=advice.lines())


def _validate(options: argparse.Namespace, progress: Say) -> None:
    measured, (trace, (setting,), steps) = read_bench(options.bench), inputs_of(options)
    arms = [measured_arm.arm for measured_arm in measured]
    traces: dict[str, list[LengthTrace]] = {}
    for arm in arms:
        paths = [folder / f"{arm.name}.jsonl" for folder in options.traces]
        traces[arm.name] = [read_trace(path) for path in paths if path.exists()]
    about = _introduce(options, trace, setting, steps, [arm for arm in arms if not traces[arm.name]])
    for arm in arms:
        runs = traces[arm.name]
        for number, lengths in enumerate(runs, 1):
            run_name = arm.name if len(runs) == 1 else f"{arm.name}, run {number}"
            about += _notes(f"{run_name}: {note}" for note in _odd(lengths, width(arm, setting)))
    about += _notes(assumptions(arms, setting))
    compared = validate(measured, trace, setting, steps, traces, progress)
    print(f"\n{validation_table(compared)}\n\n{verdict(compared)}")
    _write_json(options, about, compared, trace=trace.name, verdict=verdict(compared))


def _table(options: argparse.Namespace, progress: Say) -> None:
    print(documents.tell(options.document, options.name, options.gpus))


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


def _notes(notes: Iterable[str]) -> list[str]:
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


def _write_json(
    options: argparse.Namespace, about: Sequence[str], rows: Sequence[ReplaySummary | ComparedSeconds], **more: Any
) -> None:
    if options.json is not None:
        save(options.json, documents.document(options.command, options.given, about, rows, **more))
        print(f"figures: {options.json}")
