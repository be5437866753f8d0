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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from darts.config import ConfigError
from darts.evidence.documents import DocumentError
from darts.evidence.log import refuse
from darts.evidence.trace import TraceError
from darts.simulation import SimulationError, documents, shaping
from darts.simulation.comparison import CAVEAT, FORMULAS, ReplaySummary, assumptions, compare, markdown
from darts.simulation.draws import Dataset
from darts.simulation.options import arms_of, block_of, inputs_of, load_curve, parse
from darts.simulation.replay import ReplayArm, Setting
from darts.simulation.search import advise, grid
from darts.simulation.trace import LengthTrace, read_trace
from darts.simulation.validation import ComparedSeconds, read_bench, validate, verdict
from darts.simulation.validation import markdown as validation_table

SHOWN = 8
"""Rows of the search that are shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    commands = {"replay": _replay, "plan": _plan, "validate": _validate, "table": _table}
    try:
        options = parse(arguments)
        commands[options.command](options)
    except (SimulationError, TraceError, DocumentError, ConfigError) as error:
        refuse(f"no simulation: {' '.join(str(error).split())}")
    return 0


def _replay(options: argparse.Namespace) -> None:
    arms, (trace, settings, steps) = arms_of(options), inputs_of(options)
    shaping_models = {}
    if options.shaping is not None:
        shaping_model = shaping.fit(*map(read_trace, options.shaping), trace)
        # It was fitted for the strategy `darts`.
        shaping_models = {arm.name: shaping_model for arm in arms if arm.block["strategy"] == "darts"}
    most_gpus = max(settings, key=lambda setting: setting.cluster.train_gpus)
    about_lines = _introduce(options, trace, settings[0], steps, arms, assumptions(arms, most_gpus))
    print(*dict.fromkeys(map(str, shaping_models.values())), sep="\n", end="\n" if shaping_models else "")
    rows: list[ReplaySummary] = []
    for setting in settings:
        rows += compare(trace, arms, setting, steps, seeds=options.seeds, reshape=shaping_models)
    print(f"\n{markdown(rows)}\n", *FORMULAS, CAVEAT, sep="\n")
    if shaping_models:
        print("Rows marked MODEL: lengths were moved by the model above; nobody measured them.")
    for gpus in options.gpus:
        *strategies, oracle, free_oracle = (row for row in rows if row.gpus == gpus)
        best = max(strategies, key=lambda row: row.speed_up.value)
        print(
            f"{gpus} GPUs: fastest is {best.name}{' (MODEL)' if best.model else ''}, {best.speed_up:.2f} times as fast "
            f"as plain verl; the oracle {oracle.speed_up.value:.2f}, and {free_oracle.speed_up.value:.2f} if it "
            "chooses its batches."
        )
    facts = {"trace": trace.name, "curve": options.curve, "steps": steps, "seeds": options.seeds}
    facts |= {"formulas": [*FORMULAS, CAVEAT], "models": {name: str(model) for name, model in shaping_models.items()}}
    _write_json(options, about_lines, rows, **facts)
    if options.png:
        from darts.simulation import figures  # needs matplotlib

        step_size = f"{settings[0].num_prompts} prompts, M = {settings[0].group_size}"
        figures.draw(rows, f"{trace.name}, curve {Path(options.curve).name}, {steps} steps of {step_size}", options.png)
        print(f"figure: {options.png}")


def _plan(options: argparse.Namespace) -> None:
    trace, (setting,), num_steps = inputs_of(options)
    tried_arms = grid(setting.group_size, block_of(options.set))
    about_lines = _introduce(options, trace, setting, num_steps, tried_arms, assumptions(tried_arms, setting))
    rows, recommended_block, lines = advise(trace, setting, num_steps, tried_arms)
    num_ranked = len(rows) - 3  # besides plain verl and two oracles
    print(f"\n{markdown([*rows[: 1 + min(SHOWN, num_ranked)], *rows[-2:]])}\n")
    if num_ranked > SHOWN:
        print(f"{num_ranked - SHOWN} slower ones of {num_ranked} different ones are not shown.")
    print(*FORMULAS, "", *lines, sep="\n")
    _write_json(options, about_lines, rows, trace=trace.name, recommended=recommended_block, lines=lines)


def _validate(options: argparse.Namespace) -> None:
    measured_arms, (trace, (setting,), num_steps) = read_bench(options.bench), inputs_of(options)
    arms = [measured_arm.arm for measured_arm in measured_arms]
    own_traces: dict[str, list[LengthTrace]] = {}
    trace_notes = []
    for arm in arms:
        trace_paths = [folder / f"{arm.name}.jsonl" for folder in options.traces]
        own_traces[arm.name] = arm_runs = [read_trace(path) for path in trace_paths if path.exists()]
        for run_number, lengths in enumerate(arm_runs, 1):
            run_name = arm.name if len(arm_runs) == 1 else f"{arm.name}, run {run_number}"
            trace_notes += [f"{run_name}: {note}" for note in _odd(lengths, setting.width(arm))]
    other_arms = [arm for arm in arms if not own_traces[arm.name]]
    notes = [*trace_notes, *assumptions(arms, setting)]
    about_lines = _introduce(options, trace, setting, num_steps, other_arms, notes)
    compared = validate(measured_arms, trace, setting, num_steps, own_traces)
    print(f"\n{validation_table(compared)}\n\n{verdict(compared)}")
    _write_json(options, about_lines, compared, trace=trace.name, verdict=verdict(compared))


def _table(options: argparse.Namespace) -> None:
    print(documents.tell(options.document, options.name, options.gpus))


def _introduce(
    options: argparse.Namespace,
    trace: LengthTrace,
    setting: Setting,
    num_steps: int,
    arms: Sequence[ReplayArm],
    notes: Iterable[str],
) -> list[str]:
    """Says what is replayed, and what is odd about it; returns the lines."""
    data_rounds = num_steps * setting.num_prompts / len(trace.prompts)
    again = f"; the data come {data_rounds:.1f} times, with fresh draws of their candidates" if data_rounds > 1 else ""
    fitted_runs = ", ".join(map(str, options.fit or ()))
    cost_source = f"fitted to {fitted_runs}" if fitted_runs else "estimates for a 7B model on H100s"
    lines = [
        f"{trace.name}: {len(trace.prompts):,} prompts of steps {trace.steps[0]} to {trace.steps[-1]}; limit "
        f"{setting.response_length:,} tokens.",
        *(f"NOTE: {note}." for note in _odd(trace, setting.width(*arms))),
        f"{num_steps} steps of {setting.num_prompts} prompts, M = {setting.group_size}{again}.",
        f"Engines of {options.tensor_parallel} GPUs, {options.placement}, at most {options.max_num_seqs} sequences "
        f"each; curve {load_curve(options.curve)[1]}.",
        f"Costs ({cost_source}): {setting.costs}",
        *(f"NOTE: {note}." for note in notes),
    ]
    print(*lines, sep="\n")
    return lines


def _odd(trace: LengthTrace, most: int) -> list[str]:
    """What has to be known of lengths of which so many candidates a prompt are drawn."""
    share = Dataset(trace, most).resampled
    what = f"{share:.1%} of {most} candidates a prompt were not recorded: they are drawn again from the recorded ones"
    return [*trace.notes, *([f"{what}, so tails are too short"] if share else [])]


def _write_json(
    options: argparse.Namespace, about: Sequence[str], rows: Sequence[ReplaySummary | ComparedSeconds], **facts: Any
) -> None:
    if options.json is not None:
        documents.save(options.json, options.given, about, rows, **facts)
        print(f"figures: {options.json}")
