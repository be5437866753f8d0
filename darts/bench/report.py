"""What a bench reports: Markdown tables, and one JSON document from which they can be made again.

Contract: pure; `BenchResults` in, text out. `-` is what was not measured, or never happened. A document holds
everything that the tables come from: settings, resolved configuration, machine with versions and commit, arms, and all
records.
"""

import math
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from darts.bench.records import StepRecord, ValidationRecord, records_of, table_of
from darts.bench.statistics import ArmComparison, BenchResults, Reached
from darts.evidence import documents
from darts.evidence.documents import DocumentError, finite
from darts.evidence.tables import number, table

FORMAT = "darts.bench"
VERSION = 1
BASE = "none"
"""The arm that the others are compared with: plain verl."""


TABLES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "time": (
        ("steps", "steps", "d"),
        ("s a step, median", "step_s_median", ".2f"),
        ("mean", "step_s_mean", ".2f"),
        (f"speed-up over {BASE}", "speed_up", ".2f"),
        ("last third: median", "step_s_median_last_third", ".2f"),
        ("mean", "step_s_mean_last_third", ".2f"),
        (f"speed-up over {BASE}", "speed_up_last_third", ".2f"),
        ("by seed", "speed_up_by_seed", ""),
        ("rollout s", "rollout_s_mean", ".2f"),
        ("old log-probs s", "old_log_prob_s_mean", ".2f"),
        ("update s", "update_s_mean", ".2f"),
        ("weights s", "weights_s_mean", ".2f"),
        ("other s", "other_s_mean", ".2f"),
    ),
    "work": (
        ("candidates", "launched_mean", ".1f"),
        ("aborted", "aborted_mean", ".1f"),
        ("tokens generated", "tokens_generated_mean", ",.0f"),
        ("kept", "tokens_kept_mean", ",.0f"),
        ("thrown away", "tokens_dropped_mean", ",.0f"),
        ("share", "dropped_share", ".1%"),
        ("kept tokens/s of rollout", "useful_tokens_per_s", ",.0f"),
        ("bubble ratio", "bubble_ratio", ".1%"),
        ("queue", "queue_mean", ".1f"),
        ("at the end", "last_queues", ""),
    ),
    "learning": (
        ("accuracy, end", "accuracy", ".3f"),
        (f"minus {BASE}", "accuracy_gain", "+.3f"),
        ("accuracy, last third", "accuracy_last_third", ".3f"),
        (f"minus {BASE}", "accuracy_gain_last_third", "+.3f"),
        ("kept length, last third", "kept_length_last_third", ".1f"),
        ("pool p99", "pool_p99_mean_last_third", ".0f"),
        ("length in validation, end", "validation_length", ".1f"),
        ("training to {goal}", "seconds_to_target", ""),
    ),
}
"""By name the tables: of each column the title, the figure of `summary`, and its format."""


@lru_cache(maxsize=64)  # all tables are made of them
def figures_of(results: BenchResults, arm: str, goal_accuracy: float) -> dict[str, Any]:
    """All figures of an arm, by name; NaN where there is none."""
    steps, over = results.steps(arm), results.over
    figures: dict[str, Any] = {"steps": len(steps)}
    for suffix, last in (("", False), ("_last_third", True)):
        measured = results.steps(arm, last).drop(columns=["arm"]).astype(float)
        figures |= measured.mean().add_suffix(f"_mean{suffix}").to_dict()
        figures |= {f"{key}_median{suffix}": measured[key].median() for key in ("step_s", "rollout_s")}
        figures[f"speed_up{suffix}"] = results.speed_up(arm, BASE, last)
        figures[f"accuracy{suffix}"] = results.accuracy(arm, last)
        figures[f"accuracy_gain{suffix}"] = results.accuracy_gain(arm, BASE, last)
    seed_ratios = {} if arm == BASE else figures["speed_up_last_third"].by_seed
    lengths = results.by_seed(arm, "mean_length").mean()
    return figures | {
        **{f"tokens_{part}": results.values(arm, f"tokens_{part}").sum() for part in ("generated", "kept", "dropped")},
        "dropped_share": over(arm, "tokens_dropped", "tokens_generated"),
        "useful_tokens_per_s": over(arm, "tokens_kept", "rollout_s"),
        "bubble_ratio": over(arm, "idle_slot_steps", "slot_steps"),
        "rollout_speed_up": results.ratio(arm, BASE, "rollout_s"),
        "speed_up_by_seed": ", ".join(number(seed_ratio) for seed_ratio in seed_ratios.values()) or "-",
        "kept_length_last_third": figures["kept_mean_mean_last_third"],
        "validation_length": math.nan if lengths.empty else lengths.iloc[-1],
        "last_queues": ", ".join(map(str, steps["queue"].groupby("seed").last())) or "-",
        "seconds_to_target": results.time_to(arm, goal_accuracy),
    }


def _goal(results: BenchResults, target: float | None) -> float:
    return results.target(BASE) if target is None else target


