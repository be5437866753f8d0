"""What a bench reports: Markdown tables, and one JSON document from which they can be made again.

Contract: pure; `BenchResults` in, text out. `-` is what was not measured, or never happened. A document holds
everything that the tables come from: settings, resolved configuration, machine with versions and commit, arms, and all
records.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from darts.bench.records import StepRecord, ValidationRecord, records_of, table_of
from darts.bench.statistics import ArmComparison, BenchResults, known_mean
from darts.evidence import documents
from darts.evidence.documents import DocumentError, finite
from darts.evidence.tables import number, table

FORMAT = "darts.bench"
VERSION = 1
BASE = "none"
"""The arm that the others are compared with: plain verl."""


# --- tables ----------------------------------------------------------------------------------------------------------


def time_table(results: BenchResults) -> str:
    """Seconds of a step, of its phases, and how many times faster than the base."""
    table_rows = []
    for arm in results.arms:
        speed_ups = [_speed_up(results, arm, last) for last in (False, True)]
        phase_names = ("rollout_s", "old_log_prob_s", "update_s", "weights_s", "other_s")
        table_rows.append([
            arm, len(results.steps(arm)), number(results.median(arm, "step_s")), number(results.mean(arm, "step_s")),
            speed_ups[0], number(results.median(arm, "step_s", last=True)),
            number(results.mean(arm, "step_s", last=True)), speed_ups[1],
            _by_seed(results.speed_up(arm, BASE, last=True)) if arm != BASE else "-",
            *(number(results.mean(arm, phase_name)) for phase_name in phase_names),
        ])  # fmt: skip
    column_titles = [
        "arm", "steps", "s a step, median", "mean", f"speed-up over {BASE}", "last third: median", "mean",
        f"speed-up over {BASE}", "by seed", "rollout s", "old log-probs s", "update s", "weights s", "other s",
    ]  # fmt: skip
    return table(column_titles, table_rows)


def work_table(results: BenchResults) -> str:
    """What the engines did, means of a step."""
    rows = []
    for arm in results.arms:
        generated, dropped = (results.total(arm, f"tokens_{which}") for which in ("generated", "dropped"))
        rows.append([
            arm, number(results.mean(arm, "launched"), ".1f"), number(results.mean(arm, "aborted"), ".1f"),
            number(results.mean(arm, "tokens_generated"), ",.0f"), number(results.mean(arm, "tokens_kept"), ",.0f"),
            number(results.mean(arm, "tokens_dropped"), ",.0f"),
            number(dropped / generated if generated else math.nan, ".1%"),
            number(results.useful_per_s(arm), ",.0f"), number(results.bubble_ratio(arm), ".1%"),
            number(results.mean(arm, "queue"), ".1f"), _at_end(results, arm),
        ])  # fmt: skip
    columns = [
        "arm", "candidates", "aborted", "tokens generated", "kept", "thrown away", "share", "kept tokens/s of rollout",
        "bubble ratio", "queue", "at the end",
    ]  # fmt: skip
    return table(columns, rows)


def learning_table(results: BenchResults, target: float | None = None) -> str:
    """What was learnt: accuracy, lengths, and seconds of training to an accuracy.

    Args:
        results: of the bench.
        target: an accuracy; None: `BenchResults.target`.
    """
    goal = results.target(BASE) if target is None else target
    rows = []
    for arm in results.arms:
        gains = ["-" if arm == BASE else format(results.accuracy_gain(arm, BASE, last), "+.3f") for last in (0, 1)]
        lengths = known_mean(results.by_seed(arm, "mean_length")[1].T)
        rows.append([
            arm, number(results.accuracy(arm), ".3f"), gains[0], number(results.accuracy(arm, last=True), ".3f"),
            gains[1], number(results.mean(arm, "kept_mean", last=True), ".1f"),
            number(results.mean(arm, "pool_p99", last=True), ".0f"),
            number(lengths[-1] if len(lengths) else math.nan, ".1f"), _reached(results, arm, goal),
        ])  # fmt: skip
    columns = [
        "arm", "accuracy, end", f"minus {BASE}", "accuracy, last third", f"minus {BASE}", "kept length, last third",
        "pool p99", "length in validation, end", f"training to {number(goal, '.3f')}",
    ]  # fmt: skip
    return table(columns, rows)


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
    differences = {arm: results.values(arm, "served_difference") for arm in results.arms}
    most = max((float(values.max()) for values in differences.values() if len(values)), default=math.nan)
    if math.isfinite(most):
        said.append(
            f"Probabilities by the servers and by the actor differ by {most:.1e} at most, in the mean over a step's "
            "tokens: weights that are not an arm's own would show here."
        )
    if target is None:
        said.append(f"Time to an accuracy: to that of {BASE} over the last third, at the first validation that has it.")
    else:
        said.append("Time to an accuracy: at the first validation that has it.")
    pairs = {arm: {(step.seed, step.step) for step in results.steps(arm)} for arm in results.arms}
    missing = {arm: len(set().union(*pairs.values()) - own) for arm, own in pairs.items()}
    lacking = [f"{arm} lacks {count}" for arm, count in missing.items() if count]
    if lacking:
        said.append(f"Of the steps that some arm has: {', '.join(lacking)}.")
    return said


def text(results: BenchResults, target: float | None = None) -> str:
    """All tables with their notes."""
    made_tables = [time_table(results), work_table(results), learning_table(results, target)]
    return "\n\n".join([*made_tables, "\n".join(f"- {note_line}" for note_line in notes(results, target))])


def _at_end(bench_results: BenchResults, arm_name: str) -> str:
    """The queue after each seed's last step."""
    queues = {bench_record.seed: bench_record.queue for bench_record in bench_results.steps(arm_name)}
    return ", ".join(map(str, queues.values())) or "-"


