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
from darts.simulation.replay import ReplayArm, Setting, width
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
    start_s = last_s = time.monotonic()

    def say(line: str) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s > PROGRESS_S:
            last_s = now_s
            print(f"[{now_s - start_s:.0f} s] {line}", file=sys.stderr, flush=True)

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


def _replay(options: argparse.Namespace, say_progress: Say) -> None:
    arms, (trace, settings, steps) = arms_of(options), inputs_of(options)
    shaping_models = _models(options, trace, arms)
    about_lines = _introduce(options, trace, settings[0], steps, arms)
    about_lines += _notes(assumptions(arms, max(settings, key=lambda setting: setting.cluster.train_gpus)))
    print(*dict.fromkeys(map(str, shaping_models.values())), sep="\n", end="\n" if shaping_models else "")
    rows: list[ReplaySummary] = []
    for setting in settings:
        rows += compare(trace, arms, setting, steps, seeds=options.seeds, reshape=shaping_models, say=say_progress)
    print(f"\n{markdown(rows)}\n", *FORMULAS, CAVEAT, sep="\n")
    if shaping_models:
        print("Rows marked MODEL: lengths were moved by the model above; nobody measured them.")
    for gpus in options.gpus:
        print(_fastest([row for row in rows if row.gpus == gpus]))
    facts = {"trace": trace.name, "curve": options.curve, "steps": steps, "seeds": options.seeds}
    facts |= {"formulas": [*FORMULAS, CAVEAT], "models": {name: str(model) for name, model in shaping_models.items()}}
    _write_json(options, about_lines, rows, **facts)
    if options.png:
        from darts.simulation import figures  # needs matplotlib

        step_size = f"{settings[0].num_prompts} prompts, M = {settings[0].group_size}"
        figures.draw(rows, f"{trace.name}, curve {Path(options.curve).name}, {steps} steps of {step_size}", options.png)
        print(f"figure: {options.png}")


def _plan(options: argparse.Namespace, say_progress: Say) -> None:
    trace, (setting,), num_steps = inputs_of(options)
    block = block_of(options.set)
    tried_arms = grid(setting.group_size, block)
    about_lines = _introduce(options, trace, setting, num_steps, tried_arms) + _notes(assumptions(tried_arms, setting))
    advice = advise(trace, setting, num_steps, block, say_progress)
    print(f"\n{markdown([advice.plain, *advice.ranked[:SHOWN], *advice.oracles])}\n")
    if len(advice.ranked) > SHOWN:
        print(f"{len(advice.ranked) - SHOWN} slower ones of {len(advice.ranked)} different ones are not shown.")
    print(*FORMULAS, "", *advice.lines(), sep="\n")
    rows, chosen_block = [advice.plain, *advice.ranked, *advice.oracles], advice.settings[advice.recommended.name]
    _write_json(options, about_lines, rows, trace=trace.name, recommended=chosen_block, lines=advice.lines())


def _validate(options: argparse.Namespace, say_progress: Say) -> None:
    measured_arms, (trace, (setting,), num_steps) = read_bench(options.bench), inputs_of(options)
    arms = [measured_arm.arm for measured_arm in measured_arms]
    own_traces: dict[str, list[LengthTrace]] = {}
    for arm in arms:
        trace_paths = [folder / f"{arm.name}.jsonl" for folder in options.traces]
        own_traces[arm.name] = [read_trace(path) for path in trace_paths if path.exists()]
    about_lines = _introduce(options, trace, setting, num_steps, [arm for arm in arms if not own_traces[arm.name]])
    for arm in arms:
        arm_runs = own_traces[arm.name]
        for run_number, lengths in enumerate(arm_runs, 1):
            run_name = arm.name if len(arm_runs) == 1 else f"{arm.name}, run {run_number}"
            about_lines += _notes(f"{run_name}: {note}" for note in _odd(lengths, width(arm, setting)))
    about_lines += _notes(assumptions(arms, setting))
    compared = validate(measured_arms, trace, setting, num_steps, own_traces, say_progress)
    print(f"\n{validation_table(compared)}\n\n{verdict(compared)}")
    _write_json(options, about_lines, compared, trace=trace.name, verdict=verdict(compared))


def _table(options: argparse.Namespace, say_progress: Say) -> None:
    print(documents.tell(options.document, options.name, options.gpus))


def _models(options: argparse.Namespace, trace: LengthTrace, arms: Sequence[ReplayArm]) -> dict[str, ShapingModel]:
    """The model of shaping by arm: of those with the strategy `darts`, for which it was fitted."""
    if options.shaping is None:
        return {}
    shaping_model = shaping.fit(*map(read_trace, options.shaping), trace)
    return {arm.name: shaping_model for arm in arms if arm.block["strategy"] == "darts"}


def _introduce(
    options: argparse.Namespace, trace: LengthTrace, setting: Setting, num_steps: int, arms: Sequence[ReplayArm]
) -> list[str]:
    """Says what is replayed, and what is odd about it; returns the lines."""
    span = f"{trace.steps[0]} to {trace.steps[-1]}"
    lines = [f"{trace.name}: {len(trace.prompts):,} prompts of steps {span}; limit {setting.response_length:,} tokens."]
    most_candidates = max((width(arm, setting) for arm in arms), default=setting.group_size)
    lines += [f"NOTE: {note}." for note in _odd(trace, most_candidates)]
    data_rounds = num_steps * setting.num_prompts / len(trace.prompts)
    again = f"; the data come {data_rounds:.1f} times, with fresh draws of their candidates" if data_rounds > 1 else ""
    lines.append(f"{num_steps} steps of {setting.num_prompts} prompts, M = {setting.group_size}{again}.")
    lines.append(
        f"Engines of {options.tensor_parallel} GPUs, {options.placement}, at most {options.max_num_seqs} sequences "
        f"each; curve {load_curve(options.curve)[1]}."
    )
    fitted_runs = ", ".join(map(str, options.fit or ()))
    cost_source = f"fitted to {fitted_runs}" if fitted_runs else "estimates for a 7B model on H100s"
    lines.append(f"Costs ({cost_source}): {setting.costs}")
    print(*lines, sep="\n")
    return lines


def _odd(trace: LengthTrace, most: int) -> list[str]:
    """What has to be known of lengths of which so many candidates a prompt are drawn."""
    share = Dataset(trace, most).resampled
    resampled_note = (
        f"{share:.1%} of {most} candidates a prompt were not recorded: they are drawn again from the recorded ones, so "
        "tails are too short"
    )
    return [*trace.notes, *([resampled_note] if share else [])]


def _notes(notes: Iterable[str]) -> list[str]:
    note_lines = [f"NOTE: {note}." for note in notes]
    print(*note_lines, sep="\n", end="\n" if note_lines else "")
    return note_lines


def _fastest(cluster_rows: Sequence[ReplaySummary]) -> str:
    """One line for one cluster."""
    *strategies, oracle, free_oracle = cluster_rows
    best = max(strategies, key=lambda row: row.speed_up.value)
    model_mark = " (MODEL)" if best.model else ""
    return (
        f"{best.gpus} GPUs: fastest is {best.name}{model_mark}, {best.speed_up:.2f} times as fast as plain verl; the "
        f"oracle {oracle.speed_up.value:.2f}, and {free_oracle.speed_up.value:.2f} if it chooses its batches."
    )


def _write_json(
    options: argparse.Namespace, about: Sequence[str], rows: Sequence[ReplaySummary | ComparedSeconds], **facts: Any
) -> None:
    if options.json is not None:
        save(options.json, documents.document(options.command, options.given, about, rows, **facts))
        print(f"figures: {options.json}")