def bench_table(results: BenchResults, name: str, target: float | None = None) -> str:
    """One of `TABLES`: seconds of a step, and how many times faster than the base; what engines did; what was learnt.

    Seconds of training are those to the accuracy `target`; None: `BenchResults.target`.
    """
    goal_accuracy = _goal(results, target)

    def cell(arm: str, figure_name: str, form: str) -> str:
        figures = figures_of(results, arm, goal_accuracy)
        figure = figures[figure_name]
        if arm == BASE and isinstance(figure, ArmComparison):
            return "1" if figure_name.startswith("speed_up") and figures["steps"] else "-"
        return number(figure, form) if isinstance(figure, float) else format(figure, form)

    titles = [title.format(goal=number(goal_accuracy, ".3f")) for title, _, _ in TABLES[name]]
    rows = [[arm, *(cell(arm, figure_name, form) for _, figure_name, form in TABLES[name])] for arm in results.arms]
    return table(["arm", *titles], rows)


def notes(results: BenchResults, target: float | None = None) -> list[str]:
    """What has to be known to read the tables."""
    seeds = len(results.seeds)
    meaning = {
        0: "Nothing has been measured.",
        1: "One seed: intervals are about the noise of its steps and prompts, too narrow even for that "
        "(darts.bench.statistics), and say nothing about other seeds.",
    }.get(
        seeds,
        f"Intervals are 95 % bootstraps over {seeds} seeds and, in each, the steps that both arms have (in blocks), "
        "or its prompts. So few seeds say little about how seeds differ: read the values by seed beside them.",
    )
    said = [
        meaning,
        f"Last third: steps {results.last_from} to {results.num_steps}. Speed-up: total seconds of {BASE} over total "
        "seconds of the arm, over the same seeds and steps; steps are without validation and without the arms' swap.",
        "Bubble ratio: idle slot-steps over slots x decoding steps, with min(max_num_seqs, candidates) slots on each "
        "engine (darts.bench.slots).",
    ]
    queueing = [arm for arm in results.arms if results.values(arm, "queue").any()]
    if queueing:
        said.append(
            f"{', '.join(queueing)}: what is queued is still to come, and it is the long responses; speed-ups over a "
            "part of a cycle are too high by what the queue at the end (and not at the beginning) would take."
        )
    most = pd.Series([results.values(arm, "served_difference").max() for arm in results.arms]).max()
    if math.isfinite(most):
        said.append(
            f"Probabilities by the servers and by the actor differ by {most:.1e} at most, in the mean over a step's "
            "tokens: weights that are not an arm's own would show here."
        )
    if target is None:
        said.append(f"Time to an accuracy: to that of {BASE} over the last third, at the first validation that has it.")
    else:
        said.append("Time to an accuracy: at the first validation that has it.")
    pairs = {arm: set(results.steps(arm).index) for arm in results.arms}
    missing = {arm: len(set().union(*pairs.values()) - own) for arm, own in pairs.items()}
    lacking = [f"{arm} lacks {count}" for arm, count in missing.items() if count]
    if lacking:
        said.append(f"Of the steps that some arm has: {', '.join(lacking)}.")
    return said


def text(results: BenchResults, target: float | None = None) -> str:
    """All tables with their notes."""
    made_tables = [bench_table(results, name, target) for name in TABLES]
    return "\n\n".join([*made_tables, "\n".join(f"- {note_line}" for note_line in notes(results, target))])


def summary(results: BenchResults, target: float | None = None) -> dict[str, dict[str, Any]]:
    """The tables' figures, by arm; null where there is none."""
    return {arm: _plain(figures_of(results, arm, _goal(results, target))) for arm in results.arms}


def document(results: BenchResults, target: float | None = None, **facts: Any) -> dict[str, Any]:
    """What a bench leaves behind, for JSON; `target` as `bench_table`.

    The facts are what the figures belong to: arms, the command's settings, the resolved Hydra configuration, and the
    machine, which is looked at before anything is measured.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "base": BASE,
        "target": _plain(_goal(results, target)),
        "target_is_given": target is not None,
        "planned_steps": results.num_steps,
        "summary": summary(results, target),
        "steps": table_of(StepRecord, map(results.steps, results.arms)),
        "validations": table_of(ValidationRecord, map(results.validations, results.arms)),
    }


def load(path: Path) -> tuple[dict[str, Any], BenchResults]:
    """A document, and its results, of which all tables can be made again.

    Raises:
        DocumentError: the file cannot be read, or is something else.
    """
    opened = documents.load(path, FORMAT, VERSION)
    try:
        kinds = (StepRecord, opened["steps"]), (ValidationRecord, opened["validations"])
        records = [record for kind, columns in kinds for record in records_of(kind, columns)]
        return opened, BenchResults(records, [arm["name"] for arm in opened["arms"]], opened["planned_steps"])
    except (KeyError, TypeError, ValueError) as cause:
        raise DocumentError(f"{path}: {cause!r}") from cause


def _plain(value: Any) -> Any:
    """For JSON: null is what is not finite."""
    if isinstance(value, ArmComparison):
        value = asdict(value.overall) | {"by_seed": value.by_seed}
    elif isinstance(value, Reached):
        value = value.seconds
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else finite(value)