def _speed_up(bench_results: BenchResults, arm_name: str, last_third: bool) -> str:
    if arm_name == BASE:
        return "1" if bench_results.steps(arm_name) else "-"
    return format(bench_results.speed_up(arm_name, BASE, last_third), ".2f")


def _by_seed(comparison: ArmComparison) -> str:
    return ", ".join(number(seed_ratio, ".2f") for seed_ratio in comparison.by_seed.values()) or "-"


def _reached(bench_results: BenchResults, arm_name: str, goal_accuracy: float) -> str:
    return "-" if math.isnan(goal_accuracy) else str(bench_results.time_to(arm_name, goal_accuracy))


# --- the document ----------------------------------------------------------------------------------------------------


def summary(results: BenchResults, target: float | None = None) -> dict[str, dict[str, Any]]:
    """The tables' figures, by arm; null where there is none."""
    goal_accuracy = results.target(BASE) if target is None else target
    total_keys = ("tokens_generated", "tokens_kept", "tokens_dropped")
    arm_figures = {}
    for arm in results.arms:
        summary_figures: dict[str, float | ArmComparison] = {key: results.total(arm, key) for key in total_keys} | {
            f"{key}_{name}{'_last_third' if last_third else ''}": getattr(results, name)(arm, key, last_third)
            for key in ("step_s", "rollout_s")
            for name in ("median", "mean")
            for last_third in (False, True)
        }
        for third_suffix, last_third in (("", False), ("_last_third", True)):
            summary_figures[f"speed_up{third_suffix}"] = results.speed_up(arm, BASE, last_third)
            summary_figures[f"accuracy{third_suffix}"] = results.accuracy(arm, last_third)
            summary_figures[f"accuracy_gain{third_suffix}"] = results.accuracy_gain(arm, BASE, last_third)
        summary_figures |= {
            "rollout_speed_up": results.ratio(arm, BASE, "rollout_s"),
            "useful_tokens_per_s": results.useful_per_s(arm),
            "bubble_ratio": results.bubble_ratio(arm),
            "kept_length_last_third": results.mean(arm, "kept_mean", last=True),
            "swap_s_mean": results.mean(arm, "swap_s"),
        }
        reached_seconds = results.time_to(arm, goal_accuracy).seconds
        arm_figures[arm] = {
            "steps": len(results.steps(arm)),
            **{key: _plain(figure_value) for key, figure_value in summary_figures.items()},
            "seconds_to_target": {seed: _plain(seed_seconds) for seed, seed_seconds in reached_seconds.items()},
        }
    return arm_figures


def document(results: BenchResults, target: float | None = None, **facts: Any) -> dict[str, Any]:
    """What a bench leaves behind, for JSON.

    Args:
        results: so far.
        target: an accuracy, for `learning_table`.
        facts: what the figures belong to: arms, the command's settings, the resolved Hydra configuration, and the
            machine, which is looked at before anything is measured.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "base": BASE,
        "target": _plain(results.target(BASE) if target is None else target),
        "target_is_given": target is not None,
        "planned_steps": results.num_steps,
        "summary": summary(results, target),
        "steps": table_of(step for arm in results.arms for step in results.steps(arm)),
        "validations": table_of(bench_record for arm in results.arms for bench_record in results.validations(arm)),
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


def _plain(value: float | ArmComparison) -> Any:
    """For JSON: null is what is not finite."""
    if isinstance(value, ArmComparison):
        by_seed = {seed: _plain(ratio) for seed, ratio in value.by_seed.items()}
        return {key: _plain(end) for key, end in asdict(value.overall).items()} | {"by_seed": by_seed}
    return finite(value)
